"""What the model says after each prompt of a file, by greedy decoding, for judging."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from mwtool.errors import BadValue
from mwtool.evaluation.config import Options
from mwtool.evaluation.measurement import (
    BATCH,
    Measured,
    OnProgress,
    bos_for,
    bos_notes,
    digest_of,
    mean_of,
    tokenizer_for,
)
from mwtool.evaluation.perplexity import check_vocabulary, nonfinite
from mwtool.evaluation.tasks import Task, read_prompts
from mwtool.evaluation.windows import positions
from mwtool.models.load import Loaded


@dataclass(frozen=True, slots=True)
class Prompts:
    """Prompts as token ids, bos in front of each."""

    task: Task
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    setting: dict[str, Any]
    notes: tuple[str, ...] = ()

    def run(self, loaded: Loaded, options: Options, on_progress: OnProgress | None = None) -> list[Measured]:
        """The answers; their mean length in tokens is the figure."""
        start, size, tokenizer = time.perf_counter(), options.batch_size or BATCH, tokenizer_for(loaded, self.task)
        answers: list[str] = []
        lengths: list[float] = []
        bad: list[int] = []
        for first in range(0, len(self.ids), size):
            batch = self.ids[first : first + size]
            told, broken = _told(loaded, batch, options.new_tokens)
            bad += [first + row for row in broken]
            lengths += [len(one) for one in told]
            answers += [str(tokenizer.decode(one, skip_special_tokens=True)) for one in told]
            if on_progress is not None:
                on_progress(len(answers), len(self.ids))
        figure = mean_of("answer_tokens", lengths)
        if bad:
            figure |= {"value": math.nan, "stderr": None, "nonfinite": nonfinite(bad, len(self.ids))}
        return [
            Measured(
                task=str(self.task),
                seconds=time.perf_counter() - start,
                digest=digest_of(repr(self.texts)),
                setting=self.setting,
                answers=tuple(answers),
                **figure,
            )
        ]


def prepare_answers(loaded: Loaded, task: Task, options: Options) -> Prompts:
    """Read a file of prompts. Raises BadValue for a bad line, a missing file, or a model without a tokenizer."""
    tokenizer, bos = tokenizer_for(loaded, task), bos_for(loaded, options)
    texts = read_prompts(Path(task.target))[: options.limit]
    most = positions(loaded.base.config)
    room = None if most is None else most - options.new_tokens
    if room is not None and room < 2:  # noqa: PLR2004 # bos and one token
        raise BadValue(
            f"{task}: {options.new_tokens} new tokens leave no room for a prompt in {most} positions; "
            f"give fewer with --new-tokens"
        )
    first = () if bos is None else (bos.id,)
    plain = [tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts]
    plain = [one[1:] if first and one[:1] == first else one for one in plain]  # the text may begin with it
    ids = tuple(first + (one if room is None else one[-(room - len(first)) :]) for one in plain)
    cut = sum(len(one) + len(first) > len(kept) for one, kept in zip(plain, ids, strict=True))
    check_vocabulary(loaded.model, [torch.tensor(one) for one in ids])
    notes = bos_notes(task, bos)
    if cut:
        notes += (f"{task}: {cut} prompts are longer than the {room} tokens there is room for and lose their start",)
    setting = {"prompts": list(texts), "new_tokens": options.new_tokens, "bos": None if bos is None else bos.id}
    return Prompts(task, texts, ids, setting, notes)


class _Watching(LogitsProcessor):
    """Remembers for which prompts logits were not a number, and changes nothing."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.broken = torch.zeros(rows, dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 # transformers' signature
        self.broken |= scores.isnan().any(-1)
        return scores


def _told(loaded: Loaded, batch: Sequence[Sequence[int]], new_tokens: int) -> tuple[list[list[int]], list[int]]:
    """New tokens for each prompt without what follows the end, and the prompts whose logits were not numbers."""
    model: Any = loaded.model
    device = model.get_input_embeddings().weight.device
    pad, ends = _special(loaded)
    longest = max(map(len, batch))
    ids = torch.tensor([[pad] * (longest - len(one)) + list(one) for one in batch], device=device)  # padded on the left
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in batch], device=device)
    watching = _Watching(len(batch), device)
    with torch.inference_mode():
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([watching]),
        )
    rows = found[:, longest:].tolist()
    return [_until(row, ends) for row in rows], watching.broken.nonzero()[:, 0].tolist()


def _special(loaded: Loaded) -> tuple[int, set[int]]:
    """The id to pad with, and those that end a text."""
    eos = getattr(loaded.base.generation_config, "eos_token_id", None)
    ends = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return min(ends, default=0), ends


def _until(row: list[int], ends: set[int]) -> list[int]:
    return row[: next((at for at, token in enumerate(row) if token in ends), len(row))]
