"""Questions and cloze texts of the 40 words, in the files that `mc:` and `cloze:` read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from words import WORDS

from mwtool.evaluation.tasks import Task


def words(start: int, count: int) -> str:
    return " ".join(WORDS[(start * 11 + 5 * at * at) % 40] for at in range(count))


CHOICES = [
    {"query": words(n, 3 + n % 4), "choices": [words(n + 7 * c, 1 + (n + c) % 3) for c in range(3)], "gold": n % 3}
    for n in range(11)
]
OPTIONS = [
    {"context_options": [words(n, 4), words(n + 3, 5)], "continuation": words(n + 5, 2), "gold": n % 2}
    for n in range(5)
]
CLOZE = [{"context": words(n, 5), "continuation": words(n + 2, 1)} for n in range(9)]


def rows(folder: Path, kind: str, found: list[dict[str, Any]]) -> Task:
    (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return Task(kind, str(folder / f"{kind}.jsonl"))  # type: ignore[arg-type]
