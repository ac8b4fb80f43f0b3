"""The command line as a user meets it: arguments in, exit status, stdout and stderr out."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

from mwtool.cli import main


@dataclass(frozen=True, slots=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The whole of stdout as one JSON document; fails on anything before or behind it."""
        document: dict[str, Any] = json.loads(self.out)
        return document

    @property
    def fault(self) -> str:
        """The one line of a failure."""
        assert (self.code, self.out) == (1, ""), self
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        return line.removeprefix("error: ")


def run(*arguments: object) -> Ran:
    """`mwtool ARGUMENTS` in this process: a second a command less than in one of its own."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["mwtool", *map(str, arguments)]
    with (
        patch.object(sys, "argv", argv),
        patch.dict(os.environ),
        _logs_to(err),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        code = _exit_status(main)
    return Ran(code, out.getvalue(), err.getvalue())


def _exit_status(program: Callable[[], None]) -> int:
    try:
        program()
    except SystemExit as end:
        if not isinstance(end.code, int | None):  # a text, which Python would print
            raise
        return end.code or 0
    return 0


def run_apart(*arguments: object, python: tuple[str, ...] = (), **environment: str) -> Ran:
    """`python -m mwtool ARGUMENTS` in a process of its own."""
    command = [sys.executable, *python, "-m", "mwtool", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})
    return Ran(done.returncode, done.stdout, done.stderr)


@contextmanager
def _logs_to(stream: io.StringIO) -> Iterator[None]:
    """Libraries log to the stderr there was when they were imported; send it where the command's goes."""
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    handlers = [h for logger in loggers for h in logger.handlers if type(h) is logging.StreamHandler]
    before = [handler.setStream(stream) for handler in handlers]
    try:
        yield
    finally:
        for handler, old in zip(handlers, before, strict=True):
            if old is not None:
                handler.setStream(old)
