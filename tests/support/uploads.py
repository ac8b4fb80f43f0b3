"""A Hub that is written to, on 127.0.0.1: repositories are made and files committed, as huggingface_hub asks for it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Uploads:
    """made: repositories, `type/owner/name` -> whether private. files: path in `type/owner/name` -> bytes.

    refusing: the status to refuse all writes with. paths: every path that was asked for.
    """

    endpoint = ""

    def __init__(self) -> None:
        self.made: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.refusing: int | None = None
        self.paths: list[str] = []

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        path = path.partition("?")[0]
        self.paths.append(path)
        if self.refusing is not None:
            return self.refusing, {"error": "You have no rights here"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            kind = asked.get("type") or "model"
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            private = bool(asked.get("private") or asked.get("visibility") == "private")
            self.made.setdefault(f"{kind}s/{name}", private)
            prefix = "" if kind == "model" else f"{kind}s/"
            return 200, {"url": f"{self.endpoint}/{prefix}{name}", "name": name, "id": name}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        repo, _, verb = path.removeprefix("/api/").partition("/preupload/")
        if verb:
            files = [{**one, "uploadMode": "regular", "shouldIgnore": False} for one in json.loads(body)["files"]]
            return 200, {"files": [{key: one[key] for key in ("path", "uploadMode", "shouldIgnore")} for one in files]}
        repo, _, verb = path.removeprefix("/api/").partition("/commit/")
        if verb:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[f"{repo}/{line['value']['path']}"] = base64.b64decode(line["value"]["content"])
            return 200, {"commitUrl": f"{self.endpoint}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40}
        return 200, {"id": repo.removeprefix("models/").removeprefix("datasets/"), "siblings": [], "sha": "0" * 40}


@contextmanager
def receiving() -> Iterator[Uploads]:
    """Such a Hub, which answers at `endpoint` inside the block."""
    uploads = Uploads()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._respond()

        def do_POST(self) -> None:
            self._respond()

        def _respond(self) -> None:
            body = self._body()
            status, found = uploads.answer(self.path, body)
            content = json.dumps(found).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True  # connections kept alive end with the test
        uploads.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever)
        thread.start()
        try:
            yield uploads
        finally:
            server.shutdown()
            thread.join()
