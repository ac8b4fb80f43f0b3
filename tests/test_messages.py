"""The messages that docs/troubleshooting.md explains are messages that the code has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
EXPLAINED = [
    message for heading in re.findall("^### .*", PAGE, re.MULTILINE) for message in re.findall("`(.+?)`", heading)
]


def texts(path: Path) -> Iterator[str]:
    """Every string of a file, with a placeholder for what an f-string inserts."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


TEXTS = [text for path in sorted((ROOT / "mwtool").rglob("*.py")) for text in texts(path)]


@pytest.mark.parametrize("message", EXPLAINED)
def test_a_message_that_is_explained_exists(message: str) -> None:
    pattern = ".*".join(re.escape(part.strip()) for part in message.split("…"))
    assert [text for text in TEXTS if re.search(pattern, text, re.DOTALL)] != []


def test_messages_are_explained_and_an_invented_one_would_be_noticed() -> None:
    assert len(EXPLAINED) > 20
    assert not [text for text in TEXTS if "the flux capacitor of" in text]
