"""A fine-tuning run as text for people, with Rich: the plan, p over the steps, the outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mwtool.files.units import duration, size
from mwtool.finetune.config import AUTO
from mwtool.macdrop.curriculum import Curriculum

if TYPE_CHECKING:
    from mwtool.finetune.config import Recipe
    from mwtool.finetune.memory import Footprint
    from mwtool.finetune.plan import Plan
    from mwtool.finetune.trial import Trial

HEIGHT = 10
"""Lines of the drawing of p."""
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def curriculum_chart(curriculum: Curriculum, steps: int, per_epoch: int, width: int = 80) -> RenderableType:
    """p over the steps as bars from 0 to 1, and its value at the start, the middle and the end."""
    values = curriculum.values(steps, per_epoch)
    columns = max(10, width - 6)
    bars = [values[at * steps // columns] for at in range(columns)]
    lines = []
    for line in range(HEIGHT, 0, -1):
        label = f"{line / HEIGHT:.1f}" if line % 2 == 0 else "   "
        lines.append(f"{label} │{''.join(_cell(p * HEIGHT - (line - 1)) for p in bars)}")
    last = str(steps)
    axis = ["0.0 └" + "─" * columns, "     1" + last.rjust(columns - 1)]
    epochs = -(-steps // per_epoch)
    over = f"{steps:,} steps, {epochs} epoch{'s' if epochs > 1 else ''}"
    return Group(Text(f"p of {curriculum} over {over}"), Text("\n".join([*lines, *axis])), _points(values))


def plan_report(
    plan: Plan, footprint: Footprint, width: int = 80, *, trial: Trial | None = None, before: float = 0.0
) -> RenderableType:
    """What `--dry-run` shows. before: seconds from the start of the process to the trial."""
    lines = _process_rows(footprint) if trial is None else _trial_rows(plan, trial, before)
    parts: list[RenderableType] = [plan_table(plan, footprint, lines)]
    if plan.places:
        parts += [Text(), curriculum_chart(plan.recipe.curriculum, plan.steps, plan.per_epoch, width)]
    return Group(*parts)


def plan_table(plan: Plan, footprint: Footprint, more: Sequence[tuple[str, str]] = ()) -> RenderableType:
    """What is trained, on what, in how many steps. more: lines below."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for name, value in (*_plan_rows(plan, footprint), *more):
        table.add_row(name, Text(value))
    return table


def outcome_report(document: dict[str, Any], folder: str) -> RenderableType:
    """What a finished run shows."""
    found, steps = document["measured"], document["steps"]
    lines = [f"{steps:,} step{'s' if steps > 1 else ''}; the adapter is in {folder}"]
    data = document["data"]
    if data["trained_rows"] < data["rows"] + data["unreadable"] or data["cut"]:
        lines.append(f"records        {records_line(data)}")
    if found["first_loss"] is not None:
        lines.append(f"loss           {found['first_loss']:.4f} -> {found['last_loss']:.4f}")
    if found["last_eval_loss"] is not None:
        lines.append(f"held-out loss  {found['first_eval_loss']:.4f} -> {found['last_eval_loss']:.4f}")
    if found["step_seconds"] is not None:
        lines.append(f"a step         {found['step_seconds']:.3g} s{_macdrop_share(found)}")
    return Text("\n".join(lines))


def _macdrop_share(found: Mapping[str, Any]) -> str:
    """What MacDrop took of a step, as measured in the run."""
    took, whole = found.get("macdrop_seconds"), found["step_seconds"]
    if took is None:
        return ""
    return f", of which masking and restoring {1000 * took:.2g} ms ({took / whole:.2%}): {whole - took:.3g} s without"


def _plan_rows(plan: Plan, footprint: Footprint) -> list[tuple[str, str]]:
    recipe, held = plan.recipe, 0 if plan.held is None else len(plan.held)
    lengths = [len(ids) for ids in plan.train.ids]
    tokens, learned = sum(lengths), plan.train.trained_tokens
    about = "about" if recipe.batch_size != AUTO else "with one sequence at once about"
    if footprint.activations is None:
        about = "besides activations"
    examples = "one text" if plan.data.stream else f"{records_line(plan.records.counts())} ({plan.data.form})"
    rows = "none: trained without MacDrop"
    if plan.places:
        shown = "; ".join(
            f"{', '.join(map(str, one.indices[: recipe.curriculum.k]))} of {one.module} (layer {one.layer})"
            for one in plan.places
        )
        rows = f"{recipe.curriculum.scope}: {shown}"
    return [
        ("model", f"{plan.source.name}, {footprint.parameters:,} parameters"),
        ("data", f"{plan.data.name}: {examples}"),
        ("sequences", f"{len(lengths):,} of {tokens / len(lengths):,.0f} tokens on average, {held:,} held out"),
        ("tokens", f"{tokens:,} an epoch, of which {learned:,} are trained on"),
        ("steps", f"{plan.steps:,}, {plan.per_epoch:,} an epoch; a batch is {_batch(plan)}"),
        ("adapter", f"{recipe.peft}, rank {recipe.rank}: {footprint.trainable:,} parameters, {footprint.share:.3%}"),
        ("rows", rows),
        ("memory", f"{about} {size(footprint.total)} a device: {footprint.parts}"),
    ]


def _process_rows(footprint: Footprint) -> list[tuple[str, str]]:
    if footprint.process is None:
        return []
    return [("process", f"about {size(footprint.process)} resident at most, with libraries and mapped files")]


def _trial_rows(plan: Plan, trial: Trial, before: float) -> list[tuple[str, str]]:
    """What a few steps took, and what follows for all."""
    held = {"process": trial.process, "tensors on the GPU": trial.gpu}
    shown = ", ".join(f"{name} {size(count)}" for name, count in held.items() if count is not None)
    whole = before + trial.total(plan.steps, plan.per_epoch)
    return [
        ("measured", f"{shown}, in a trial of a few steps"),
        ("time", f"about {duration(whole)} from start to end, {duration(trial.step)} a step"),
    ]


def records_line(counts: Mapping[str, int]) -> str:
    """What became of the records: how many are trained on, and how many are not, by reason.

    counts: as `Records.counts` gives them.
    """
    reasons = {
        "too_long": "too long",
        "too_short": "too short",
        "untrained": "without an answer to train on",
        "unreadable": "unreadable",
        "cut": "cut off after the last answer",
    }
    parts = [f"{counts[key]:,} {words}" for key, words in reasons.items() if counts.get(key)]
    trained, read = counts["trained_rows"], counts["rows"] + counts["unreadable"]
    return ", ".join([f"{trained:,} of {read:,} records are trained on", *parts])


def _batch(plan: Plan) -> str:
    recipe, accumulated = plan.recipe, plan.recipe.accumulation(plan.processes)
    processes = f" x {plan.processes} processes" if plan.processes > 1 else ""
    if recipe.batch_size == AUTO:
        return f"{recipe.effective_batch} (at once: as many as fit, found by trial steps{processes})"
    return f"{recipe.effective_batch} ({recipe.batch_size} at once x {accumulated} accumulated{processes})"


def at_once_line(recipe: Recipe) -> str:
    """What trial steps found."""
    sequences = f"{recipe.at_once} sequence{'s' if recipe.at_once > 1 else ''} at once"
    activations = "recomputed" if recipe.gradient_checkpointing else "kept"
    return f"{sequences}, activations {activations}, {'without' if recipe.padding_free else 'with'} padding"


def _points(values: Sequence[float]) -> Text:
    middle = (len(values) - 1) // 2
    at = {1: values[0], middle + 1: values[middle], len(values): values[-1]}
    return Text("p " + ", ".join(f"{p:.4g} at step {t:,}" for t, p in at.items()))


def _cell(height: float) -> str:
    return _EIGHTHS[max(0, min(8, round(8 * height)))]
