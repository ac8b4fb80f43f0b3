"""The texts that a scan is given: words on the command line, a file, or the bundled text."""

from __future__ import annotations

from pathlib import Path

from mwtool.errors import BadValue
from mwtool.files.text import read_text
from mwtool.models.source import DEMO


def bundled_or_file(name: str) -> str:
    """The bundled text for `demo`, else that of a file. Raises BadValue."""
    return read_text(DEMO / "heldout.txt" if name == "demo" else Path(name))


def text_or_file(given: str) -> str:
    """A file's text, or the words themselves where they name no file. Raises BadValue for a file that is absent."""
    if " " in given.strip() or not (Path(given).suffix or "/" in given or Path(given).exists()):
        if not given.strip():
            raise BadValue("--positions is given no text; expected some words, or a file")
        return given
    return read_text(Path(given))
