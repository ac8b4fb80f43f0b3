"""Download files from the Hub when they are needed, with every failure reported in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from mwtool.errors import ModelNotFound, line_of

T = TypeVar("T")


def fetch_small(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Download the files that match these patterns; the folder is named after the commit. Raises ModelNotFound."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # a dozen small files; the weights show their own progress
    found = _asking(repo, revision, lambda: snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
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
    path = _asking(repo, revision, download)
    return None if path is None else Path(path)


def files_of(repo: str, revision: str | None, folder: Path) -> list[str]:
    """The paths of a repository's files; of those in the cache, `folder`, where the Hub cannot be asked."""
    from huggingface_hub import HfApi, constants

    if constants.is_offline_mode():
        return [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    return _asking(repo, revision, lambda: HfApi().list_repo_files(repo, revision=revision))


def _asking(repo: str, revision: str | None, ask: Callable[[], T]) -> T:
    """Call the Hub and turn its errors into one-line messages."""
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
