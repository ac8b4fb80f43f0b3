"""A scan as a sentence: what each write does to its dimension, and what happens to a dimension over depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from mwtool.scan.definitions import Trace, Write
    from mwtool.scan.scanner import Scan

Label = Literal["write", "rewrite", "build-up", "erase", "reduce"]

SEVERAL = 3
"""A dimension is built up by at least this many `up` writes, none of which makes half of its largest value."""

FLOAT16 = 65504.0
"""The largest finite float16."""


@dataclass(frozen=True, slots=True)
class Step:
    """One write to a dimension. label: `write`; `rewrite` after an erasure; `build-up`; `erase` to less than half."""

    layer: int
    label: Label
    write: Write


def steps(scan: Scan, dimension: int) -> tuple[Step, ...]:
    """All writes of a large part of one massive dimension, first layer first, headlined or not."""
    found = [
        (event.layer, one) for event in scan.events for one in (event, *event.others) if one.dimension == dimension
    ]
    built = built_up(scan, dimension)
    erased, labelled = False, []
    for layer, one in found:
        label: Label
        if one.kind == "up":
            label = "rewrite" if erased else "build-up" if built else "write"
        else:
            label = "erase" if abs(one.after) < abs(one.before) / 2 else "reduce"
        erased = erased or label == "erase"
        labelled.append(Step(layer, label, one))
    return tuple(labelled)


def label_of(scan: Scan, number: int) -> Label:
    """The label of an event, by its number."""
    event = scan.events[number]
    return next(step.label for step in steps(scan, event.dimension) if step.layer == event.layer)


def built_up(scan: Scan, dimension: int) -> bool:
    """Whether many layers write a dimension and none of them most of it."""
    up = _ups(scan, dimension)
    return len(up) >= SEVERAL and max(abs(one.written) for _, one in up) < peak(scan, dimension)[1] / 2


def build_up(scan: Scan, dimension: int) -> str | None:
    """A sentence where a dimension is built up over many layers; None where it is not."""
    if not built_up(scan, dimension):
        return None
    (_, value), up = peak(scan, dimension), _ups(scan, dimension)
    parts = [abs(one.written) / value for _, one in up]
    return (
        f"Layers {listed([layer for layer, _ in up])} write {min(parts):.0%} to {max(parts):.0%} of dimension "
        f"{dimension}'s largest value ({value:,.0f}) each: a build-up, so the rows of one layer may not matter."
    )


def _ups(scan: Scan, dimension: int) -> list[tuple[int, Write]]:
    every = [(event.layer, one) for event in scan.events for one in (event, *event.others)]
    return [
        (layer, one)
        for layer, one in every
        if one.dimension == dimension and one.kind == "up" and layer < scan.identity.layers - 1
    ]


def trace(scan: Scan, dimension: int) -> Trace:
    """The trace of a massive dimension."""
    return next(one for one in scan.dimensions if one.dimension == dimension)


def peak(scan: Scan, dimension: int) -> tuple[int, float]:
    """Layer and magnitude of the largest |h_l[d]| before the model's last layer."""
    values = [abs(value) for value in trace(scan, dimension).values[: scan.identity.layers - 1]]
    return values.index(max(values)), max(values)


def story(scan: Scan, dimension: int) -> str:
    """What happens to a dimension over depth, in a sentence.

    Such as: Dimension 507 is written at layers 1 and 2, erased at 9, written again at 11 and removed at 28 and 29.
    """
    every = steps(scan, dimension)
    last_up = max((step.layer for step in every if step.write.kind == "up"), default=-1)
    verbs = [(_verb(step, final=step.layer > last_up, every=every), step.layer) for step in every]
    phrases: list[str] = []
    for verb, group in groupby(verbs, key=lambda pair: pair[0]):
        layers = [layer for _, layer in group]
        place = "" if phrases else "layers " if len(layers) > 1 else "layer "
        phrases.append(f"{verb} at {place}{listed(layers)}")
    return f"Dimension {dimension} is {_joined(phrases)}."


def _verb(step: Step, *, final: bool, every: Sequence[Step]) -> str:
    if step.write.kind == "up":
        return {"write": "written", "rewrite": "written again"}.get(step.label, "built up")
    left = abs(every[-1].write.after)
    highest = max(abs(one.write.before) for one in every)
    if final and left < highest / 2:
        return "removed"
    return "erased" if step.label == "erase" else "reduced"


def told(scan: Scan, limit: int = 3) -> list[int]:
    """The dimensions worth a sentence: that of the massive layer first, then those of other events by their peak."""
    own = [event.dimension for event in scan.events]
    first = [scan.massive.dimension] if scan.massive is not None and scan.massive.dimension in own else []
    rest = sorted({*own} - {*first}, key=lambda dimension: -peak(scan, dimension)[1])
    return [*first, *rest][:limit]


def overflow(scan: Scan) -> str | None:
    """A warning where the stream exceeds what float16 can hold, naming layer and value."""
    over = [state for state in scan.states if float(state.hidden.abs().max()) > FLOAT16]
    if not over:
        return None
    top = max(over, key=lambda state: float(state.hidden.abs().max()))
    dimension = int(top.hidden.abs().argmax())
    return (
        f"|h| reaches {float(top.hidden.abs().max()):,.0f} after layer {top.layer} (dimension {dimension}), above "
        f"float16's largest value, 65,504, from layer {over[0].layer} on: run this model in bfloat16 or float32."
    )


def listed(numbers: Sequence[int]) -> str:
    """1, 2, 3, 5 -> `1 to 3 and 5`; 1, 2 -> `1 and 2`."""
    parts: list[str] = []
    for run in _runs(numbers):
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 2 else map(str, run)  # noqa: PLR2004 - of three on a range
    return _joined(parts)


def ranges(numbers: Sequence[int]) -> str:
    """1, 2, 3, 5 -> `1-3, 5`."""
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in _runs(numbers))


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
