"""The fine-tuning runs that each part of the study needs, and what is measured of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mwtool.finetune.config import Peft, Recipe
from mwtool.macdrop.curriculum import Curriculum, Resample, Scope, curriculum_of
from mwtool.models.load_options import On
from mwtool.reproduction.config import ATTACKED, CONSTANT, MASSIVE, P0, PAPER, PLAIN, ZEROED, Part, StudyConfig

Kind = Literal["texts", "tasks"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One fine-tuning run: what differs from the study's training settings.

    batch_size: None for the study's.
    """

    peft: Peft = "lora"
    schedule: str = PLAIN
    scope: Scope = "massive"
    resample: Resample = "step"
    k: int = MASSIVE
    lr: float
    batch_size: int | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """The name of its folder."""
        schedule = self.schedule.replace(":", "-").replace(",alpha=", "-")
        parts = [self.peft, schedule]
        parts += [f"scope-{self.scope}"] if self.scope != "massive" else []
        parts += [self.resample] if self.resample != "step" else []
        parts += [f"k{self.k}"] if self.k != MASSIVE else []
        parts += [f"batch{self.batch_size}"] if self.batch_size is not None else []
        return "-".join([*parts, f"lr{self.lr:g}", f"seed{self.seed}"])

    @property
    def alike(self) -> Run:
        """The same run with the first seed: what all seeds of it have in common."""
        return replace(self, seed=0)

    def curriculum(self) -> Curriculum:
        """What it drops."""
        options = {"k": self.k, "scope": self.scope, "resample": self.resample, "seed": self.seed}
        return curriculum_of(self.schedule, **options)

    def recipe(self, config: StudyConfig) -> Recipe:
        """All settings of the run."""
        training = config.training
        return Recipe(
            curriculum=self.curriculum(),
            peft=self.peft,
            rank=training.rank,
            alpha=training.alpha,
            lr=self.lr,
            epochs=training.epochs,
            max_steps=training.max_steps,
            batch_size=self.batch_size or training.batch_size,
            effective_batch=training.effective_batch,
            max_length=training.max_length,
            gradient_checkpointing=False,  # a trial beside other runs would say little of the memory there is
            seed=self.seed,
            dtype=config.train_dtype,
        )


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Attacks under which the texts or the tasks are measured; on the base rows of an adapter or on the merged ones."""

    kind: Kind
    attacks: tuple[str, ...]
    on: On = "base"

    @property
    def file(self) -> str:
        """The name of its document, in the folder of its run."""
        return f"{self.on}.{self.kind}.json"


def study_of(part: Part, config: StudyConfig) -> list[Run]:
    """The runs of a part with their first seed; without seeds that Table 5 leaves to its first curriculum."""
    one = Run(lr=config.training.lr)
    if part in ("table3", "table4"):
        pefts: tuple[Peft, ...] = ("lora", "dora")
        return [replace(one, peft=peft, schedule=schedule) for schedule in (PLAIN, PAPER) for peft in pefts]
    if part in ("table5", "figure7"):
        return [one, *(replace(one, schedule=schedule) for name in config.curricula for schedule in schedules(name))]
    if part == "figure6":
        scopes: tuple[Scope, ...] = ("massive", "others", "all")
        return [one, *(replace(one, scope=scope, schedule=f"constant:{p}") for scope in scopes for p in CONSTANT)]
    return choices(one, config) if part == "choices" else []


def schedules(name: str) -> list[str]:
    """The schedules of one curriculum of Table 5, for each p0."""
    if name.startswith("exp-"):
        return [f"exp:{p},alpha={name.removeprefix('exp-')}" for p in P0]
    return [f"{name}:{p}" for p in P0]


def choices(one: Run, config: StudyConfig) -> list[Run]:
    """What the paper leaves open: k, one mask for an optimizer step or for a micro-batch, a larger learning rate."""
    with_macdrop, faster = replace(one, schedule=PAPER), 4 * config.training.lr
    parts = max(1, config.training.effective_batch // 4)
    return [
        one,
        with_macdrop,
        *(replace(with_macdrop, k=k) for k in (1, 3)),
        replace(with_macdrop, batch_size=parts),
        replace(with_macdrop, batch_size=parts, resample="microbatch"),
        replace(one, lr=faster),
        replace(with_macdrop, lr=faster),
    ]


def evaluations_of(part: Part) -> list[Evaluation]:
    """What a part measures of each of its runs."""
    none, top = "none", f"zero:{ZEROED}"
    each = tuple(f"zero:{k}" for k in ATTACKED)
    if part == "table3":
        return [Evaluation("texts", (none,)), Evaluation("tasks", (none,))]
    if part == "table4":
        return [
            Evaluation("texts", (none, *each)),
            Evaluation("tasks", (none, top)),
            Evaluation("texts", each, "merged"),
            Evaluation("tasks", (top,), "merged"),
        ]
    if part in ("table5", "figure7", "figure6"):
        return [Evaluation("texts", (none, top)), Evaluation("tasks", (none,))]
    return [Evaluation("texts", (none, *each))] if part == "choices" else []


def wanted(config: StudyConfig) -> dict[Run, list[Evaluation]]:
    """Every run with a seed, in order, with what is measured of it by all parts together."""
    found: dict[Run, dict[tuple[Kind, On], dict[str, None]]] = {}
    for part in config.only:
        for run in study_of(part, config):
            for seed in range(config.seeds):
                asked = found.setdefault(replace(run, seed=seed), {})
                for one in evaluations_of(part):
                    asked.setdefault((one.kind, one.on), {}).update(dict.fromkeys(one.attacks))
    return {run: list(_evaluations(asked)) for run, asked in sorted(found.items(), key=lambda item: item[0].seed)}


def _evaluations(asked: dict[tuple[Kind, On], dict[str, None]]) -> Iterator[Evaluation]:
    for (kind, on), attacks in asked.items():
        yield Evaluation(kind, tuple(attacks), on)


def possible(runs: dict[Run, list[Evaluation]], *, massive: bool) -> dict[Run, list[Evaluation]]:
    """Without massive weights: runs without MacDrop, and their evaluations without attacks."""
    if massive:
        return runs
    return {
        run: [replace(one, attacks=("none",)) for one in evaluations if "none" in one.attacks]
        for run, evaluations in runs.items()
        if run.schedule == PLAIN
    }


def with_tasks(evaluations: Sequence[Evaluation], config: StudyConfig) -> list[Evaluation]:
    """Without those whose texts or tasks the study does not have."""
    has = {"texts": bool(config.measuring.texts), "tasks": bool(config.measuring.tasks)}
    return [one for one in evaluations if has[one.kind]]
