"""A sweep of attacks on one loaded model: modes times k, beside controls that tell "massive" from "important"."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mwtool.ablation.config import AblateConfig
from mwtool.ablation.targets import Target, norm_rows, random_rows
from mwtool.ablation.verdict import Verdict, judge
from mwtool.architecture.layout import FFN
from mwtool.architecture.registry import adapter_for
from mwtool.architecture.validate import decoder_layers, ffn_at, unwrapped
from mwtool.errors import BadValue
from mwtool.evaluation.config import Options
from mwtool.evaluation.evaluate import Prepared, prepare
from mwtool.evaluation.measurement import Measured, OnProgress
from mwtool.evaluation.perplexity import check_vocabulary
from mwtool.evaluation.tasks import Task
from mwtool.models.load import Loaded
from mwtool.surgery.attack import Attack, edited, parse_mode, rows_of
from mwtool.surgery.hooks import averaging

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from mwtool.massive import MassiveWeights


DEFAULTS = AblateConfig()


@dataclass(frozen=True, slots=True)
class Sweep:
    """What to try.

    modes: attacks without their k; ks: how many of the ranked rows.
    draws: random controls for each, seeded from `seed` on; 0 leaves out both kinds of controls.
    """

    modes: tuple[Attack, ...] = tuple(map(parse_mode, DEFAULTS.modes))
    ks: tuple[int, ...] = DEFAULTS.ks
    draws: int = DEFAULTS.draws
    seed: int = DEFAULTS.seed


@dataclass(frozen=True, slots=True)
class Run:
    """One attack and what was measured under it.

    control: None for the ranked rows, ``random:SEED`` or ``norm``. indices: the rows the attack is named for.
    """

    attack: Attack
    control: str | None
    target: Target
    indices: tuple[int, ...]
    measured: tuple[Measured, ...]


@dataclass(frozen=True, slots=True)
class Ablation:
    """A whole sweep: the baseline, every run, the verdicts, and what the user should know."""

    baseline: tuple[Measured, ...]
    runs: tuple[Run, ...]
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]


OnRun = Callable[[int, int, str], OnProgress | None]
"""Called before a run with runs done, runs in all, and its name; may return what to call on progress."""


def ablate(
    loaded: Loaded,
    targets: Sequence[Target],
    tasks: Sequence[Task],
    sweep: Sweep,
    options: Options | None = None,
    *,
    on_run: OnRun | None = None,
) -> Ablation:
    """Measure every task on the model as it is, under every attack, and under its controls.

    The model is attacked in place and put back after each run. Raises BadValue before anything runs where rows or
    tasks do not fit; what is not finite is reported as such in `Measured`.
    """
    options = options or Options()
    ready = prepare(loaded, tasks, options)
    plans = [plan for target in targets for plan in _plans(loaded, target, sweep)]
    means = {target.layer: means_for(loaded, target, sweep, ready) for target in targets}
    _try(loaded, plans, means)
    distinct: dict[Any, _Plan] = {}
    for plan in plans:
        if not plan.attack.idle:
            distinct.setdefault(plan.same, plan)
    measured = _Measuring(loaded, ready, options, on_run, 1 + len(distinct))
    baseline = measured.under("baseline", None)
    found = {
        same: measured.under(
            plan.name,
            edited(loaded.base, plan.target.ffn, plan.indices, plan.attack, means=means[plan.target.layer]),
        )
        for same, plan in distinct.items()
    }
    runs = [Run(plan.attack, plan.control, plan.target, plan.indices, found.get(plan.same, baseline)) for plan in plans]
    notes = [note for one in ready for note in one.notes] + _notes(targets, sweep, plans)
    return Ablation(baseline, tuple(runs), tuple(verdicts(baseline, runs)), tuple(notes))


@contextmanager
def ablated(
    model: PreTrainedModel | PeftModel,
    massive: MassiveWeights | None,
    *,
    mode: str = "zero",
    k: int = 5,
    windows: Iterable[Tensor] | None = None,
) -> Iterator[None]:
    """A transformers model, wrapped by PEFT or not, with its massive rows attacked inside the block.

    mode: ``zero``, ``retain``, ``scale:X`` or ``mean``. windows: token ids, each (T,), over which ``mean`` averages.
    Under PEFT the rows are those of the pre-trained weights. Raises BadValue, also for None, which is what the scan of
    a model without massive weights gives, and UnsupportedModel.
    """
    if massive is None:
        raise BadValue("there are no massive weights to attack: the scan found none")
    base: Any = unwrapped(model)
    layers = tuple(decoder_layers(adapter_for(base.config.model_type), base.config))
    ffn, attack = ffn_at(layers, massive.layer, massive.expert), parse_mode(mode).at(k)
    means = None
    if attack.mode == "mean":
        means = mean_state(model, base, ffn, layers[massive.layer].path, () if windows is None else windows)
    with edited(base, ffn, rows_of(massive, attack), attack, means=means):
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
    """The same attack on as many rows chosen otherwise."""
    return [one for one in runs if one.control and (one.attack, one.target) == (run.attack, run.target)]


def verdicts(baseline: Sequence[Measured], runs: Sequence[Run]) -> Iterator[Verdict]:
    """One for each attack on ranked rows and each perplexity."""
    for run in runs:
        if run.control is not None or run.attack.idle or run.attack.k == 0:
            continue
        beside = controls_of(run, runs)
        for at, (attacked, plain) in enumerate(zip(run.measured, baseline, strict=True)):
            found = judge(
                run.attack,
                attacked,
                plain,
                random=[one.measured[at] for one in beside if one.control != "norm"],
                norm=next((one.measured[at] for one in beside if one.control == "norm"), None),
                shared=sum(row in run.indices for one in beside if one.control == "norm" for row in one.indices),
                layer=run.target.layer,
                expert=run.target.ffn.expert,
            )
            if found is not None:
                yield found


class _Stop(Exception):
    """Ends a forward after the layer that was asked for."""


@dataclass(frozen=True, slots=True)
class _Plan:
    attack: Attack
    control: str | None
    target: Target
    indices: tuple[int, ...]

    @property
    def same(self) -> tuple[Attack, int, frozenset[int]]:
        """Equal where the same is done to the same rows: those of largest norm may be the massive ones."""
        return self.attack, self.target.layer, frozenset(self.indices)

    @property
    def name(self) -> str:
        beside = "" if self.control is None else f" ({self.control})"
        return f"layer {self.target.layer}, {self.attack}{beside}"


def _plans(loaded: Loaded, target: Target, sweep: Sweep) -> Iterator[_Plan]:
    wanted = sweep.draws > 0 and max(sweep.ks) > 0
    largest = norm_rows(loaded, target, max(sweep.ks)) if wanted else None  # reads all rows: once
    for mode in sweep.modes:
        for k in sweep.ks:
            attack = mode.at(k)
            yield _Plan(attack, None, target, target.indices[:k])
            if k > 0 and sweep.draws > 0:
                yield from _controls(loaded, target, attack, sweep, largest)


def _controls(
    loaded: Loaded, target: Target, attack: Attack, sweep: Sweep, largest: tuple[int, ...] | None
) -> Iterator[_Plan]:
    width = target.ffn.width(loaded.base)
    for seed in range(sweep.seed, sweep.seed + sweep.draws):
        rows = random_rows(target, width, attack.k, seed)
        if rows is not None:
            yield _Plan(attack, f"random:{seed}", target, rows)
    if largest is not None:
        yield _Plan(attack, "norm", target, largest[: attack.k])


def _try(loaded: Loaded, plans: Sequence[_Plan], means: dict[int, Tensor | None]) -> None:
    """Every mode in every place once, changing nothing: a refusal comes before hours of measuring, not after."""
    for plan in {(plan.target.layer, plan.attack.name): plan for plan in plans}.values():
        with edited(loaded.base, plan.target.ffn, plan.indices, plan.attack, means=means[plan.target.layer]):
            pass


def means_for(loaded: Loaded, target: Target, sweep: Sweep, tasks: Sequence[Prepared]) -> Tensor | None:
    """Mean intermediate state over the windows of every perplexity task; None where no mode needs it."""
    if all(mode.mode != "mean" for mode in sweep.modes):
        return None
    windows = [ids for one in tasks for ids in getattr(getattr(one, "windows", None), "ids", ())]
    if not windows:
        raise BadValue("mean needs windows to take the rows' mean values over; add a perplexity task, such as ppl:FILE")
    return mean_state(loaded.model, loaded.base, target.ffn, loaded.layers[target.layer].path, windows)


@dataclass(slots=True)
class _Measuring:
    loaded: Loaded
    tasks: Sequence[Prepared]
    options: Options
    on_run: OnRun | None
    total: int
    done: int = 0

    def under(self, name: str, context: AbstractContextManager[None] | None) -> tuple[Measured, ...]:
        on_progress = None if self.on_run is None else self.on_run(self.done, self.total, name)
        self.done += 1
        if context is None:
            return self._measured(on_progress)
        with context:
            return self._measured(on_progress)

    def _measured(self, on_progress: OnProgress | None) -> tuple[Measured, ...]:
        found = (one.run(self.loaded, self.options, on_progress) for one in self.tasks)
        return tuple(measured for several in found for measured in several)


def _notes(targets: Sequence[Target], sweep: Sweep, plans: Sequence[_Plan]) -> list[str]:
    notes = []
    biased = next((one.ffn for one in targets if one.ffn.up_bias or one.ffn.gate_bias), None)
    if biased is not None:
        notes.append(f"the rows of {biased.module} have biases, which are attacked with them")
    wanted = sweep.draws > 0 and max(sweep.ks) > 0
    if wanted and not any(plan.control == "norm" for plan in plans):
        notes.append("the weights are quantized or offloaded: rows of largest norm are left out of the controls")
    if wanted and len([p for p in plans if p.control and p.control != "norm"]) < sum(
        sweep.draws for mode in sweep.modes for k in sweep.ks if k > 0 for _ in targets
    ):
        notes.append("an FFN has too few rows beside the ranked ones to draw as many at random for every k")
    return notes
