"""The attacks of a sweep, each with its controls, before any is measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mwtool.ablation.controls import norm_rows, random_rows
from mwtool.models.load import Loaded
from mwtool.scan.targets import Group
from mwtool.surgery.attack import Attack

if TYPE_CHECKING:
    from mwtool.ablation.sweep import Sweep

Key = tuple[Attack, frozenset[tuple[int, int | None, frozenset[int]]]]
"""What an attack does: layer, expert and rows of each place. Attacks of equal keys are measured once."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One attack that is to be measured.

    control: as in `Run`. targets: the places attacked together. rows: of each place the rows to attack.
    """

    attack: Attack
    control: str | None
    targets: Group
    rows: tuple[tuple[int, ...], ...]

    @property
    def same(self) -> Key:
        """Equal for the same attack on the same rows: rows of largest norm may be the massive ones."""
        places = zip(self.targets, self.rows, strict=True)
        return self.attack, frozenset((one.layer, one.ffn.expert, frozenset(rows)) for one, rows in places)

    @property
    def name(self) -> str:
        """As progress shows it."""
        beside = "" if self.control is None else f" ({self.control})"
        several = "layers" if len(self.targets) > 1 else "layer"
        return f"{several} {'+'.join(str(one.layer) for one in self.targets)}, {self.attack}{beside}"


def distinct_of(plans: Sequence[Plan]) -> list[Plan]:
    """Those that are measured: plans that change something, of equal ones the first."""
    found: dict[Key, Plan] = {}
    for plan in plans:
        if not plan.attack.idle:
            found.setdefault(plan.same, plan)
    return list(found.values())


def plans_of(loaded: Loaded, group: Group, sweep: Sweep) -> Iterator[Plan]:
    """The attacks of a sweep on a group of places, each followed by its controls."""
    wanted = sweep.draws > 0 and max(sweep.ks) > 0
    # reads all rows: once
    largest = [norm_rows(loaded, target, max(sweep.ks)) if wanted else None for target in group]
    for mode in sweep.modes:
        for k in sweep.ks:
            attack = mode.at(k)
            yield Plan(attack, None, group, tuple(target.indices[:k] for target in group))
            if k > 0 and sweep.draws > 0:
                yield from _controls(loaded, group, attack, sweep, largest)


def _controls(
    loaded: Loaded, group: Group, attack: Attack, sweep: Sweep, largest: Sequence[tuple[int, ...] | None]
) -> Iterator[Plan]:
    """As many rows of each place; the draws of several places are apart, with seeds of their own."""
    for seed in range(sweep.seed, sweep.seed + sweep.draws):
        drawn = [
            random_rows(target, target.ffn.width(loaded.base), attack.k, seed + at * sweep.draws)
            for at, target in enumerate(group)
        ]
        if (rows := _complete(drawn)) is not None:
            yield Plan(attack, f"random:{seed}", group, rows)
    if (rows := _complete(largest)) is not None:
        yield Plan(attack, "norm", group, tuple(one[: attack.k] for one in rows))


def _complete(rows: Sequence[tuple[int, ...] | None]) -> tuple[tuple[int, ...], ...] | None:
    """The rows of every place, or None where one has none."""
    found = tuple(one for one in rows if one is not None)
    return found if len(found) == len(rows) else None


def notes_of(groups: Sequence[Group], sweep: Sweep, plans: Sequence[Plan]) -> list[str]:
    """What the user should know about the attacks and their controls."""
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
