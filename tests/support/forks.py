"""Commands in processes of their own, forked from one that has imported everything: seconds less for each.

What a process imports and prints at its start cannot be seen in them; that they can be killed and stopped can.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import socket
import subprocess
import sys
import traceback
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TextIO

USED = (
    "mwtool.cli.eval mwtool.cli.ablate mwtool.cli.scan mwtool.cli.finetune_run mwtool.finetune.trainer "
    "mwtool.finetune.artifacts mwtool.finetune.monitor mwtool.finetune.schema mwtool.files.scan_schema "
    "mwtool_adapters.llama transformers.models.llama.modeling_llama peft.tuners.lora.bnb rich.progress "
    "matplotlib.backends.backend_agg PIL.JpegImagePlugin"
).split()
"""Imported before anything is asked for; the rest is imported in each fork."""


@dataclass(frozen=True)
class Forked:
    """A command that runs. pid: of its process. out, err: what it writes, to be read while it does."""

    pid: int
    out: TextIO
    err: TextIO

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> tuple[int, str, str]:
        """Its status, negative if a signal ended it, and what was not read yet of stdout and stderr."""
        with self.out, self.err:
            err, out = self.err.read(), self.out.read()
        return os.waitstatus_to_exitcode(int(_line())), out, err


def forked(*arguments: object, before: str = "") -> Forked:
    """Start `mwtool ARGUMENTS` here and now; `before` is code that its process runs first. One at a time."""
    (out, its_out), (err, its_err) = os.pipe(), os.pipe()
    asked = {
        "arguments": [*map(str, arguments)],
        "before": before,
        "folder": str(Path.cwd()),
        "environment": {**os.environ},
    }
    socket.send_fds(_server(), [f"{json.dumps(asked)}\n".encode()], [its_out, its_err])
    os.close(its_out)
    os.close(its_err)
    return Forked(int(_line()), os.fdopen(out, encoding="utf-8"), os.fdopen(err, encoding="utf-8"))


@cache
def _server() -> socket.socket:
    ours, its = socket.socketpair()
    command = [sys.executable, "-W", "error::RuntimeWarning", __file__, str(its.fileno())]
    # in a session of its own: Ctrl-C at the terminal is for pytest, which ends it
    running = subprocess.Popen(command, pass_fds=[its.fileno()], start_new_session=True)
    its.close()

    def end() -> None:
        ours.close()
        running.wait()

    atexit.register(end)
    return ours


def _line() -> str:
    line = b""
    while not line.endswith(b"\n"):
        part = _server().recv(1)
        assert part, "the process that forks has ended"
        line += part
    return line.decode()


def _serve(asking: socket.socket) -> None:
    for name in USED:
        import_module(name)
    gc.collect()
    gc.freeze()  # no fork searches, and thereby copies, what was imported
    while True:
        text, fds, _, _ = socket.recv_fds(asking, 1 << 16, 2)
        while text and not text.endswith(b"\n"):
            text += asking.recv(1 << 16)
        if not text:
            return
        child = os.fork()
        if not child:
            _run(json.loads(text), fds)
        for fd in fds:
            os.close(fd)
        asking.sendall(f"{child}\n".encode())
        asking.sendall(f"{os.waitpid(child, 0)[1]}\n".encode())


def _run(asked: dict[str, object], fds: list[int]) -> None:
    status = 1
    try:
        for fd, its in zip(fds, (1, 2), strict=True):
            os.dup2(fd, its)
            os.close(fd)
        sys.stdout = os.fdopen(1, "w", encoding="utf-8")
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1)
        os.chdir(str(asked["folder"]))
        os.environ.clear()
        os.environ.update(asked["environment"])  # type: ignore[arg-type] # JSON
        from mwtool.cli import main

        exec(str(asked["before"]), {})
        sys.argv = ["mwtool", *asked["arguments"]]  # type: ignore[misc] # JSON
        main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 # the fork must end here, whatever it is
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as asking:
        _serve(asking)
