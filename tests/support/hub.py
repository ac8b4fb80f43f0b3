"""A Hub on this machine: the few requests that finding and fetching a model makes, and a record of them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any, BinaryIO, Literal
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


Mood = Literal["drop", "short", "none", "long", "ignore", "etag", "size", "shift", "slow"] | int
"""How a range is not what it should be; a number is a status."""


@dataclass
class Hub:
    """Repositories by id, each a folder of files; `gated` ones give their names but no content."""

    repos: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    revisions: tuple[str, ...] = ("main", COMMIT, "v1")
    endpoint: str = ""
    sent: list[str] = field(default_factory=list)
    """Files whose content was sent, in order."""
    failing: dict[str, list[int]] = field(default_factory=dict)
    """Statuses that requests for a file (`info`: for a repository) get instead of an answer, in order, each once."""
    everything: tuple[int, dict[str, str], bytes] | None = None
    """What every request gets: a portal before a network, a server that is down."""
    listed: list[dict[str, object]] = field(default_factory=list)
    """Further files a repository says it has."""
    parts: list[tuple[str, int, int]] = field(default_factory=list)
    """File, first byte and the one behind the last, of each range that was asked for, in order."""
    moods: list[Mood] = field(default_factory=list)
    """What becomes of requests for ranges, in order, each once; afterwards they are answered well."""
    elsewhere: str | None = None
    """Where requests for weights are redirected to: another host, as a CDN."""
    delay: float = 0.0
    """Seconds before each range is answered."""
    rate: float | None = None
    """Bytes a second of each range's body; as fast as can be where it is None."""
    tokens: list[str] = field(default_factory=list)
    """Every Authorization header that arrived."""
    versions: dict[str, tuple[str, Path]] = field(default_factory=dict)
    """Revision -> its commit and folder, for those that differ from the repository's own."""

    at_once: int = 0
    most_at_once: int = 0
    """Requests for ranges that wait for their answer, and the most that ever did."""
    _counting: Lock = field(default_factory=Lock)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """While a request for a range waits for its answer."""
        with self._counting:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            yield
        finally:
            with self._counting:
                self.at_once -= 1

    def part(
        self, path: str, wanted: str, answer: tuple[int, dict[str, str], bytes]
    ) -> tuple[int, dict[str, str], bytes, int]:
        """The answer to a request for a range, and how much of its body is sent before the connection drops."""
        status, headers, content = answer
        first, last = (int(one) for one in wanted.removeprefix("bytes=").split("-"))
        self.parts.append((path.rpartition("/")[2], first, last + 1))
        mood = self.moods.pop(0) if self.moods else None
        if isinstance(mood, int):
            return mood, {"Retry-After": "7"} if mood == 429 else {}, b"", 0
        if mood == "slow":
            Event().wait(0.5)
        if mood == "ignore":
            return status, headers, content, len(content)
        end = {"short": (first + last + 1) // 2, "none": first}.get(str(mood), last + 1)
        body, size = content[first:end] + b"more" * (mood == "long"), len(content) + (mood == "size")
        headers = {**headers, "Content-Range": f"bytes {first + (mood == 'shift')}-{last}/{size}"}
        if mood == "etag":
            headers["ETag"] = '"another"'
        return 206, headers, body, len(body) // 2 if mood == "drop" else len(body)

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body for a request."""
        return self._answer(path) if self.everything is None else self.everything

    def _answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = unquote(urlsplit(path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        if len(parts) < 4:  # of the client's own concerns this Hub knows nothing
            return 404, {}, b""
        repo, (verb, revision, *rest) = "/".join(parts[:2]), parts[2:]
        if statuses := self.failing.get("info" if api else parts[-1], []):
            return statuses.pop(0), {}, b""
        if repo not in self.repos:
            return _refusal(404, "RepoNotFound", "Repository not found")
        versions = {**dict(self.versions.values()), **{name: folder for name, (_, folder) in self.versions.items()}}
        if revision not in self.revisions and revision not in versions:
            return _refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        folder = versions.get(revision, self.repos[repo])
        commit = next((commit for commit, one in self.versions.values() if one == folder), COMMIT)
        if api:
            return (
                200,
                {"Content-Type": "application/json"},
                json.dumps(self._about(repo, verb, folder, commit)).encode(),
            )
        return self._file(repo, "/".join(rest), folder, commit)

    def _about(self, repo: str, verb: str, folder: Path, commit: str) -> object:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if verb == "tree":
            found = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40} for p in files]
            return [*found, *self.listed]
        named = [{"rfilename": path.name} for path in files] + [{"rfilename": one["path"]} for one in self.listed]
        return {"id": repo, "sha": commit, "private": False, "siblings": named}

    def _file(self, repo: str, name: str, folder: Path, commit: str) -> tuple[int, dict[str, str], bytes]:
        if repo in self.gated:
            return _refusal(403, "GatedRepo", f"Access to model {repo} is restricted")
        path = folder / name
        if len(name) > 255 or not path.is_file():  # more is no file name here
            return _refusal(404, "EntryNotFound", "Entry not found")
        state = path.stat()
        content, etag = _content(path, state.st_mtime_ns, state.st_size)
        if self.elsewhere is not None and path.suffix == ".safetensors":
            there = {"Location": f"{self.elsewhere}/{repo}/resolve/{commit}/{name}", "X-Linked-Size": str(len(content))}
            return 302, {**there, "X-Linked-ETag": f'"{etag}"', "X-Repo-Commit": commit}, b""
        return 200, {"ETag": f'"{etag}"', "X-Repo-Commit": commit}, content


def _send(out: BinaryIO, content: bytes, rate: float | None) -> None:
    """Send so many bytes a second; all at once where no rate is given."""
    step = max(1, len(content) if rate is None else int(rate / 50))
    for at in range(0, len(content), step):
        if at:
            Event().wait(0.02)
        out.write(content[at : at + step])


@lru_cache(maxsize=16)
def _content(path: Path, _changed: int, _size: int) -> tuple[bytes, str]:
    """A file and its hash, which would take longer than to answer."""
    content = path.read_bytes()
    return content, hashlib.sha1(content).hexdigest()


def _refusal(status: int, code: str, message: str) -> tuple[int, dict[str, str], bytes]:
    return status, {"X-Error-Code": code, "X-Error-Message": message}, b""


def use(endpoint: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_HOME do, after huggingface_hub was imported."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(cache.with_name(f"{cache.name}-assets")))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


@contextmanager
def serving() -> Iterator[Hub]:
    """A Hub that answers at `endpoint` inside the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits 40 ms between its headers and its body

        def do_GET(self) -> None:
            self._respond(body=True)

        def do_HEAD(self) -> None:
            self._respond(body=False)

        def _respond(self, *, body: bool) -> None:
            status, headers, content = hub.answer(self.path)
            hub.tokens += self.headers.get_all("Authorization", [])
            sent = len(content)
            if body and status == 200 and "Range" in self.headers:
                with hub.counted():
                    Event().wait(hub.delay)
                    status, headers, content, sent = hub.part(
                        self.path, self.headers["Range"], (status, headers, content)
                    )
            if body and status == 200 and "/resolve/" in self.path:
                hub.sent.append(self.path.rpartition("/")[2])
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if body:
                _send(self.wfile, content[:sent], hub.rate if status == 206 else None)
                self.close_connection = self.close_connection or sent < len(content)

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    with _Server(("127.0.0.1", 0), Handler) as server:
        hub.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
            assert server.faults == []


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # connections kept alive end with the test

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.faults: list[BaseException | None] = []

    def handle_error(self, *_: object) -> None:
        """Nothing on stderr, which belongs to the command."""
        fault = sys.exception()
        if not isinstance(fault, ConnectionError):  # the client left
            self.faults.append(fault)
