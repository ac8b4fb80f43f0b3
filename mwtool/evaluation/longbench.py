"""Long contexts from local files, in the format of LongBench's records."""

from __future__ import annotations

import math
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mwtool.errors import BadValue, nearest
from mwtool.evaluation.config import Options
from mwtool.evaluation.generation import generated
from mwtool.evaluation.longbench_scores import DATASETS, SEGMENTED, Dataset, dataset_of, score
from mwtool.evaluation.measurement import Measured, OnProgress, bos_for, bos_notes, digest_of, mean_of, tokenizer_for
from mwtool.evaluation.perplexity import check_vocabulary, nonfinite
from mwtool.evaluation.tasks import Task, read_records
from mwtool.files.text import shown
from mwtool.models.context import positions
from mwtool.models.load import Loaded

LENGTH = 7500
"""Tokens of a prompt, as in the paper."""
PROMPT = "{context}\n\n{input}\n"
"""Of a record that has none."""
SHOWN = 100
"""Characters of the context by which a prompt without a question is told in results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One record: what is asked, its right answers, and its classes where it is a classification."""

    dataset: str
    prompt: str
    label: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LongContexts:
    """Records with their prompts as token ids, bos in front."""

    task: Task
    records: tuple[Record, ...]
    ids: tuple[tuple[int, ...], ...]
    setting: dict[str, Any]
    notes: tuple[str, ...] = ()

    def run(self, loaded: Loaded, options: Options, on_progress: OnProgress | None = None) -> list[Measured]:
        """Answer and score; a metric for each dataset of the file, the mean over its records."""
        found, done = [], 0
        names = list(dict.fromkeys(one.dataset for one in self.records))
        for name in names:
            start, chosen = time.perf_counter(), [at for at, one in enumerate(self.records) if one.dataset == name]
            dataset = dataset_of(name)
            assert dataset is not None, "checked when the file was read"
            answers: list[str] = []
            bad: list[int] = []
            size = options.batch_size or 1
            for first in range(0, len(chosen), size):
                batch = [self.ids[at] for at in chosen[first : first + size]]
                tokens, broken = generated(loaded, batch, dataset.new_tokens)
                bad += [first + at for at in broken]
                decode = tokenizer_for(loaded, self.task).decode
                answers += [str(decode(one, skip_special_tokens=True)) for one in tokens]
                done += len(batch)
                if on_progress is not None:
                    on_progress(done, len(self.records))
            measured = self._measured(name, dataset, [self.records[at] for at in chosen], answers, bad)
            part = name if len(names) > 1 else None
            found.append(Measured(task=str(self.task), part=part, seconds=time.perf_counter() - start, **measured))
        return found

    def _measured(
        self, name: str, dataset: Dataset, records: list[Record], answers: list[str], bad: list[int]
    ) -> dict[str, Any]:
        pairs = zip(records, answers, strict=True)
        metric = mean_of(dataset.metric, [score(dataset, said, one.answers, one.classes) for one, said in pairs])
        if bad:
            metric |= {"value": math.nan, "stderr": None, "nonfinite": nonfinite(bad, len(records))}
        setting = {
            **self.setting,
            "longbench": name,
            "new_tokens": dataset.new_tokens,
            "prompts": [one.label for one in records],
            "references": [list(one.answers) for one in records],
        }
        return {**metric, "setting": setting, "answers": tuple(answers), "digest": digest_of(repr(records))}


def read_longbench(path: Path) -> tuple[Record, ...]:
    """Records of `dataset`, `context`, `input`, `answers` and, for a classification, `all_classes`. Raises BadValue.

    `prompt`, where a record has one, is its template, with `{context}` and `{input}`.
    """
    return tuple(_record(where, record) for where, record in read_records(path))


def prepare_longbench(loaded: Loaded, task: Task, options: Options) -> LongContexts:
    """Read the file and cut the prompts in the middle, once for all attacks.

    Raises BadValue for a bad file, a model without a tokenizer, or no room for a prompt.
    """
    tokenizer, bos = tokenizer_for(loaded, task), bos_for(loaded, options)
    records = read_longbench(Path(task.target))[: options.limit]
    first, most = () if bos is None else (bos.id,), positions(loaded.base.config)
    longest = max((dataset_of(one.dataset) or DATASETS["qasper"]).new_tokens for one in records)
    length = options.window or LENGTH
    room = length if most is None else min(length, most - longest - len(first))
    if room < 2:  # noqa: PLR2004 # a beginning and an end
        raise BadValue(f"{task}: answers of {longest} tokens leave no room for a prompt in {most} positions")
    plain = [tuple(tokenizer(one.prompt, add_special_tokens=False, verbose=False)["input_ids"]) for one in records]
    plain = [one[1:] if first and one[:1] == first else one for one in plain]  # the text may begin with bos
    ids = tuple(first + _cut(one, room) for one in plain)
    check_vocabulary(loaded.model, [torch.tensor(one) for one in ids])
    cut = sum(len(one) > room for one in plain)
    said = (f"{task}: {cut} prompts are longer than {room} tokens and lose their middle",) if cut else ()
    setting = {"bos": None if bos is None else bos.id, "length": room, "shortened": cut}
    return LongContexts(task=task, records=records, ids=ids, setting=setting, notes=bos_notes(task, bos) + said)


def _cut(ids: tuple[int, ...], room: int) -> tuple[int, ...]:
    half = room // 2
    return ids if len(ids) <= room else ids[:half] + ids[-half:]


def _record(where: str, record: dict[str, Any]) -> Record:
    name = record.get("dataset")
    if name in SEGMENTED:
        raise BadValue(f"{where}: {name} is scored by Chinese words, which need a segmenter; leave its records out")
    dataset = dataset_of(name) if isinstance(name, str) else None
    if dataset is None:
        advice = nearest(str(name), list(DATASETS), f"expected one of {', '.join(DATASETS)}")
        raise BadValue(f"{where}: unknown dataset {shown(name)}; {advice}")
    texts = {"input": "", "prompt": PROMPT, **record}
    parts = {key: _text(where, texts, key) for key in ("context", "input", "prompt")}
    return Record(
        dataset=str(name),
        prompt=re.sub(r"\{(context|input)\}", lambda found: parts[found[1]], parts["prompt"]),
        label=parts["input"] or parts["context"][:SHOWN],
        answers=_texts(where, record, "answers"),
        classes=_texts(where, record, "all_classes") if dataset.metric == "classification" else (),
    )


def _text(where: str, record: dict[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or (not value and key != "input"):
        raise BadValue(f"{where}: {key} is {shown(value)}; expected a non-empty string")
    return value


def _texts(where: str, record: dict[str, Any], key: str) -> tuple[str, ...]:
    values = record.get(key)
    if not isinstance(values, list) or not values or not all(isinstance(one, str) for one in values):
        raise BadValue(f"{where}: {key} is {shown(values)}; expected a list of strings")
    return tuple(values)
