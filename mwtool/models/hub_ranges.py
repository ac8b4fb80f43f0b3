"""Read byte ranges of a file on the Hub: of one commit, and never of two versions of the file.

Requests go through huggingface_hub's own client, with its headers, timeouts and attempts. Its client leaves the token
out of what it sends to another host than the Hub's, such as the CDN to which the Hub redirects.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from typing import Any, BinaryIO

from mwtool.errors import BadCheckpoint, ModelNotFound, OutputError, line_of
from mwtool.models.hub import asking, status_of

ATTEMPTS = 5
"""How often a range is asked for again while none of its bytes arrive."""
PAUSE = 1.0
"""Seconds before what broke off is gone on with."""


class NoRanges(ModelNotFound):
    """The server does not give parts of this file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file of a Hub repository at a commit.

    etag: what the Hub calls this version of the content. size: in bytes.
    elsewhere: host -> the ETag that this other host gave first; it has to stay the same, too.
    """

    repo: str
    file: str
    revision: str
    etag: str
    size: int
    elsewhere: dict[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What error messages call it."""
        return f"{self.file} of {self.repo} at revision {self.revision}"


def remote_file(repo: str, file: str, revision: str) -> RemoteFile | None:
    """Ask the Hub for a file's version and size; None if the repository does not have it.

    Raises ModelNotFound where the Hub refuses, NoRanges where it does not say what ranges have to be checked against.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    def ask() -> Any:
        try:
            return get_hf_file_metadata(hf_hub_url(repo, file, revision=revision))
        except LocalEntryNotFoundError:
            raise
        except RemoteEntryNotFoundError:
            return None

    found = asking(repo, revision, ask)
    if found is None:
        return None
    if found.etag is None or found.size is None or found.commit_hash not in (None, revision):
        raise NoRanges(f"the Hub does not state version and size of {file} of {repo}; use --download whole")
    return RemoteFile(repo=repo, file=file, revision=revision, etag=found.etag, size=found.size)


OnBytes = Callable[[int], None]
"""Called with how many bytes have arrived since it was called last."""


def read_range(remote: RemoteFile, begin: int, end: int, out: BinaryIO, on_bytes: OnBytes | None = None) -> None:
    """Append the bytes from `begin` up to `end` to a file; what breaks off is gone on with.

    Raises ModelNotFound where the Hub refuses or stays silent, NoRanges where a server does not give parts,
    BadCheckpoint where the file is not the one that `remote` was, OutputError where `out` takes no more.
    """
    left = ATTEMPTS
    while begin < end:
        if on_bytes is not None:
            on_bytes(0)  # which raises where nobody waits any more
        at = out.tell()
        fault = asking(remote.repo, remote.revision, partial(_attempt, remote, begin, end, out, on_bytes))
        received = out.tell() - at
        begin, left = begin + received, ATTEMPTS if received else left - 1
        if begin < end and left == 0:
            why = "no more bytes arrive" if fault is None else line_of(fault)
            raise ModelNotFound(
                f"{remote.name} cannot be read on from byte {begin:,}: {why}; the same command goes on from there"
            ) from fault
        if begin < end:
            time.sleep(PAUSE)


def _attempt(remote: RemoteFile, begin: int, end: int, out: BinaryIO, on_bytes: OnBytes | None) -> Exception | None:
    """One request; returns what broke the connection, if it was that."""
    from huggingface_hub.errors import HTTPError

    try:
        _receive(remote, begin, end, out, on_bytes)
    except HTTPError as broken:
        if status_of(broken) is not None:
            raise
        return broken
    return None


def _receive(remote: RemoteFile, begin: int, end: int, out: BinaryIO, on_bytes: OnBytes | None) -> None:
    """Write what one request brings, which may be less than was asked for and is never more."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    headers = {**build_hf_headers(), "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    with http_stream_backoff(
        "GET",
        hf_hub_url(remote.repo, remote.file, revision=remote.revision),
        headers=headers,
        timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        retry_on_exceptions=(),  # the client would send the body anew, from its beginning; `read_range` goes on
    ) as response:
        hf_raise_for_status(response)
        _check_version(remote, response)
        _check_range(remote, response, begin, end)
        room = end - begin
        for chunk in response.iter_bytes():  # as they arrive: what waited to fill a chunk would be lost
            room -= len(chunk)
            if room < 0:
                raise BadCheckpoint(f"{remote.name} came with more bytes than were asked for; use --download whole")
            _write(out, chunk)
            if on_bytes is not None:
                on_bytes(len(chunk))


def _write(out: BinaryIO, chunk: bytes) -> None:
    try:
        out.write(chunk)
    except OSError as fault:
        raise OutputError(f"{out.name} cannot be written: {fault.strerror}; make room, or move HF_HOME") from fault


def _check_version(remote: RemoteFile, response: Any) -> None:
    """Raise BadCheckpoint unless this is of the version of the file that `remote` is."""
    for one in (*response.history, response):
        linked, commit = one.headers.get("X-Linked-ETag"), one.headers.get("X-Repo-Commit")
        if linked is not None and _plain(linked) != remote.etag:
            raise _changed(remote, _plain(linked))
        if commit not in (None, remote.revision):
            raise _changed(remote, commit)
    own = response.headers.get("ETag")
    if response.history:  # another host may call the same content otherwise, and has to go on calling it so
        if own is not None and remote.elsewhere.setdefault(response.url.host, own) != own:
            raise _changed(remote, own)
    elif _plain(response.headers.get("X-Linked-ETag") or own or "") != remote.etag:
        raise _changed(remote, own or "without an ETag")


def _check_range(remote: RemoteFile, response: Any, begin: int, end: int) -> None:
    """Raise unless these are the bytes asked for."""
    if response.status_code == HTTPStatus.OK and (begin, end) == (0, remote.size):
        return
    if response.status_code != HTTPStatus.PARTIAL_CONTENT:
        raise NoRanges(
            f"{response.url.host} does not give parts of {remote.file} (it answered {response.status_code} to a "
            f"request for a range); use --download whole"
        )
    given = response.headers.get("Content-Range", "nothing")
    stated = re.fullmatch(r"bytes (\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", given, flags=re.ASCII)
    if stated is None or int(stated[1]) != begin or int(stated[2]) >= end:
        raise BadCheckpoint(f"{remote.name}: bytes {begin}-{end - 1} were asked for, the answer says {given!r}")
    if stated[3] not in ("*", str(remote.size)):
        raise _changed(remote, f"{stated[3]} bytes")


def _plain(etag: str) -> str:
    return etag.removeprefix("W/").strip('"')


def _changed(remote: RemoteFile, now: str) -> BadCheckpoint:
    return BadCheckpoint(
        f"{remote.name} changed while it was read: it was {remote.etag} ({remote.size:,} bytes) and is {now}; "
        f"use --download whole"
    )
