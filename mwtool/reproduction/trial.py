"""What a study would take: how many steps are left, and time and memory from a short measured trial."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mwtool.evaluation.evaluate import PerplexityTask, measure, prepare
from mwtool.evaluation.tasks import parse_tasks
from mwtool.files.units import duration, size
from mwtool.finetune.config import Asked, Peft
from mwtool.finetune.plan import make_plan
from mwtool.finetune.trainer import train, with_adapter
from mwtool.models.load import load
from mwtool.models.locate import locate
from mwtool.models.peak_memory import process_peak, resident
from mwtool.reproduction import steps
from mwtool.reproduction.commands import SCAN, SWEEPS, sweep_ks, tasks_of
from mwtool.reproduction.config import PAPER, PLAIN, StudyConfig
from mwtool.reproduction.contents import model_evaluations
from mwtool.reproduction.runs import Evaluation, Kind, Run, possible, wanted, with_tasks
from mwtool.reproduction.study import Study

PLAN = "mwtool.reproduction.plan/1"
STEPS, WINDOWS, QUESTIONS = 4, 4, 16
"""Of the trial: training steps of each kind of adapter, windows of each text, questions of each task."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds, as the trial took them.

    scan: with its check. load: opening the model once. texts, tasks: all of them once. step: of a training step, by
    type of adapter. memory: peak bytes on the GPU, or of the process on a CPU. steps: of one training run.
    """

    scan: float
    load: float
    texts: float
    tasks: float
    step: dict[str, float]
    steps: int
    memory: int

    def run(self, run: Run, evaluations: list[Evaluation], *, trained: bool) -> float:
        """A run with its evaluations."""
        training = 0.0 if trained else self.load + self.steps * self.step.get(run.peft, 0.0)
        return training + sum(self.evaluation(one) for one in evaluations)

    def evaluation(self, one: Evaluation) -> float:
        """All texts or tasks under each attack."""
        return self.load + len(one.attacks) * (self.texts if one.kind == "texts" else self.tasks)


def plan_of(config: StudyConfig) -> dict[str, Any]:
    """Try everything on a little, and say what is left to do and what it would take. Leaves nothing behind.

    Raises MwtoolError where the study could not be done: what fails in the trial would fail in it.
    """
    Study(config=config).check()
    with tempfile.TemporaryDirectory() as folder:
        aside = replace(config, folder=Path(folder))
        costs, massive = _tried(aside, needs_training=bool(wanted(config)))
    left = _left(config, massive=massive)
    of_model = sum(map(costs.evaluation, left.model)) + sum(_sweep(costs, config, kind) for kind in left.sweeps)
    each = [costs.run(run, todo, trained=steps.is_trained(config, run)) for run, todo in left.runs.items()]
    scan = costs.scan if steps.scanned(config) is None else 0.0
    return {
        "schema": PLAN,
        "model": config.model,
        "massive": massive,
        "parts": list(config.only),
        "runs": [run.name for run in left.runs],
        "evaluations": len(left.model) + sum(len(todo) for todo in left.runs.values()),
        "trial": asdict(costs),
        "seconds": {"model": scan + of_model, "runs": sum(each), "side_by_side": max(each, default=0.0)},
        "memory": costs.memory,
        "jobs": config.jobs,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class _Left:
    sweeps: list[Kind]
    model: list[Evaluation]
    runs: dict[Run, list[Evaluation]]


def _left(config: StudyConfig, *, massive: bool) -> _Left:
    """What is not measured yet."""
    kinds: tuple[Kind, ...] = ("texts", "tasks")
    swept = massive and "figure4" in config.only
    model = [one for part in config.only for one in model_evaluations(part, config) if massive or "none" in one.attacks]
    runs = {
        run: [one for one in with_tasks(evaluations, config) if not steps.is_measured(config, run, one)]
        for run, evaluations in possible(wanted(config), massive=massive).items()
    }
    return _Left(
        sweeps=[
            kind for kind in kinds if swept and tasks_of(config, kind) and not (config.folder / SWEEPS[kind]).exists()
        ],
        model=[one for one in dict.fromkeys(model) if not steps.is_measured(config, None, one)],
        runs={run: todo for run, todo in runs.items() if todo},
    )


def _sweep(costs: Costs, config: StudyConfig, kind: Kind) -> float:
    """The unchanged model, and two modes for each k with the ranked rows, random ones and those of largest norm."""
    runs = 1 + 2 * len(sweep_ks(kind)) * (2 + config.measuring.draws)
    return costs.load + runs * (costs.texts if kind == "texts" else costs.tasks)


def _tried(config: StudyConfig, *, needs_training: bool) -> tuple[Costs, bool]:
    cuda = config.loading.device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    scan = _timed(lambda: steps.scan(config))
    found = steps.scanned(config)
    massive = found is not None and found["massive"] is not None
    start = time.perf_counter()
    loaded = load(config.model, **asdict(config.loading))
    load_seconds = time.perf_counter() - start
    texts, tasks = (_measured(loaded, config, kind) for kind in ("texts", "tasks"))
    del loaded
    steps.free()
    step, count = _trained(config, massive=massive) if needs_training else ({}, 0)
    memory = int(torch.cuda.max_memory_allocated()) if cuda else process_peak() or resident()
    costs = Costs(scan=scan, load=load_seconds, texts=texts, tasks=tasks, step=step, steps=count, memory=memory)
    return costs, massive


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _measured(loaded: Any, config: StudyConfig, kind: str) -> float:
    """Seconds for all texts or tasks once, from the second of two measurements of a part of them."""
    seconds = 0.0
    options, most = steps.options_of(config, kind), WINDOWS if kind == "texts" else QUESTIONS
    for task in parse_tasks(tasks_of(config, kind)):
        (whole,) = prepare(loaded, [task], options)
        total = len(whole.windows.ids) if isinstance(whole, PerplexityTask) else len(getattr(whole, "questions", ()))
        total = total or options.limit or most
        few = replace(options, limit=min(most, total))
        (part,) = prepare(loaded, [task], few)
        measure(loaded, [part], few)
        seconds += _timed(lambda part=part, few=few: measure(loaded, [part], few)) * total / (few.limit or 1)  # type: ignore[misc]
    return seconds


def _trained(config: StudyConfig, *, massive: bool) -> tuple[dict[str, float], int]:
    """Seconds of a step for each type of adapter that is needed, and how many steps a run has."""
    found: dict[str, float] = {}
    count = 0
    pefts: list[Peft] = sorted({run.peft for run in wanted(config)})
    for peft in pefts:
        run = Run(peft=peft, schedule=PAPER if massive else PLAIN, lr=config.training.lr)
        recipe, opening = run.recipe(config), config.loading
        source = locate(
            config.model, opening.revision, trust_remote_code=opening.trust_remote_code, gguf_file=opening.gguf_file
        )
        asked = Asked(data=str(config.training.data), massive=config.folder / SCAN if massive else None)
        plan = make_plan(source, recipe, asked)
        count = plan.steps
        short = replace(plan.recipe, max_steps=min(STEPS, count), epochs=1.0, eval_share=0.0)
        model = with_adapter(plan.source, plan.recipe, opening.device)
        trained = train(model, (plan.train, None), plan.places, short, config.folder / run.name)
        found[peft] = float(trained.step_seconds or 0.0)
        del model, trained
        steps.free()
    return found, count


def lines_of(plan: dict[str, Any]) -> list[str]:
    """The plan as lines for people."""
    trial, seconds = plan["trial"], plan["seconds"]
    total = seconds["model"] + max(seconds["runs"] / plan["jobs"], seconds["side_by_side"])
    per_step = ", ".join(f"{one:.3g} s a step of {peft}" for peft, one in trial["step"].items())
    lines = [
        f"parts          {', '.join(plan['parts'])}",
        f"left to do     {len(plan['runs'])} fine-tuning runs, {plan['evaluations']} evaluations",
        f"trial          {trial['texts']:.3g} s for the texts once, {trial['tasks']:.3g} s for the tasks once"
        + (f", {per_step}" if per_step else ""),
        f"time           about {duration(total)}"
        + (f" if {plan['jobs']} runs side by side do not slow each other" if plan["jobs"] > 1 else ""),
        f"memory         about {size(plan['memory'])} for each process",
    ]
    if not plan["massive"]:
        lines.append("the scan found no massive weights: attacks and MacDrop are skipped")
    return lines
