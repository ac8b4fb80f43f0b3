"""A sweep of attacks on one loaded model: modes times k, with controls that tell "massive" from "important"."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from mwtool.ablation.config import AblateConfig
from mwtool.ablation.head import Head, head_of
from mwtool.ablation.means import mean_state, means_for
from mwtool.ablation.measuring import Measurements, Measuring, OnRun
from mwtool.ablation.plans import Key, Plan, distinct_of, notes_of, plans_of
from mwtool.ablation.verdict import Verdict, judge
from mwtool.architecture.registry import adapter_for
from mwtool.architecture.validate import decoder_layers, ffn_at, unwrapped
from mwtool.errors import BadValue
from mwtool.evaluation.compiled import compile_lines, refuse_idle
from mwtool.evaluation.config import Options
from mwtool.evaluation.evaluate import Prepared, prepare
from mwtool.evaluation.measurement import Measured
from mwtool.evaluation.tasks import Task
from mwtool.files.tabular import frame_of, html_of
from mwtool.models.load import Loaded
from mwtool.scan.targets import Group
from mwtool.surgery.attack import Attack, Edit, edited_together, parse_mode, rows_of

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
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

    head: what its document says of the model; None where it is unknown. measurements: every metric with its samples, by
    attack; None where they were not kept. complete: whether every task has been measured under every attack; of an
    incomplete sweep, the fields above are about the tasks that have.
    """

    baseline: tuple[Measured, ...]
    runs: tuple[Run, ...]
    verdicts: tuple[Verdict, ...]
    notes: tuple[str, ...]
    head: Head | None = None
    measurements: Measurements | None = None
    complete: bool = True

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


def ablate(
    loaded: Loaded,
    groups: Sequence[Group],
    tasks: Sequence[Task],
    sweep: Sweep,
    options: Options | None = None,
    *,
    on_run: OnRun | None = None,
    resumed: Callable[[Sequence[Plan], Sequence[Prepared]], Measurements] | None = None,
    on_saved: Callable[[Ablation], None] | None = None,
) -> Ablation:
    """Measure every task on the unchanged model, under every attack, and under its controls.

    groups: rows to attack, those of one group together, one group after the other.
    The model is attacked in place and put back after each run. A perplexity is measured under all attacks batch by
    batch, running only the layers an attack can change.

    on_run: see `OnRun`. resumed: gives what was measured before, once it is known what is to be measured; see
    `resume.earlier_measurements`. on_saved: called with the results so far, after each task under each attack and in
    the course of a perplexity. Raises BadValue before anything runs where rows or tasks do
    not fit; what is not finite is reported as such in `Measured`.
    """
    options = options or Options()
    refuse_idle(tasks, compiled=options.compile)
    ready = prepare(loaded, tasks, options)
    plans = [plan for group in groups for plan in plans_of(loaded, group, sweep)]
    measurements = Measurements() if resumed is None else resumed(plans, ready)
    means = means_for(loaded, groups, sweep, ready)
    measuring = Measuring(
        loaded=loaded,
        plans=distinct_of(plans),
        means=means,
        tasks=ready,
        options=options,
        measurements=measurements,
        on_run=on_run,
    )
    _try(measuring, plans)
    head = head_of(loaded, seed=sweep.seed, options=options)
    notes = [note for one in ready for note in one.notes] + notes_of(groups, sweep, plans)
    if on_saved is not None:
        measuring.on_saved = lambda: on_saved(_ablation(measuring, plans, notes, head))
    measuring.run()
    return _ablation(measuring, plans, notes, head)


def _ablation(measuring: Measuring, plans: Sequence[Plan], notes: Sequence[str], head: Head) -> Ablation:
    """What is known so far: of the tasks that have been measured under all attacks."""
    complete = measuring.complete()
    compiled = compile_lines(
        one for metrics in measuring.measurements.found.values() for one in chain(*metrics.values())
    )
    found = measuring.measurements

    def measured(key: Key | None) -> tuple[Measured, ...]:
        return tuple(one for task in complete for one in found.of(key)[str(task.task)])

    baseline = measured(None)
    runs = [
        Run(
            attack=plan.attack,
            control=plan.control,
            targets=plan.targets,
            rows=plan.rows,
            measured=measured(plan.same),
        )
        for plan in plans
    ]
    return Ablation(
        baseline=baseline,
        runs=tuple(runs),
        verdicts=tuple(verdicts(baseline, runs)),
        notes=(*notes, *compiled),
        head=head,
        measurements=found,
        complete=len(complete) == len(measuring.tasks),
    )


def _try(measuring: Measuring, plans: Sequence[Plan]) -> None:
    """Enter every mode in every place once, so that what is unsupported raises now and not after hours."""
    for plan in {(plan.targets, plan.attack.name): plan for plan in plans}.values():
        with measuring.applied(plan):
            pass


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
