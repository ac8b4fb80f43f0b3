"""The texts perplexity is measured on: the bundled one, a file, or one of three datasets of the Hub."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from mwtool.errors import BadValue
from mwtool.evaluation.config import Protocol
from mwtool.evaluation.tasks import read_rows
from mwtool.evaluation.windows import Text
from mwtool.files.hub_dataset import load_from_hub
from mwtool.files.text import read_text
from mwtool.models.source import DEMO

DATASETS = ("wikitext2", "c4", "pg19")


def default_protocol(target: str) -> Protocol:
    """The paper's for the paper's datasets; bos in front of every window for any other text."""
    return "sun-4096" if target in DATASETS else "bos"


def text_for(target: str) -> Text:
    """The text of `ppl:TARGET`. Raises BadValue for a bad file, ModelNotFound where a dataset cannot be had."""
    if target == "demo":
        return Text((read_text(DEMO / "heldout.txt"),))
    if target in DATASETS:
        return {"wikitext2": _wikitext2, "c4": _c4, "pg19": _pg19}[target]()
    path = Path(target)
    if path.suffix != ".jsonl":
        return Text((read_text(path),))
    documents = []
    for where, row in read_rows(path):
        if not isinstance(row.get("text"), str):
            raise BadValue(f"{where}: has no text under the key text; expected rows of text, or a plain file")
        documents.append(row["text"])
    return Text(tuple(documents))


def _wikitext2() -> Text:
    rows = _dataset("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    return Text(tuple(row["text"] for row in rows))


def _c4() -> Text:
    rows = _dataset("c4", "NeelNanda/c4-10k", split="train")
    return Text(tuple(row["text"] for row in islice(rows, 5000)), joiner=" ", special=True, most=100)


def _pg19() -> Text:
    rows = _dataset("pg19", "emozilla/pg19", split="validation")
    return Text(tuple(row["text"] for row in islice(rows, 5)), joiner=" ", special=True, most=100)


def _dataset(name: str, *place: str, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadValue(
            f"ppl:{name} needs the datasets library; install it with pip install 'mwtool[eval]', or use ppl:FILE"
        ) from None
    what = f"ppl:{name}: the dataset {place[0]}"
    return load_from_hub(what, lambda: load_dataset(*place, split=split), "ppl:FILE measures a local one")
