"""The texts on which perplexity is measured: the bundled text, a file, or one of three datasets on the Hub."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from mwtool.errors import BadValue
from mwtool.evaluation.tasks import read_records
from mwtool.evaluation.windows import Text
from mwtool.files.hub_dataset import load_from_hub
from mwtool.files.text import read_text
from mwtool.models.source import DEMO

DATASETS = ("wikitext2", "c4", "pg19")


def default_protocol(target: str) -> str:
    """The paper's protocol for the paper's datasets; for any other text, bos before every window."""
    return "sun-4096" if target in DATASETS else "bos"


def text_for(target: str) -> Text:
    """The text of `ppl:TARGET`. Raises BadValue for a bad file, ModelNotFound if a dataset cannot be loaded."""
    if target == "demo":
        return Text((read_text(DEMO / "heldout.txt"),))
    if target in DATASETS:
        return {"wikitext2": _wikitext2, "c4": _c4, "pg19": _pg19}[target]()
    path = Path(target)
    if path.suffix != ".jsonl":
        return Text((read_text(path),))
    documents = []
    for where, record in read_records(path):
        if not isinstance(record.get("text"), str):
            raise BadValue(f"{where}: the key text has no string; expected records with text, or a plain text file")
        documents.append(record["text"])
    return Text(tuple(documents))


def _wikitext2() -> Text:
    records = _dataset("wikitext2", "Salesforce/wikitext", "wikitext-2-raw-v1", split="test")
    return Text(tuple(record["text"] for record in records))


def _c4() -> Text:
    records = _dataset("c4", "NeelNanda/c4-10k", split="train")
    return Text(tuple(record["text"] for record in islice(records, 5000)), joiner=" ", special=True, most=100)


def _pg19() -> Text:
    records = _dataset("pg19", "emozilla/pg19", split="validation")
    return Text(tuple(record["text"] for record in islice(records, 5)), joiner=" ", special=True, most=100)


def _dataset(name: str, *place: str, split: str) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise BadValue(
            f"ppl:{name} needs the datasets library; install it with pip install 'mwtool[eval]', or use ppl:FILE"
        ) from None
    what = f"ppl:{name}: the dataset {place[0]}"
    return load_from_hub(what, lambda: load_dataset(*place, split=split), "use a local text with ppl:FILE")
