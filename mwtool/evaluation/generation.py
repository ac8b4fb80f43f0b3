"""Generate an answer to each prompt of a file, by greedy decoding."""

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
from mwtool.models.context import positions
from mwtool.models.load import Loaded


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Prompts as token ids, each with bos in front."""

    task: Task
    texts: tuple[str, ...]
    ids: tuple[tuple[int, ...], ...]
    setting: dict[str, Any]
    notes: tuple[str, ...] = ()

    def run(self, loaded: Loaded, options: Options, on_progress: OnProgress | None = None) -> list[Measured]:
        """Generate the answers; the metric is their mean length in tokens."""
        start, size, tokenizer = time.perf_counter(), options.batch_size or BATCH, tokenizer_for(loaded, self.task)
        answers: list[str] = []
        lengths: list[float] = []
        bad: list[int] = []
        for first in range(0, len(self.ids), size):
            batch = self.ids[first : first + size]
            found, broken = generated(loaded, batch, options.new_tokens)
            bad += [first + index for index in broken]
            lengths += [len(one) for one in found]
            answers += [str(tokenizer.decode(one, skip_special_tokens=True)) for one in found]
            if on_progress is not None:
                on_progress(len(answers), len(self.ids))
        metric = mean_of("answer_tokens", lengths)
        if bad:
            metric |= {"value": math.nan, "stderr": None, "nonfinite": nonfinite(bad, len(self.ids))}
        return [
            Measured(
                task=str(self.task),
                seconds=time.perf_counter() - start,
                digest=digest_of(repr(self.texts)),
                setting=self.setting,
                answers=tuple(answers),
                **metric,
            )
        ]


def prepare_prompts(loaded: Loaded, task: Task, options: Options) -> Prompts:
    """Read a file of prompts.

    Raises BadValue for a bad or missing file, a model without a tokenizer, or no room for prompts.
    """
    tokenizer, bos = tokenizer_for(loaded, task), bos_for(loaded, options)
    texts = read_prompts(Path(task.target))[: options.limit]
    most = positions(loaded.base.config)
    room = None if most is None else most - options.new_tokens
    if room is not None and room < 2:  # noqa: PLR2004 # bos and one token
        raise BadValue(
            f"{task}: {options.new_tokens} new tokens leave no room for a prompt in {most} positions; "
            f"lower --new-tokens"
        )
    first = () if bos is None else (bos.id,)
    plain = [tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) for text in texts]
    plain = [one[1:] if first and one[:1] == first else one for one in plain]  # the text may begin with bos
    ids = tuple(first + (one if room is None else one[-(room - len(first)) :]) for one in plain)
    cut = sum(len(one) + len(first) > len(kept) for one, kept in zip(plain, ids, strict=True))
    check_vocabulary(loaded.model, [torch.tensor(one) for one in ids])
    notes = bos_notes(task, bos)
    if cut:
        notes += (f"{task}: {cut} prompts are longer than {room} tokens and lose their beginning",)
    setting = {"prompts": list(texts), "new_tokens": options.new_tokens, "bos": None if bos is None else bos.id}
    return Prompts(task=task, texts=texts, ids=ids, setting=setting, notes=notes)


class _NanDetector(LogitsProcessor):
    """Records the prompts whose logits contain NaN; changes nothing."""

    def __init__(self, prompts: int, device: torch.device) -> None:
        self.broken = torch.zeros(prompts, dtype=torch.bool, device=device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # noqa: ARG002 # the signature of LogitsProcessor
        self.broken |= scores.isnan().any(-1)
        return scores


def generated(loaded: Loaded, batch: Sequence[Sequence[int]], new_tokens: int) -> tuple[list[list[int]], list[int]]:
    """New tokens for each prompt, up to the end of text, and the indices of prompts whose logits contain NaN."""
    model: Any = loaded.model
    device = model.get_input_embeddings().weight.device
    pad, ends = _special(loaded)
    longest = max(map(len, batch))
    ids = torch.tensor([[pad] * (longest - len(one)) + list(one) for one in batch], device=device)  # padded on the left
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in batch], device=device)
    detector = _NanDetector(len(batch), device)
    with torch.inference_mode():
        found = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([detector]),
        )
    answers = found[:, longest:].tolist()
    return [_until(answer, ends) for answer in answers], detector.broken.nonzero()[:, 0].tolist()


def _special(loaded: Loaded) -> tuple[int, set[int]]:
    """The id to pad with, and the ids that end a text."""
    eos = getattr(loaded.base.generation_config, "eos_token_id", None)
    ends = set(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return min(ends, default=0), ends


def _until(answer: list[int], ends: set[int]) -> list[int]:
    return answer[: next((at for at, token in enumerate(answer) if token in ends), len(answer))]
