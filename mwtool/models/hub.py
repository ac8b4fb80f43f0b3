"""Download files from the Hub when they are needed, with every failure reported in one line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from threading import Lock
from typing import TypeVar

from mwtool.errors import ModelNotFound, line_of

T = TypeVar("T")


def fetch_small(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Download the files that match these patterns; the folder is named after the commit. Raises ModelNotFound."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # a dozen small files; the weights show their own progress
    found = asking(repo, revision, lambda: snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    return Path(found)


def fetch(repo: str, file: str, revision: str | None) -> Path | None:
    """Download one file; None if the repository does not have it. Raises ModelNotFound."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
    from huggingface_hub.utils import enable_progress_bars

    def download() -> str | None:
        try:
            return hf_hub_download(repo, file, revision=revision)
        except LocalEntryNotFoundError:  # the Hub cannot be reached, which does not mean that there is no such file
            raise
        except RemoteEntryNotFoundError:
            return None

    enable_progress_bars()
    path = asking(repo, revision, download)
    return None if path is None else Path(path)


def holds(repo: str, file: str, revision: str | None) -> bool:
    """Whether a repository has this file, without fetching it; offline, whether the cache has. Raises ModelNotFound."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repo, file, revision=revision), str):
        return True
    if constants.is_offline_mode():
        return False
    return asking(repo, revision, lambda: HfApi().file_exists(repo, file, revision=revision))


def files_of(repo: str, revision: str | None, folder: Path) -> list[str]:
    """The paths of a repository's files; of those in the cache, `folder`, where the Hub cannot be asked."""
    from huggingface_hub import HfApi, constants

    if constants.is_offline_mode():
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return asking(repo, revision, lambda: HfApi().list_repo_files(repo, revision=revision))


WAITS = (2.0,)
"""Seconds before what failed with a status of `PASSING` is asked for again, after the client's own attempts."""
PASSING = (500, 502, 503, 504)
FOREIGN = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError, AssertionError, OSError)
"""What huggingface_hub raises, beside its own errors, over answers that are not those of a Hub."""


def asking(repo: str, revision: str | None, ask: Callable[[], T]) -> T:
    """Call the Hub, once more where it fails for a moment, and turn its errors into one line. Raises ModelNotFound."""
    from huggingface_hub import constants, errors

    at = f" at revision {revision}" if revision else ""
    try:
        with _silent():
            return _repeated(ask)
    except errors.GatedRepoError as fault:
        raise ModelNotFound(
            f"{repo} is gated: accept its terms at {constants.ENDPOINT}/{repo}, then log in with `hf auth login`"
        ) from fault
    except errors.RevisionNotFoundError as fault:
        raise ModelNotFound(f"{repo} has no revision {revision!r}") from fault
    except errors.RepositoryNotFoundError as fault:
        raise ModelNotFound(
            f"{repo} is neither a local folder nor a repository on {constants.ENDPOINT} "
            f"(if it is private: `hf auth login`)"
        ) from fault
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as fault:
        status = status_of(fault)
        why = f"{constants.ENDPOINT} cannot be reached" if status is None else _refusal(status)
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else why
        here = "" if "/" in repo else f"there is no folder {repo} here, "
        raise ModelNotFound(
            f"{here}{why} and {repo}{at} is not in the cache; "
            f"give a local folder instead, such as one made by `hf download {repo} --local-dir DIR`"
        ) from fault
    except errors.HTTPError as fault:
        status = status_of(fault)
        why = f"{constants.ENDPOINT} failed: {line_of(fault)}" if status is None else _refusal(status)
        raise ModelNotFound(f"{repo}{at} could not be fetched: {why}") from fault
    except json.JSONDecodeError as fault:
        raise ModelNotFound(
            f"{repo}{at} could not be fetched: {constants.ENDPOINT} answered with something else than JSON; a proxy or "
            f"the login page of a network may be in the way"
        ) from fault
    except FOREIGN as fault:
        raise ModelNotFound(
            f"{repo}{at} could not be fetched: {constants.ENDPOINT} gave an answer that huggingface_hub does not "
            f"accept ({type(fault).__name__}: {line_of(fault)})"
        ) from fault


def _repeated(ask: Callable[[], T]) -> T:
    from huggingface_hub.errors import HTTPError

    for wait in WAITS:
        try:
            return ask()
        except (OSError, HTTPError) as fault:
            if status_of(fault) not in PASSING:
                raise
            time.sleep(wait)
    return ask()


@contextmanager
def _silent() -> Iterator[None]:
    """Without the client's warnings about each attempt; the outcome is reported in one line. For several threads."""
    import logging as levels

    from huggingface_hub.utils import logging

    with _counting:
        if not _asking:
            _before[:] = [logging.get_verbosity()]
            logging.set_verbosity(levels.ERROR)
        _asking.append(None)
    try:
        yield
    finally:
        with _counting:
            _asking.pop()
            if not _asking:
                logging.set_verbosity(_before[0])


_counting, _asking, _before = Lock(), list[None](), list[int]()
"""How many calls are under way, and the level of the client's log before the first of them."""


def status_of(fault: BaseException) -> int | None:
    """The HTTP status behind an exception, which may be that of an exception it was raised for."""
    seen: set[int] = set()
    one: BaseException | None = fault
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        status = getattr(getattr(one, "response", None), "status_code", None)
        if isinstance(status, int) and status >= HTTPStatus.BAD_REQUEST:
            return status
        one = one.__cause__ or one.__context__
    return None


def _refusal(status: int) -> str:
    """What the Hub's status means and what to do."""
    from huggingface_hub import constants

    known = {one.value for one in HTTPStatus}
    named = f"{constants.ENDPOINT} answered {status}{f' {HTTPStatus(status).phrase}' if status in known else ''}"
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return f"{named} (log in with `hf auth login` as someone who has access)"
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return f"{named} (wait a few minutes; the limit is higher after `hf auth login`)"
    return f"{named} (try again later)" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else named
