"""Upload results to the Hub with its own client: the repository is made first, files follow when the work is done."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Literal

from mwtool.errors import BadValue, OutputError, line_of

Kind = Literal["model", "dataset"]


@dataclass(frozen=True, slots=True)
class Destination:
    """A repository on the Hub that can be written to. repo: its whole name, with the owner."""

    repo: str
    kind: Kind
    url: str


def open_destination(repo: str, kind: Kind, *, private: bool = False) -> Destination:
    """Make the repository, or find that it is there, before any work is done that would end with an upload.

    Args:
        repo: `OWNER/NAME`, or `NAME` of whom the token belongs to.
        kind: adapters are models, documents are datasets.
        private: make it private; one that exists stays as it is.

    Returns:
        Where to upload to.

    Raises:
        BadValue: the name is none of the Hub's, or the Hub is switched off.
        OutputError: the Hub refuses or cannot be reached, or there is no token.

    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as fault:
        raise BadValue(f"--push-to-hub {repo!r} is no name of a repository: {line_of(fault)}") from fault
    if constants.is_offline_mode():
        raise BadValue("--push-to-hub needs the Hub, and HF_HUB_OFFLINE is set; unset it, or leave out --push-to-hub")
    with _refused(repo):
        made = HfApi().create_repo(repo, repo_type=kind, private=private or None, exist_ok=True)
    return Destination(made.repo_id, kind, str(made))


def upload_files(destination: Destination, files: Mapping[str, str], message: str) -> None:
    """Write these files, name in the repository -> text, in one commit. Raises OutputError."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        upload_folder(destination, Path(folder), tuple(files), message)


def upload_folder(destination: Destination, folder: Path, patterns: Sequence[str], message: str) -> None:
    """Write the files of a folder that match these patterns in one commit. Raises OutputError."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    with _refused(destination.repo):
        HfApi().upload_folder(
            repo_id=destination.repo,
            repo_type=destination.kind,
            folder_path=folder,
            allow_patterns=list(patterns),
            commit_message=message,
        )


@contextmanager
def _refused(repo: str) -> Iterator[None]:
    """What the client raises, as one line."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError as fault:
        raise OutputError(f"{repo} cannot be written: there is no token; log in with `hf auth login`") from fault
    except HfHubHTTPError as fault:
        status = fault.response.status_code
        advice = ""
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            advice = "; log in with `hf auth login`, with a token that may write there"
        raise OutputError(f"{repo} cannot be written: {line_of(fault)}{advice}") from fault
    except (HTTPError, OSError, ValueError) as fault:  # no connection; a card that the Hub refuses
        raise OutputError(f"{repo} on {constants.ENDPOINT} cannot be written: {line_of(fault)}") from fault
