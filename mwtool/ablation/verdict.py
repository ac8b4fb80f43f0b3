"""The verdict on an attack: its ratios to the baseline and to its controls on the same windows, and a sentence."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from mwtool.evaluation.comparison import Ratio, comparable, paired_ratio
from mwtool.evaluation.measurement import Measured
from mwtool.evaluation.numbers import figure, short
from mwtool.surgery.attack import Attack


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One attack compared with its controls, on one perplexity task.

    layers, experts: where its rows are, attacked together.
    ratio: over the baseline. random: of each seed. norm: of the rows of largest norm, of which `norm_shared` are
    the attacked ones themselves. None or empty: not run.
    beyond: attacked over the random rows' geometric mean, paired by windows.
    """

    attack: Attack
    task: str
    layers: tuple[int, ...]
    experts: tuple[int | None, ...]
    ratio: Ratio
    random: tuple[float, ...]
    norm: float | None
    norm_shared: int | None
    beyond: Ratio | None
    text: str


def judge(
    attack: Attack,
    attacked: Measured,
    baseline: Measured,
    *,
    random: Sequence[Measured],
    norm: Measured | None,
    shared: int,
    layers: tuple[int, ...],
    experts: tuple[int | None, ...],
) -> Verdict | None:
    """The verdict on an attack; None unless both are finite perplexities."""
    if not comparable(attacked, baseline):
        return None
    drawn = [one for one in random if comparable(one, baseline)]
    ratio, each = paired_ratio(attacked, [baseline]), tuple(paired_ratio(one, [baseline]).value for one in drawn)
    largest = paired_ratio(norm, [baseline]).value if norm is not None and comparable(norm, baseline) else None
    beyond = paired_ratio(attacked, drawn) if drawn else None
    said = [f"{_doing(attack)}{_where(layers)} multiplies {short(attacked.task)} by {ratio}"]
    if each:
        each_layer = " in each" if len(layers) > 1 else ""
        said.append(f"{_rows(attack.k, 'random row')}{each_layer} by {figure(statistics.fmean(each))}{_spread(each)}")
    if largest is not None:
        said.append(f"{_largest(attack.k, shared, len(layers))} by {figure(largest)}")
    text = "; ".join(said) + (f". {_conclusion(attack, beyond)}" if beyond is not None else ".")
    return Verdict(
        attack=attack,
        task=attacked.task,
        layers=layers,
        experts=experts,
        ratio=ratio,
        random=each,
        norm=largest,
        norm_shared=None if largest is None else shared,
        beyond=beyond,
        text=text,
    )


def _where(layers: tuple[int, ...]) -> str:
    """Nothing for one layer, which the report names above."""
    return f" in each of layers {', '.join(map(str, layers[:-1]))} and {layers[-1]}" if len(layers) > 1 else ""


def _conclusion(attack: Attack, beyond: Ratio) -> str:
    if beyond.low is None or beyond.high is None:
        return "Too few windows to tell them apart."
    them = "Retaining these rows" if attack.mode == "retain" else "These rows"
    if beyond.low <= 1 <= beyond.high:
        verb = "does" if attack.mode == "retain" else "do"
        return f"{them} {verb} no more and no less than random ones: x{beyond}."
    if attack.mode == "retain":
        return f"{them} leaves {'less' if beyond.value > 1 else 'more'} than retaining random ones: x{beyond}."
    return f"{them} matter {'more' if beyond.value > 1 else 'less'} than random ones: x{beyond}."


def _doing(attack: Attack) -> str:
    rows = _rows(attack.k, "row")
    return {
        "zero": f"zeroing {rows}",
        "retain": f"retaining only {rows}",
        "scale": f"scaling {rows} by {attack.factor:g}" if attack.factor is not None else "",
        "mean": f"fixing {rows} at their mean",
        "none": "nothing",
    }[attack.mode]


def _rows(k: int, name: str) -> str:
    return f"{k} {name}" if k == 1 else f"{k} {name}s"


def _largest(k: int, shared: int, places: int) -> str:
    """Names the rows of largest norm, and how many of them are the attacked ones, for which they are not a control."""
    rows = "the row of largest norm" if k == 1 else f"the {k} rows of largest norm"
    total = k * places
    if places > 1:
        rows += " in each"
    if not shared:
        return rows
    if shared == total:
        return f"{rows}, which is the attacked one," if total == 1 else f"{rows}, which are the attacked ones,"
    of = f"these {total}" if places > 1 else "them"
    return f"{rows}, {shared} of {of} {'an attacked one' if shared == 1 else 'attacked ones'},"


def _spread(values: Sequence[float]) -> str:
    return f" ({len(values)} draws, {figure(min(values))} to {figure(max(values))})" if len(values) > 1 else ""
