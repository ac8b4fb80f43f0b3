"""Multiple-choice and cloze questions of local files: which choice is likeliest, and what greedy decoding generates.

Every context begins with bos exactly once, whatever the tokenizer does by default; log-probabilities are computed in
float32, in chunks of the scored positions. lm-evaluation-harness is not needed, and scores the same tokens.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mwtool.errors import BadValue
from mwtool.evaluation.batches import padded, tokens_at_once
from mwtool.evaluation.chunked_loss import head_of, to_device
from mwtool.evaluation.config import Options
from mwtool.evaluation.measurement import (
    BATCH,
    Measured,
    OnProgress,
    bos_for,
    bos_notes,
    digest_of,
    mean_of,
    perplexity_of,
    tokenizer_for,
)
from mwtool.evaluation.perplexity import check_vocabulary, summarize
from mwtool.evaluation.tasks import Choice, Cloze, Task, read_choices, read_cloze
from mwtool.models.context import positions
from mwtool.models.load import Loaded
from mwtool.models.source import DEMO

Answer = tuple[float, bool]
"""ln p of a continuation, and whether greedy decoding generates it."""


def choice_metrics(scored: Sequence[tuple[Any, list[Answer]]]) -> Iterator[dict[str, Any]]:
    """acc: whether the likeliest choice is right. acc_norm: the same with ln p divided by the number of characters."""
    for metric in ("acc", "acc_norm"):
        values = []
        for row, answers in scored:
            scale = [len(ending) if metric == "acc_norm" else 1 for ending in row.endings]
            each = [answer[0] / length for answer, length in zip(answers, scale, strict=True)]
            values.append(float(each.index(max(each)) == row.gold) if all(map(math.isfinite, each)) else math.nan)
        yield mean_of(metric, values)


def cloze_metrics(scored: Sequence[tuple[Any, list[Answer]]]) -> Iterator[dict[str, Any]]:
    """acc: whether greedy decoding generates the true continuation. perplexity: of all true continuations together."""
    yield mean_of("acc", [float(answers[0][1]) if math.isfinite(answers[0][0]) else math.nan for _, answers in scored])
    found = summarize([-answers[0][0] for _, answers in scored], [1] * len(scored), 0.0)
    yield perplexity_of("perplexity", found)


@dataclass(frozen=True, slots=True)
class Request:
    """ids: bos, context and continuation. scored: how many tokens at the end are the continuation."""

    ids: Tensor
    scored: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """The questions of a local file, ready to run.

    requests: of all questions, one for each choice. most: positions that a request may have, without its last token.
    """

    task: Task
    questions: tuple[Choice | Cloze, ...]
    requests: tuple[Request, ...]
    most: int
    digest: str
    setting: dict[str, Any]
    notes: tuple[str, ...] = ()

    def run(self, loaded: Loaded, options: Options, on_progress: OnProgress | None = None) -> list[Measured]:
        """Accuracy of the likeliest choice; of a cloze file, that of the greedy continuation and the perplexity."""
        start = time.perf_counter()
        answers = iter(_answers(loaded, self.requests, self.most, options.batch_size, on_progress))
        scored = [(one, [next(answers) for _ in _pairs(one, options.delimiter)]) for one in self.questions]
        metrics = cloze_metrics(scored) if self.task.kind == "cloze" else choice_metrics(scored)
        shared: dict[str, Any] = {"task": str(self.task), "digest": self.digest}
        shared |= {"seconds": time.perf_counter() - start, "setting": self.setting}
        return [Measured(**shared, **one) for one in metrics]

    def first_batch(self, size: int) -> FirstBatch:
        """What runs first: the `size` longest requests."""
        return FirstBatch(self.task, tuple(self.requests[at] for at in _longest_first(self.requests)[:size]), self.most)


@dataclass(frozen=True, slots=True)
class FirstBatch:
    """Some requests of a file, to be run for the time and memory they take."""

    task: Task
    requests: tuple[Request, ...]
    most: int
    notes: tuple[str, ...] = ()

    def run(self, loaded: Loaded, options: Options, on_progress: OnProgress | None = None) -> list[Measured]:
        """Run them as one batch; nothing is measured by them."""
        _answers(loaded, self.requests, self.most, options.batch_size or len(self.requests), on_progress)
        return []


def prepare_questions(loaded: Loaded, task: Task, options: Options) -> Questions:
    """Read and tokenize a file of questions. Raises BadValue for a bad line, or a question that is too long."""
    tokenizer_for(loaded, task)
    bos, questions = bos_for(loaded, options), read_questions(task)[: options.limit]
    most = options.window or positions(loaded.base.config)
    first = None if bos is None else bos.id
    requests: list[Request] = []
    shortened = 0
    for number, question in enumerate(questions, start=1):
        for context, aim in _encoded(loaded, _pairs(question, options.delimiter), first):
            _check(task, number, context, aim, most)
            fitting = (
                context if most is None else _shortened(context, most + 1 - len(aim), first)
            )  # the last token is no input
            shortened += len(fitting) < len(context)
            requests.append(Request(torch.tensor(fitting + aim), len(aim)))
    check_vocabulary(loaded.model, [one.ids for one in requests])
    longest = max(len(one.ids) for one in requests)
    setting = {
        "bos": first,
        "batch_size": options.batch_size or requests_at_once(loaded, longest),
        "delimiter": options.delimiter,
        "shortened": shortened,
    }
    return Questions(
        task=task,
        questions=questions,
        requests=tuple(requests),
        most=most or longest,
        digest=digest_of(repr(questions)),
        setting=setting,
        notes=bos_notes(task, bos),
    )


def read_questions(task: Task) -> tuple[Choice | Cloze, ...]:
    """Read a local file, or the bundled one for `demo`. Raises BadValue for a bad line."""
    path = DEMO / f"{task.kind}.jsonl" if task.target == "demo" else Path(task.target)
    return read_cloze(path) if task.kind == "cloze" else read_choices(path)


def _encoded(
    loaded: Loaded, pairs: Sequence[tuple[str, str]], bos: int | None
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids of contexts, with bos in front, and of continuations; white space between goes to the latter.

    Both together are tokenized, and the continuation is what follows as many tokens as the context alone has.
    """
    tokenizer = loaded.tokenizer
    assert tokenizer is not None, "checked by tokenizer_for"
    wholes = tokenizer([a + b for a, b in pairs], add_special_tokens=False, verbose=False)["input_ids"]
    parts = tokenizer([a.rstrip() for a, _ in pairs], add_special_tokens=False, verbose=False)["input_ids"]
    for whole, part in zip(wholes, parts, strict=True):
        starts = part[:1] == [bos]  # the text may begin with bos
        yield [*([] if bos is None or starts else [bos]), *part], list(whole[len(part) :])


def _check(task: Task, number: int, context: Sequence[int], aim: Sequence[int], most: int | None) -> None:
    if not aim or (most is not None and len(aim) > most):
        raise BadValue(
            f"{task}, question {number}: a continuation has {len(aim)} tokens; "
            f"expected at least 1{'' if most is None else f' and at most the {most} of the window'}"
        )
    if not context:
        raise BadValue(f"{task}, question {number}: the context has no tokens; expected some, or bos in front")


def _shortened(context: list[int], room: int, bos: int | None) -> list[int]:
    """The context without its first tokens after bos, if it does not fit in `room`."""
    if len(context) <= room:
        return context
    kept = context[:1] if context[0] == bos else []
    return kept + context[len(context) - room + len(kept) :]


def requests_at_once(loaded: Loaded, longest: int) -> int:
    """Requests per batch where none is given. longest: tokens of the longest."""
    return max(BATCH, tokens_at_once(_embedding(loaded)) // longest)


def _longest_first(requests: Sequence[Request]) -> list[int]:
    return sorted(range(len(requests)), key=lambda at: -len(requests[at].ids))


def _embedding(loaded: Loaded) -> Tensor:
    model: Any = loaded.model
    weight: Tensor = model.get_input_embeddings().weight
    return weight  # (V, H)


def _answers(
    loaded: Loaded, requests: Sequence[Request], most: int, size: int | None, on_progress: OnProgress | None
) -> list[Answer]:
    """Of each request, in their order: ln p of its continuation, and whether each token of it is the likeliest one."""
    device = _embedding(loaded).device
    order = _longest_first(requests)
    size = size or requests_at_once(loaded, len(requests[order[0]].ids))
    found: dict[int, Answer] = {}
    with torch.inference_mode():
        head = head_of(loaded.model, requests[order[0]].ids[None].to(device))
        for start in range(0, len(order), size):
            some = order[start : start + size]
            ids, scored = padded([requests[at].ids for at in some], [requests[at].scored for at in some])
            losses, greedy = head.answers(ids, scored, most, device)
            owner = to_device(scored.nonzero()[:, 0], losses.device)
            sums = torch.zeros(len(some), 2, dtype=torch.float64, device=losses.device)  # -ln p, tokens not generated
            sums.index_add_(0, owner, torch.stack([losses.double(), (~greedy).double()], dim=1))
            found |= {at: (-nll, not missed) for at, (nll, missed) in zip(some, sums.tolist(), strict=True)}
            if on_progress is not None:
                on_progress(len(found), len(requests))
    return [found[at] for at in range(len(requests))]


def _pairs(question: Choice | Cloze, delimiter: str) -> list[tuple[str, str]]:
    """Pairs of context and continuation. Only the trailing whitespace of the delimiter is scored."""
    stated = delimiter.rstrip()
    gap = delimiter[len(stated) :]
    if isinstance(question, Cloze):
        return [(question.context + stated, gap + question.continuation)]
    both = zip(question.contexts, question.endings, strict=True)
    return [(context + stated, gap + ending) for context, ending in both]
