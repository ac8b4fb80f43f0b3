"""Answers judged on a scale from 1 to 5, by a local model or by an OpenAI-compatible server."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from mwtool.errors import BadValue
from mwtool.evaluation.config import Options
from mwtool.evaluation.generation import Prompts, generated, prepare_prompts
from mwtool.evaluation.judge_server import is_url, server_at
from mwtool.evaluation.measurement import Measured, OnProgress, digest_of, mean_of
from mwtool.evaluation.tasks import Task, read_references
from mwtool.models.context import positions
from mwtool.models.load import Loaded, load

NEW_TOKENS = 256
"""The most tokens of a verdict."""
PROMPT = """\
You are grading the answer of a language model to a request.

Request:
{request}

{reference}Answer to grade:
{answer}

Grade how well the answer does what the request asks, with a whole number:
5: right, complete and clear
4: right, with small flaws
3: partly right or incomplete
2: mostly wrong or beside the point
1: wrong, unreadable or empty

Reply with one line that holds nothing else: Score: N
"""
Verdict = int | Literal["refused", "unreadable"]
"""A score from 1 to 5, or why there is none."""
_SCORE = re.compile(r"(?:score|rating|grade)\W{0,4}(?:is\W{0,4})?([1-5])(?![\d.]*\d)", re.IGNORECASE)
_ALONE = re.compile(r"\W*([1-5])(?:\s*/\s*5|\s+out\s+of\s+5)?\W*")
_REFUSAL = re.compile(
    r"\b(i(?:'m| am)? (?:can(?:no|')t|sorry|not able|unable|won't|will not)|as an ai\b|i must decline)", re.IGNORECASE
)


class Judge(Protocol):
    """Whoever grades answers."""

    @property
    def name(self) -> str:
        """As results name it."""
        ...

    def ask(self, prompt: str, new_tokens: int) -> str:
        """The judge's answer to a prompt. Raises MwtoolError."""
        ...


@dataclass(frozen=True, slots=True)
class LocalJudge:
    """A model in memory beside the one that is judged."""

    loaded: Loaded
    name: str

    def ask(self, prompt: str, new_tokens: int) -> str:
        """Decoded greedily, through the chat template where there is one. Raises BadValue where it does not fit."""
        tokenizer: Any = self.loaded.tokenizer
        if getattr(tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": prompt}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = tokenizer(prompt, verbose=False)["input_ids"]
        most = positions(self.loaded.base.config)
        if most is not None and len(ids) + new_tokens > most:
            raise BadValue(
                f"the judge {self.name} has {most} positions, and a request with its answer takes {len(ids)} tokens "
                f"and {new_tokens} for the verdict; take a judge with a longer context, or lower --new-tokens"
            )
        (found,), _ = generated(self.loaded, [ids], new_tokens)
        return str(tokenizer.decode(found, skip_special_tokens=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """Prompts whose answers are judged. references: an answer to compare with, for each prompt or None."""

    prompts: Prompts
    references: tuple[str | None, ...]
    judge: Judge

    @property
    def task(self) -> Task:
        """The task."""
        return self.prompts.task

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know about the prompts."""
        return self.prompts.notes

    def run(self, loaded: Loaded, options: Options, on_progress: OnProgress | None = None) -> list[Measured]:
        """Answer and have judged; the metric is the mean score of the verdicts that have one."""
        start = time.perf_counter()
        (answered,) = self.prompts.run(loaded, options)
        raw = []
        for at, (answer, reference) in enumerate(zip(answered.answers, self.references, strict=True)):
            raw.append(self.judge.ask(grading_prompt(self.prompts.texts[at], answer, reference), NEW_TOKENS))
            if on_progress is not None:
                on_progress(at + 1, len(self.references))
        verdicts = [verdict_of(one) for one in raw]
        return [replace(answered, seconds=time.perf_counter() - start, **self._scores(answered, verdicts, raw))]

    def _scores(self, answered: Measured, verdicts: Sequence[Verdict], raw: Sequence[str]) -> dict[str, Any]:
        """What differs from the generated answers alone: the scores, of the prompts that have one."""
        scored = [at for at, one in enumerate(verdicts) if isinstance(one, int)]
        texts = [self.prompts.texts[at] for at in scored]
        setting = {
            **answered.setting,
            "judge": self.judge.name,
            "judge_prompt": PROMPT,
            "references": list(self.references),
            "verdicts": list(raw),
            "scores": [one if isinstance(one, int) else None for one in verdicts],
            "refused": sum(one == "refused" for one in verdicts),
            "unreadable": sum(one == "unreadable" for one in verdicts),
        }
        found = mean_of("score", [float(one) for one in verdicts if isinstance(one, int)] or [float("nan")])
        if not scored:
            found |= {
                "nonfinite": f"none of {len(verdicts)} verdicts has a score",
                "n": 0,
                "samples": (),
                "stderr": None,
            }
        return {**found, "setting": setting, "digest": digest_of(repr((self.judge.name, texts)))}


def prepare_judged(loaded: Loaded, task: Task, options: Options) -> Judged:
    """Read the prompts and open the judge, once for all attacks. Raises MwtoolError."""
    if options.judge is None:
        raise BadValue(f"{task} needs a judge; give mwtool eval --judge MODEL, or --judge http://HOST:PORT/v1#MODEL")
    prompts = prepare_prompts(loaded, task, options)
    references = read_references(Path(task.target))[: options.limit]
    return Judged(prompts=prompts, references=references, judge=_judge(options.judge, loaded))


def _judge(judge: str, beside: Loaded) -> Judge:
    if is_url(judge):
        return server_at(judge)
    loaded = load(judge, device=str(beside.base.device))
    if loaded.tokenizer is None:
        raise BadValue(f"the judge {judge} has no tokenizer, and needs one to read answers")
    return LocalJudge(loaded, judge)


def grading_prompt(request: str, answer: str, reference: str | None) -> str:
    """What the judge is asked about one answer."""
    known = "" if reference is None else f"A right answer:\n{reference}\n\n"
    parts = {"{request}": request, "{reference}": known, "{answer}": answer}
    return re.sub(r"\{(?:request|reference|answer)\}", lambda found: parts[found[0]], PROMPT)


def verdict_of(text: str) -> Verdict:
    """The score in a judge's reply: the last `Score: N`, or a number that stands alone; else why there is none."""
    named = _SCORE.findall(text)
    if named:
        return int(named[-1])
    alone = _ALONE.fullmatch(text.strip())
    if alone is not None:
        return int(alone[1])
    return "refused" if _REFUSAL.search(text) else "unreadable"
