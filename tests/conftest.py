"""What every test runs under."""

from __future__ import annotations

import gc
import os
import signal
import sys

from hypothesis import settings

# Tests run side by side, one thread each, and so do the commands they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A machine that is busy otherwise takes its time; that is no failure. Where CI is set, as services do, a change is
# judged by the same examples as the one before it; new ones are for people's machines.
settings.register_profile("mwtool", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("mwtool")

# Nothing asks the Hub, but for the tests that MWTOOL_HUB=1 adds; those of a Hub start one on this machine.
if "MWTOOL_HUB" not in os.environ:
    os.environ["HF_HUB_OFFLINE"] = "1"

# A shell starts its background jobs with Ctrl-C ignored, and so would be the commands that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Trainer and others search for garbage cycles at every run, and Python does by itself. The half million objects that
# imports make hold none, and would be searched each time: a third of the time of a training.
gc.set_threshold(5_000, 20, 20)
frozen = 0  # modules


def pytest_runtest_setup() -> None:
    """Leave what was imported since out of later searches."""
    global frozen  # noqa: PLW0603 # a hook has no other place
    if len(sys.modules) > frozen + 20:
        gc.collect()  # what a test has left is no import
        gc.freeze()
        frozen = len(sys.modules)
