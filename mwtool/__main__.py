"""`python -m mwtool`."""

from mwtool.cli import main

if __name__ == "__main__":
    main()
