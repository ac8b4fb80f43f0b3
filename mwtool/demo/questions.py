"""Make the bundled questions from the bundled text.

    python -m mwtool.demo.questions

`mc.jsonl`: the beginning of a paragraph, its next sentence, and three sentences of other paragraphs about as long.
`cloze.jsonl`: the text up to a long word that was there before, and that word. Both are drawn with a fixed seed, so
that the same text gives the same files.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
SEED, QUESTIONS, WRONG = 0, 200, 3
SENTENCE = re.compile(r"(?<=[a-z][.!?])\s+(?=[A-Z])")
FEWEST, MOST = 5, 25
"""Words of an ending."""
BEFORE, LONG = 60, 6
"""Words of a context, at most; of a question a quarter at least; letters of a long word."""


def main() -> None:
    """Write both files."""
    text = (HERE / "heldout.txt").read_text(encoding="utf-8")
    for name, rows in (("mc", choices(text)), ("cloze", cloze(text))):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (HERE / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def choices(text: str) -> list[dict[str, object]]:
    """Rows of `query`, `choices` and `gold`."""
    source, found = random.Random(SEED), list(continued(text))  # noqa: S311 # it keeps no secret
    rows = []
    for at in sorted(source.sample(range(len(found)), QUESTIONS)):
        context, ending = found[at]
        others = [other for place, (_, other) in enumerate(found) if place != at and other != ending]
        others.sort(key=lambda other: abs(len(other) - len(ending)))
        several = [ending, *source.sample(others[: 5 * WRONG], WRONG)]
        source.shuffle(several)
        rows.append({"query": context, "choices": several, "gold": several.index(ending)})
    return rows


def continued(text: str) -> Iterator[tuple[str, str]]:
    """From each paragraph that has one, a beginning and the sentence that follows it."""
    for paragraph in text.split("\n\n"):
        sentences = SENTENCE.split(paragraph.strip())
        for at in range(1, len(sentences)):
            context, words = " ".join(sentences[:at]).split(), sentences[at].split()
            if len(context) >= BEFORE // 4 and FEWEST <= len(words) <= MOST and '"' not in sentences[at]:
                yield " ".join(context[-BEFORE:]), sentences[at]
                break


def cloze(text: str) -> list[dict[str, str]]:
    """Rows of `context` and `continuation`."""
    words = text.split()
    last = [at for at in range(BEFORE, len(words)) if repeated(words, at)]
    source = random.Random(SEED)  # noqa: S311 # it keeps no secret
    picked = sorted(source.sample(last, QUESTIONS))
    return [{"context": " ".join(words[at - BEFORE : at]), "continuation": words[at]} for at in picked]


def repeated(words: list[str], at: int) -> bool:
    """Whether this word is long and stands among those before it."""
    return words[at].isalpha() and len(words[at]) >= LONG and words[at] in words[at - BEFORE : at]


if __name__ == "__main__":
    main()
