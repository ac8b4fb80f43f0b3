"""What every test runs under."""

from __future__ import annotations

import signal

# A shell starts its background jobs with Ctrl-C ignored, and so would be the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
