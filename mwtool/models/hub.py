"""Files of a repository on the Hub, fetched when they are needed, and its refusals in one line each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from mwtool.errors import ModelNotFound, line_of

T = TypeVar("T")


def fetch_small(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder with a repository's files of these patterns, named for the commit. Raises ModelNotFound."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # a dozen small files; the weights show their own progress
    found = _asking(repo, revision, lambda: snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    return Path(found)


def fetch(repo: str, file: str, revision: str | None) -> Path | None:
    """One file; None where the repository has no such file. Raises ModelNotFound."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
    from huggingface_hub.utils import enable_progress_bars

    def download() -> str | None:
        try:
            return hf_hub_download(repo, file, revision=revision)
        except LocalEntryNotFoundError:  # the Hub could not be asked: not the same as "no such file"
            raise
        except RemoteEntryNotFoundError:
            return None

    enable_progress_bars()
    path = _asking(repo, revision, download)
    return None if path is None else Path(path)


def holds(repo: str, file: str, revision: str | None) -> bool:
    """Whether a repository has this file, without fetching it; offline, whether the cache has. Raises ModelNotFound."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(repo, file, revision=revision), str):
        return True
    if constants.is_offline_mode():
        return False
    return _asking(repo, revision, lambda: HfApi().file_exists(repo, file, revision=revision))


def _asking(repo: str, revision: str | None, ask: Callable[[], T]) -> T:
    """Call the Hub and turn its refusals into one line each."""
    from huggingface_hub import constants, errors
    from huggingface_hub.errors import HTTPError  # the HTTP client's own base class, whichever client the Hub uses

    at = f" at revision {revision}" if revision else ""
    try:
        return ask()
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
        why = "HF_HUB_OFFLINE is set" if constants.is_offline_mode() else f"{constants.ENDPOINT} cannot be reached"
        here = "" if "/" in repo else f"there is no folder {repo} here, "
        raise ModelNotFound(
            f"{here}{why} and {repo}{at} is not in the cache; "
            f"give a local folder instead, such as one made by `hf download {repo} --local-dir DIR`"
        ) from fault
    except HTTPError as fault:
        raise ModelNotFound(f"{constants.ENDPOINT} failed to give {repo}{at}: {line_of(fault)}") from fault
