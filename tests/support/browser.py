"""A headless Chromium, driven over a pipe by the DevTools protocol: what a page looks like, says and asks for."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LAUNCH = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
"""The protocol's pipes are file descriptors 3 and 4 of the browser."""
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-sandbox",  # containers and root have none; the pages are our own
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
)


def chromium() -> str | None:
    """The browser's program: what CHROMIUM names, or the first of the usual names; None where there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@dataclass(slots=True)
class Browser:
    """The pipes to a browser with one page, and the events it has reported."""

    to: BinaryIO
    back: BinaryIO
    session: str | None = None
    number: int = 0
    rest: bytes = b""
    events: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command of the protocol."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        self.to.write(json.dumps(message).encode() + b"\0")
        self.to.flush()
        while (answer := self._next()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, path: Path, *, width: int, scheme: str = "light", media: str = "screen", height: int = 900) -> None:
        """Load a file in a window of this width and colour scheme, and wait until all of it is there."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(one.get("method") == "Page.loadEventFired" for one in self.events):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        """What an expression of JavaScript gives, evaluated in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def reported(self, *methods: str) -> list[dict[str, Any]]:
        """The parameters of the events of these kinds, since the page was opened."""
        return [one["params"] for one in self.events if one.get("method") in methods]

    def picture(self, path: Path) -> None:
        """Write the whole page as a PNG file."""
        taken = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(taken["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            read = os.read(self.back.fileno(), 1 << 16)
            assert read, "the browser has ended"
            self.rest += read
        message, _, self.rest = self.rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found


@contextmanager
def browsing(program: str, profile: Path) -> Iterator[Browser]:
    """A browser with an empty page. profile: a folder of its own for what it keeps."""
    (its_in, to), (back, its_out) = os.pipe(), os.pipe()
    flags = [*FLAGS, f"--user-data-dir={profile}"]
    command = [sys.executable, "-c", LAUNCH, str(its_in), str(its_out), program, *flags, "about:blank"]
    with subprocess.Popen(command, pass_fds=(its_in, its_out), stderr=subprocess.DEVNULL) as process:
        os.close(its_in)
        os.close(its_out)
        with os.fdopen(to, "wb") as writing, os.fdopen(back, "rb") as reading:
            browser = Browser(writing, reading)
            target = browser.call("Target.createTarget", url="about:blank")["targetId"]
            browser.session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            for domain in ("Page", "Runtime", "Log", "Network"):
                browser.call(f"{domain}.enable")
            try:
                yield browser
            finally:
                process.terminate()
