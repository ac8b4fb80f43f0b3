"""A sweep of attacks on one loaded model: modes times k, with controls that tell "massive" from "important"."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mwtool.ablation.config import AblateConfig
from mwtool.ablation.controls import norm_rows, random_rows
from mwtool.ablation.head import Head, head_of
from mwtool.ablation.verdict import Verdict, judge
from mwtool.architecture.layout import FFN
from mwtool.architecture.registry import adapter_for
from mwtool.architecture.validate import decoder_layers, ffn_at, unwrapped
from mwtool.errors import BadValue
from mwtool.evaluation.config import Options
from mwtool.evaluation.evaluate import PerplexityTask, Prepared, prepare
from mwtool.evaluation.measurement import Measured, OnProgress
from mwtool.evaluation.perplexity import check_vocabulary
from mwtool.evaluation.prefix_reuse import Variant
from mwtool.evaluation.tasks import Task
from mwtool.files.tabular import frame_of, html_of
from mwtool.models.load import Loaded
from mwtool.scan.targets import Group
from mwtool.surgery.attack import Attack, Edit, edited_together, parse_mode, rows_of
from mwtool.surgery.hooks import averaging

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from mwtool.massive import MassiveWeights


DEFAULTS = AblateConfig()


@dataclass(frozen=True, slots=True)
class Sweep:
    """The attacks of a sweep.

    modes: attacks without their k; ks: how many of the ranked rows.
    draws: random controls for each, seeded from `seed` on; 0 leaves out both kinds of controls.
    """

    modes: tuple[Attack, ...] = tuple(map(parse_mode, DEFAULTS.modes))
    ks: tuple[int, ...] = DEFAULTS.ks
    draws: int = DEFAULTS.draws
    seed: int = DEFAULTS.seed


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One attack and the results measured under it.

    control: None for the ranked rows, ``random:SEED`` or ``norm``. targets: the places attacked together.
    rows: of each place the rows the attack is named for.
    """

    attack: Attack
    control: str | None
    targets: Group
    rows: tuple[tuple[int, ...], ...]
    measured: tuple[Measured, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers attacked together."""
        return tuple(target.layer for target in self.targets)

    @property
    def place(self) -> str:
        """The layers as they are named on the command line: `11`, or `2+11`."""
        return "+".join(map(str, self.layers))


@dataclass(frozen=True, slots=True, repr=False, kw_only=True)
class Ablation:
    """The results of a sweep: the baseline, every run, the verdicts, and notes for the user.

    head: what its document says of the model; None where it is unknown.
    """

    baseline: tuple[Measured, ...]
    runs: tuple[Run, ...]
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]
    head: Head | None = None

    def to_dict(self) -> dict[str, Any]:
        """The document of schema mwtool.ablate/1, as `mwtool ablate --json` prints it."""
        from mwtool.ablation.document import document_of_ablation

        return document_of_ablation(self)

    def to_frame(self) -> Any:
        """A pandas DataFrame, one line a run and task. Raises BadValue where pandas is not installed."""
        from mwtool.ablation.document import run_records

        return frame_of(run_records(self))

    def __repr__(self) -> str:
        """One line: the model, and how much was measured."""
        model = None if self.head is None else self.head.keys["model"]
        return f"Ablation({model!r}, runs={len(self.runs)}, tasks={[one.task for one in self.baseline]})"

    def _repr_html_(self) -> str:
        from mwtool.ablation.document import run_records

        return html_of(repr(self), run_records(self))


OnRun = Callable[[int, int, str], OnProgress | None]
"""Called before each run with the runs done, their total, and its name; may return a progress callback."""


def ablate(
    loaded: Loaded,
    groups: Sequence[Group],
    tasks: Sequence[Task],
    sweep: Sweep,
    options: Options | None = None,
    *,
    on_run: OnRun | None = None,
) -> Ablation:
    """Measure every task on the unchanged model, under every attack, and under its controls.

    groups: rows to attack, those of one group together, one group after the other.
    The model is attacked in place and put back after each run. A perplexity is measured under all attacks batch by
    batch, running only the layers an attack can change. Raises BadValue before anything runs where rows or tasks do
    not fit; what is not finite is reported as such in `Measured`.
    """
    options = options or Options()
    ready = prepare(loaded, tasks, options)
    plans = [plan for group in groups for plan in _plans(loaded, group, sweep)]
    means = means_for(loaded, groups, sweep, ready)
    _try(loaded, plans, means)
    distinct: dict[Any, _Plan] = {}
    for plan in plans:
        if not plan.attack.idle:
            distinct.setdefault(plan.same, plan)
    measuring = _Measuring(
        loaded=loaded,
        plans=list(distinct.values()),
        means=means,
        tasks=ready,
        options=options,
        on_run=on_run,
    )
    baseline, *under = measuring.all()
    found = dict(zip(distinct, under, strict=True))
    runs = [
        Run(
            attack=plan.attack,
            control=plan.control,
            targets=plan.targets,
            rows=plan.rows,
            measured=found.get(plan.same, baseline),
        )
        for plan in plans
    ]
    notes = [note for one in ready for note in one.notes] + _notes(groups, sweep, plans)
    return Ablation(
        baseline=baseline,
        runs=tuple(runs),
        verdicts=tuple(verdicts(baseline, runs)),
        notes=tuple(notes),
        head=head_of(loaded, seed=sweep.seed),
    )


@contextmanager
def ablated(
    model: PreTrainedModel | PeftModel,
    massive: MassiveWeights | Sequence[MassiveWeights] | None,
    *,
    mode: str = "zero",
    k: int = 5,
    windows: Iterable[Tensor] | None = None,
) -> Iterator[None]:
    """Attack the massive rows of a transformers model, wrapped by PEFT or not, inside the block.

    massive: rows of one layer, or of several, which are attacked together.
    mode: ``zero``, ``retain``, ``scale:X`` or ``mean``. windows: token ids, each (T,), over which ``mean`` averages.
    Under PEFT the rows are those of the pre-trained weights. Raises BadValue, also for None, which is what the scan of
    a model without massive weights gives, and UnsupportedModel.
    """
    if massive is None or massive == ():
        raise BadValue("there are no massive weights to attack: the scan found none")
    base: Any = unwrapped(model)
    layers = tuple(decoder_layers(adapter_for(base.config.model_type), base.config))
    attack, edits = parse_mode(mode).at(k), []
    windows = () if windows is None else list(windows)
    for one in massive if isinstance(massive, Sequence) else (massive,):
        ffn = ffn_at(layers, one.layer, one.expert)
        means = mean_state(model, base, ffn, layers[one.layer].path, windows) if attack.mode == "mean" else None
        edits.append(Edit(ffn, rows_of(one, attack), means))
    with edited_together(base, edits, attack):
        yield


def mean_state(model: Any, base: Any, ffn: FFN, layer: str, windows: Iterable[Tensor]) -> Tensor:
    """The mean intermediate state over all tokens of the windows, (I,), float64; each forward ends at the layer.

    A routed expert's is over the tokens it receives. Raises BadValue where it receives none.
    """

    def stop(_module: Any, _args: Any, _output: Any) -> None:
        raise _Stop

    windows = list(windows)
    check_vocabulary(model, windows)
    device = model.get_input_embeddings().weight.device
    handle = base.get_submodule(layer).register_forward_hook(stop)
    try:
        with averaging(base, ffn) as average, torch.inference_mode():
            for ids in windows:
                with suppress(_Stop):
                    model(input_ids=ids[None].to(device), use_cache=False)
    finally:
        handle.remove()
    if average.values is None and ffn.expert is None:
        raise BadValue("mean needs windows=, token ids over which to take the rows' mean values; none were given")
    if average.values is None:
        raise BadValue(f"{ffn.module}: no token of the text is routed to expert {ffn.expert}, so there is no mean")
    return average.values.clone()


def controls_of(run: Run, runs: Sequence[Run]) -> list[Run]:
    """The controls of a run: the same attack on as many other rows."""
    return [one for one in runs if one.control and (one.attack, one.targets) == (run.attack, run.targets)]


def verdicts(baseline: Sequence[Measured], runs: Sequence[Run]) -> Iterator[Verdict]:
    """A verdict for each attack on ranked rows and each perplexity."""
    for run in runs:
        if run.control is not None or run.attack.idle or run.attack.k == 0:
            continue
        beside = controls_of(run, runs)
        norm = next((one for one in beside if one.control == "norm"), None)
        for at, (attacked, plain) in enumerate(zip(run.measured, baseline, strict=True)):
            found = judge(
                run.attack,
                attacked,
                plain,
                random=[one.measured[at] for one in beside if one.control != "norm"],
                norm=None if norm is None else norm.measured[at],
                shared=0 if norm is None else _shared(run, norm),
                layers=run.layers,
                experts=tuple(target.ffn.expert for target in run.targets),
            )
            if found is not None:
                yield found


def _shared(run: Run, other: Run) -> int:
    """How many rows both attack."""
    return sum(len({*ours} & {*theirs}) for ours, theirs in zip(run.rows, other.rows, strict=True))


class _Stop(Exception):
    """Ends a forward after the requested layer."""


@dataclass(frozen=True, slots=True)
class _Plan:
    attack: Attack
    control: str | None
    targets: Group
    rows: tuple[tuple[int, ...], ...]

    @property
    def same(self) -> tuple[Attack, frozenset[tuple[int, int | None, frozenset[int]]]]:
        """Equal for the same attack on the same rows: rows of largest norm may be the massive ones."""
        places = zip(self.targets, self.rows, strict=True)
        return self.attack, frozenset((one.layer, one.ffn.expert, frozenset(rows)) for one, rows in places)

    @property
    def name(self) -> str:
        beside = "" if self.control is None else f" ({self.control})"
        several = "layers" if len(self.targets) > 1 else "layer"
        return f"{several} {'+'.join(str(one.layer) for one in self.targets)}, {self.attack}{beside}"


def _plans(loaded: Loaded, group: Group, sweep: Sweep) -> Iterator[_Plan]:
    wanted = sweep.draws > 0 and max(sweep.ks) > 0
    # reads all rows: once
    largest = [norm_rows(loaded, target, max(sweep.ks)) if wanted else None for target in group]
    for mode in sweep.modes:
        for k in sweep.ks:
            attack = mode.at(k)
            yield _Plan(attack, None, group, tuple(target.indices[:k] for target in group))
            if k > 0 and sweep.draws > 0:
                yield from _controls(loaded, group, attack, sweep, largest)


def _controls(
    loaded: Loaded, group: Group, attack: Attack, sweep: Sweep, largest: Sequence[tuple[int, ...] | None]
) -> Iterator[_Plan]:
    """As many rows of each place; the draws of several places are apart, with seeds of their own."""
    for seed in range(sweep.seed, sweep.seed + sweep.draws):
        drawn = [
            random_rows(target, target.ffn.width(loaded.base), attack.k, seed + at * sweep.draws)
            for at, target in enumerate(group)
        ]
        if (rows := _complete(drawn)) is not None:
            yield _Plan(attack, f"random:{seed}", group, rows)
    if (rows := _complete(largest)) is not None:
        yield _Plan(attack, "norm", group, tuple(one[: attack.k] for one in rows))


def _complete(rows: Sequence[tuple[int, ...] | None]) -> tuple[tuple[int, ...], ...] | None:
    """The rows of every place, or None where one has none."""
    found = tuple(one for one in rows if one is not None)
    return found if len(found) == len(rows) else None


Means = dict[tuple[int, int | None], Tensor]
"""The mean intermediate state, (I,), of the network of a layer and expert; empty where no mode needs it."""


def edits_of(targets: Group, rows: Sequence[tuple[int, ...]], means: Means) -> list[Edit]:
    """These rows of each place, with their means where there are any."""
    return [
        Edit(target.ffn, some, means.get((target.layer, target.ffn.expert)))
        for target, some in zip(targets, rows, strict=True)
    ]


def _try(loaded: Loaded, plans: Sequence[_Plan], means: Means) -> None:
    """Enter every mode in every place once, so that what is unsupported raises now and not after hours."""
    for plan in {(plan.targets, plan.attack.name): plan for plan in plans}.values():
        with edited_together(loaded.base, edits_of(plan.targets, plan.rows, means), plan.attack):
            pass


def means_for(loaded: Loaded, groups: Sequence[Group], sweep: Sweep, tasks: Sequence[Prepared]) -> Means:
    """Mean intermediate states, (I,), over the windows of all perplexity tasks; none unless a mode needs them.

    Raises BadValue if there is no perplexity task.
    """
    if all(mode.mode != "mean" for mode in sweep.modes):
        return {}
    windows = [ids for one in tasks if isinstance(one, PerplexityTask) for ids in one.windows.ids]
    if not windows:
        raise BadValue("mean needs windows to take the rows' mean values over; add a perplexity task, such as ppl:FILE")
    return {
        (target.layer, target.ffn.expert): mean_state(
            loaded.model, loaded.base, target.ffn, loaded.layers[target.layer].path, windows
        )
        for target in dict.fromkeys(target for group in groups for target in group)
    }


@dataclass(slots=True, kw_only=True)
class _Measuring:
    """All tasks on the unchanged model and under every plan: perplexities batch by batch, other tasks plan by plan."""

    loaded: Loaded
    plans: Sequence[_Plan]
    means: Means
    tasks: Sequence[Prepared]
    options: Options
    on_run: OnRun | None
    done: int = 0
    measured: list[list[Measured]] = field(default_factory=list)

    def all(self) -> list[tuple[Measured, ...]]:
        """The metrics of all tasks in order, for the baseline and then for each plan."""
        others = [one for one in self.tasks if not isinstance(one, PerplexityTask)]
        found: dict[int, list[list[Measured]]] = {}
        for one in self.tasks:
            if isinstance(one, PerplexityTask):
                found[id(one)] = [[measured] for measured in self._batchwise(one)]
        for plan in (None, *self.plans) if others else ():
            with self.applied(plan):
                for one in others:
                    name = f"{'baseline' if plan is None else plan.name}, {one.task}"
                    found.setdefault(id(one), []).append(one.run(self.loaded, self.options, self._next(name)))
        runs = range(1 + len(self.plans))
        return [tuple(measured for one in self.tasks for measured in found[id(one)][at]) for at in runs]

    def applied(self, plan: _Plan | None) -> AbstractContextManager[None]:
        """The model under this plan."""
        if plan is None:
            return edited_together(self.loaded.base, (), Attack())
        return edited_together(self.loaded.base, edits_of(plan.targets, plan.rows, self.means), plan.attack)

    def _batchwise(self, task: PerplexityTask) -> list[Measured]:
        variants = [Variant(min(one.layer for one in plan.targets), partial(self.applied, plan)) for plan in self.plans]
        return task.under(self.loaded, variants, self.options, self._next(f"{task.task} under all attacks"))

    def _next(self, name: str) -> OnProgress | None:
        """Called before each part of the work: a perplexity under all attacks, or another task under one."""
        apart = sum(isinstance(one, PerplexityTask) for one in self.tasks)
        total = apart + (len(self.tasks) - apart) * (1 + len(self.plans))
        self.done += 1
        return None if self.on_run is None else self.on_run(self.done - 1, total, name)


def _notes(groups: Sequence[Group], sweep: Sweep, plans: Sequence[_Plan]) -> list[str]:
    notes = []
    biased = next((one.ffn for group in groups for one in group if one.ffn.up_bias or one.ffn.gate_bias), None)
    if biased is not None:
        notes.append(f"the rows of {biased.module} have biases, which are attacked with them")
    wanted = sweep.draws > 0 and max(sweep.ks) > 0
    if wanted and not any(plan.control == "norm" for plan in plans):
        notes.append("the weights are quantized or offloaded: rows of largest norm are left out of the controls")
    if wanted and len([p for p in plans if p.control and p.control != "norm"]) < sum(
        sweep.draws for mode in sweep.modes for k in sweep.ks if k > 0 for _ in groups
    ):
        notes.append("an FFN has too few rows beside the ranked ones to draw as many at random for every k")
    return notes
