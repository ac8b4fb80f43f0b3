"""What every test runs under."""

from __future__ import annotations

import os
import signal

# Tests run side by side, one thread each, and so do the commands they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts its background jobs with Ctrl-C ignored, and so would be the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
