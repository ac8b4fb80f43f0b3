"""The document of an ablation, schema mwtool.ablate/1. docs/json.md describes every key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from mwtool.ablation.head import head_of
from mwtool.ablation.measuring import Measurements
from mwtool.ablation.resume import measurements_document
from mwtool.ablation.sweep import Ablation, Run
from mwtool.ablation.verdict import Verdict
from mwtool.evaluation.comparison import Ratio, named, paired, points_of, ratio_of
from mwtool.evaluation.measurement import Measured
from mwtool.evaluation.task_mean import mean_document, task_means
from mwtool.files.document import finite
from mwtool.massive import RankedEvent
from mwtool.models.load import Loaded


def ablate_document(
    loaded: Loaded,
    found: Ablation,
    *,
    seed: int = 0,
    command: str | None = None,
    generated: Sequence[tuple[str, str]] = (),
    saved: str | None = None,
) -> dict[str, Any]:
    """The document. Numbers that are not finite are null, and `nonfinite` gives the reason."""
    head = found.head or head_of(loaded)
    head = replace(head, keys={**head.keys, "seed": seed, "command": command})
    return document_of_ablation(replace(found, head=head), generated=generated, saved=saved)


def document_of_ablation(
    found: Ablation, *, generated: Sequence[tuple[str, str]] = (), saved: str | None = None
) -> dict[str, Any]:
    """The document of an ablation. Raises ValueError where it has no `head`, so that its model is unknown."""
    if found.head is None:
        raise ValueError("this ablation has no head; expected one that `ablate` returned")
    from mwtool.ablation.schema import AblateDocument
    from mwtool.files.schema import checked

    baseline = named(found.baseline)
    document = {
        **found.head.keys,
        "massive": _massive(found),
        "events": [one.document() for one in _events(found)],
        "tasks": [_task(name, one) for name, one in baseline.items()],
        "baseline": {name: finite(one.value) for name, one in baseline.items()},
        "nonfinite": _nonfinite(baseline),
        "runs": [_run(run, baseline) for run in found.runs],
        "means": list(_means(found)),
        "verdicts": [_verdict(one) for one in found.verdicts],
        "generated": [{"attack": attack, "text": text} for attack, text in generated],
        "saved": saved,
        "complete": found.complete,
        **measurements_document(found.measurements or Measurements()),
        "notes": list(dict.fromkeys((*found.head.notes, *found.notes))),
    }
    return checked(AblateDocument, document)


def run_records(found: Ablation) -> list[dict[str, Any]]:
    """One line a run and task, with the interval of its ratio."""
    baseline = named(found.baseline)
    return [
        {
            "mode": run.attack.name,
            "k": run.attack.k,
            "control": run.control,
            "layers": run.place,
            "task": name,
            "value": one.value,
            "ratio": None if ratio is None else ratio.value,
            "low": None if ratio is None else ratio.low,
            "high": None if ratio is None else ratio.high,
            "points": points_of(one, baseline[name]),
        }
        for run in found.runs
        for name, one in named(run.measured).items()
        for ratio in [ratio_of(one, baseline[name])]
    ]


def _massive(found: Ablation) -> dict[str, Any] | None:
    """The ranked rows attacked, where all attacks are on those of one place; what `--massive FILE` reads."""
    places = {run.targets for run in found.runs}
    target = next(iter(places))[0] if len(places) == 1 and len(next(iter(places))) == 1 else None
    return None if target is None or target.ranked is None else target.ranked.document()


def _events(found: Ablation) -> list[RankedEvent]:
    """The events whose rows were attacked, which `--massive FILE --event N` reads."""
    events = [target.event for run in found.runs for target in run.targets if target.event is not None]
    return list({one.event: one for one in events}.values())


def _task(name: str, one: Measured) -> dict[str, Any]:
    return {
        "name": name,
        "task": one.task,
        "metric": one.metric,
        "higher_is_better": one.higher_is_better,
        "n": one.n,
        "digest": one.digest,
        "setting": one.setting,
    }


def _run(run: Run, baseline: dict[str, Measured]) -> dict[str, Any]:
    results = named(run.measured)
    ratios = {name: ratio_of(one, baseline[name]) for name, one in results.items()}
    changes = {name: points_of(one, baseline[name]) for name, one in results.items()}
    return {
        "mode": run.attack.name,
        "k": run.attack.k,
        "control": run.control,
        **_first_place(run),
        "places": [
            {"layer": target.layer, "module": target.module, "expert": target.expert, "indices": list(rows)}
            for target, rows in zip(run.targets, run.rows, strict=True)
        ],
        "results": {name: finite(one.value) for name, one in results.items()},
        "ratio": {name: None if ratio is None else finite(ratio.value) for name, ratio in ratios.items()},
        "interval": {name: _interval(ratio) for name, ratio in ratios.items()},
        "delta": {name: None if points is None else finite(points) for name, points in changes.items()},
        "delta_interval": {name: _points_interval(one, baseline[name]) for name, one in results.items()},
        "nonfinite": _nonfinite(results),
    }


def _points_interval(one: Measured, plain: Measured) -> list[float] | None:
    """The interval of the difference in points, paired by questions; None for a perplexity, or with too few."""
    found = paired(one, plain)
    if found is None or found.kind == "ratio" or found.low is None or found.high is None:
        return None
    scale, change = 1 if found.kind == "points" else 100, 100 * (one.value - plain.value)
    return [min(scale * found.low, change), max(scale * found.high, change)]  # where they differ by rounding alone


def _means(found: Ablation) -> Iterator[dict[str, Any]]:
    """Mean accuracies over tasks: of the unchanged model, whose mode is null, and of each run, compared with it."""
    plain = {one.metric: one for one in task_means(found.baseline)}
    for one in plain.values():
        yield {"mode": None, "k": None, "control": None, "layers": None, **mean_document(one, None)}
    for run in found.runs:
        name = {"mode": run.attack.name, "k": run.attack.k, "control": run.control, "layers": list(run.layers)}
        for one in task_means(run.measured):
            yield {**name, **mean_document(one, plain.get(one.metric))}


def _first_place(run: Run) -> dict[str, Any]:
    """The place of an attack on one layer; null for each of several, which `places` lists."""
    if len(run.targets) > 1:
        return {"layer": None, "module": None, "expert": None, "indices": None}
    target = run.targets[0]
    return {
        "layer": target.layer,
        "module": target.module,
        "expert": target.expert,
        "indices": list(run.rows[0]),
    }


def _verdict(one: Verdict) -> dict[str, Any]:
    return {
        "mode": one.attack.name,
        "k": one.attack.k,
        "layer": one.layers[0] if len(one.layers) == 1 else None,
        "expert": one.experts[0] if len(one.experts) == 1 else None,
        "layers": list(one.layers),
        "task": one.task,
        "ratio": finite(one.ratio.value),
        "interval": _interval(one.ratio),
        "random": [finite(value) for value in one.random],
        "norm": None if one.norm is None else finite(one.norm),
        "norm_shared": one.norm_shared,
        "beyond": None if one.beyond is None else finite(one.beyond.value),
        "beyond_interval": _interval(one.beyond),
        "text": one.text,
    }


def _interval(ratio: Ratio | None) -> list[float | None] | None:
    if ratio is None or ratio.low is None or ratio.high is None:
        return None
    return [finite(ratio.low), finite(ratio.high)]


def _nonfinite(results: dict[str, Measured]) -> dict[str, str]:
    return {name: one.nonfinite for name, one in results.items() if one.nonfinite}
