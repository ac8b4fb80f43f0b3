"""When and how much MacDrop drops: schedules of p over the training steps, and the file that describes one.

A schedule in one line is ``kind:values``; t counts optimizer steps from 1 to T, e epochs from 1 to E:

    step:0.8              p0 (1 - t/T)            the paper's Algorithm 1
    linear:0.9-0.0        from the first value at t = 1 to the second at t = T
    epoch-before:0.8      p0 (1 - (e-1)/E)
    epoch-after:0.8       p0 (1 - e/E)
    exp:0.8,alpha=0.01    p0 exp(-alpha t)
    constant:0.5          always p0
    none                  always 0

Sources: Oh, Shin, Oh, "House of Cards" (arXiv 2410.01866v2), Algorithm 1 and its study of curricula.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from mwtool.errors import BadSyntax, BadValue, nearest

Kind = Literal["step", "linear", "epoch-before", "epoch-after", "exp", "constant", "none"]
Scope = Literal["massive", "others", "all"]
Resample = Literal["step", "microbatch"]
Masks = Literal["shared", "separate"]
KINDS: tuple[Kind, ...] = get_args(Kind)
CHOICES: dict[str, tuple[str, ...]] = {
    "scope": get_args(Scope),
    "resample": get_args(Resample),
    "masks": get_args(Masks),
}
ALPHA = 0.01
"""The paper's first value, taken where `exp` names none."""
_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def _refuse_unknown(what: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise BadValue(f"{what} is {value!r}; {nearest(value, known)}")


@dataclass(frozen=True, slots=True)
class Schedule:
    """p as a function of the step. `str` gives back the text it is parsed from.

    start: p0, or the first value of `linear`; end: its last; alpha: the rate of `exp`.
    Raises BadValue for an unknown kind, a p outside [0, 1] or a rate that is not above 0.
    """

    kind: Kind = "none"
    start: float = 0.0
    end: float = 0.0
    alpha: float = ALPHA

    def __post_init__(self) -> None:
        _refuse_unknown("schedule", self.kind, KINDS)
        for p in (self.start, self.end):
            if not 0 <= p <= 1:  # NaN is not, either
                raise BadValue(f"p is {p}; expected a number between 0 and 1")
        if not 0 < self.alpha < math.inf:
            raise BadValue(f"alpha is {self.alpha}; expected a rate above 0")

    def p(self, t: int, steps: int, per_epoch: int) -> float:
        """The probability in step `t` of 1 to `steps`, with `per_epoch` steps an epoch; between 0 and 1."""
        epoch, epochs = (t - 1) // per_epoch + 1, math.ceil(steps / per_epoch)
        done = (t - 1) / (steps - 1) if steps > 1 else 0.0
        formulas: dict[Kind, Callable[[], float]] = {
            "step": lambda: self.start * (1 - t / steps),
            "linear": lambda: self.start * (1 - done) + self.end * done,
            "epoch-before": lambda: self.start * (1 - (epoch - 1) / epochs),
            "epoch-after": lambda: self.start * (1 - epoch / epochs),
            "exp": lambda: self.start * math.exp(-self.alpha * t),
            "constant": lambda: self.start,
            "none": lambda: 0.0,
        }
        return formulas[self.kind]()

    def __str__(self) -> str:
        match self.kind:
            case "none":
                return "none"
            case "linear":
                return f"linear:{self.start!r}-{self.end!r}"
            case "exp":
                return f"exp:{self.start!r},alpha={self.alpha!r}"
            case _:
                return f"{self.kind}:{self.start!r}"


@dataclass(frozen=True, slots=True)
class Phase:
    """A schedule over part of the run, with t and T of its own.

    steps, share: how long it lasts, in steps or as a share of all of them; the last phase has neither and takes
    what is left. Raises BadValue for steps below 1 or a share outside ]0, 1[.
    """

    schedule: Schedule
    steps: int | None = None
    share: float | None = None

    def __post_init__(self) -> None:
        if self.steps is not None and self.steps < 1:
            raise BadValue(f"a phase lasts {self.steps} steps; expected 1 or more")
        if self.share is not None and not 0 < self.share < 1:
            raise BadValue(f"a phase has a share of {self.share}; expected one between 0 and 1")


@dataclass(frozen=True, slots=True)
class Curriculum:
    """All that decides which entries are dropped when.

    k: how many of the ranked rows count as massive.
    scope: the rows dropped from: the massive ones, all others, or all (the paper's study of scope).
    resample: a new mask for every optimizer step (our reading of Algorithm 1) or for every micro-batch.
    masks: one mask for gate and up (the paper), or one each.
    seed: of the masks alone; the global random state is never touched.
    layers: decoder layers whose rows are dropped from, from 0; empty: the massive layer, or the rows that are given.
    Raises BadValue for a k below 1, an unknown choice (naming the nearest), and phases that do not follow on.
    """

    phases: tuple[Phase, ...] = field(default=(Phase(Schedule()),))
    k: int = 5
    scope: Scope = "massive"
    resample: Resample = "step"
    masks: Masks = "shared"
    seed: int = 0
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.k < 1:
            raise BadValue(f"k is {self.k}; expected 1 row or more")
        for name, value in (("scope", self.scope), ("resample", self.resample), ("masks", self.masks)):
            _refuse_unknown(name, value, CHOICES[name])
        if any(layer < 0 for layer in self.layers) or len(set(self.layers)) < len(self.layers):
            raise BadValue(f"layers are {list(self.layers)}; expected different numbers from 0 on")
        lengths = [(phase.steps is not None) + (phase.share is not None) for phase in self.phases]
        if lengths != [1] * (len(lengths) - 1) + [0]:
            raise BadValue("a curriculum needs phases; each before the last has either steps or a share, the last none")
        if sum(phase.share or 0.0 for phase in self.phases) >= 1:
            raise BadValue("the shares of the phases sum to 1 or more; nothing is left for the last one")

    def p(self, t: int, steps: int, per_epoch: int | None = None) -> float:
        """The probability in step `t` of 1 to `steps`; without `per_epoch` the run is one epoch.

        Raises BadValue if t lies outside, or the phases do not fit into so many steps.
        """
        if not 1 <= t <= steps:
            raise BadValue(f"step {t} is outside the run; it has steps 1 to {steps}")
        for phase, first, length in self._spans(steps):
            if t < first + length:
                return phase.schedule.p(t - first + 1, length, per_epoch or length)
        raise AssertionError("the last phase ends with the run")

    def values(self, steps: int, per_epoch: int | None = None) -> tuple[float, ...]:
        """p of every step."""
        return tuple(self.p(t, steps, per_epoch) for t in range(1, steps + 1))

    @property
    def idle(self) -> bool:
        """Whether it never drops anything."""
        return all(phase.schedule.kind == "none" for phase in self.phases)

    def __str__(self) -> str:
        return " then ".join(str(phase.schedule) + _length(phase) for phase in self.phases)

    def _spans(self, steps: int) -> Iterator[tuple[Phase, int, int]]:
        """Each phase with its first step and its number of steps."""
        first, share, before = 1, 0.0, 0
        for phase in self.phases[:-1]:
            share += phase.share or 0.0
            upto = round(share * steps)  # of all shares so far, so that their rounding does not add up
            length = phase.steps if phase.steps is not None else max(1, upto - before)
            before = upto
            if first + length > steps:
                raise BadValue(f"the phases {self} do not fit into {steps} steps; each phase needs one at least")
            yield phase, first, length
            first += length
        yield self.phases[-1], first, steps - first + 1


def _length(phase: Phase) -> str:
    if phase.steps is not None:
        return f" for {phase.steps} steps"
    return "" if phase.share is None else f" for {phase.share:.0%} of the steps"


def curriculum_of(schedule: Schedule | str, **options: object) -> Curriculum:
    """A curriculum of one schedule over the whole run; `options` are the other fields of Curriculum."""
    parsed = parse_schedule(schedule) if isinstance(schedule, str) else schedule
    return Curriculum(phases=(Phase(parsed),), **options)  # type: ignore[arg-type] # checked by the dataclass's caller


def parse_schedule(text: str) -> Schedule:
    """A schedule from its line; raises BadSyntax, which points at the character."""
    return _Reader(text).schedule()


class _Reader:
    """Reads a schedule from left to right."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def schedule(self) -> Schedule:
        kind = self._kind()
        if kind == "none":
            return self._ended(Schedule())
        self._expect(":", f"':' and p between 0 and 1, as in {kind}:0.8")
        start = self._probability()
        if kind == "linear":
            self._expect("-", "'-' and the last p, as in linear:0.9-0.0")
            return self._ended(Schedule(kind, start, self._probability()))
        if kind == "exp" and self.at < len(self.text):
            self._expect(",alpha=", "',alpha=' and a rate, as in exp:0.8,alpha=0.01")
            return self._ended(Schedule(kind, start, alpha=self._rate()))
        return self._ended(Schedule(kind, start))

    def _kind(self) -> Kind:
        name = self.text.partition(":")[0]
        for kind in KINDS:
            if name == kind:
                self.at = len(name)
                return kind
        raise self._fault(0, f"unknown schedule {name!r}; {nearest(name, KINDS)}")

    def _probability(self) -> float:
        position, value = self.at, self._number("a number between 0 and 1")
        if value > 1:
            raise self._fault(position, f"p is {self.text[position : self.at]}; expected a number between 0 and 1")
        return value

    def _rate(self) -> float:
        position, value = self.at, self._number("a rate above 0")
        if not 0 < value < math.inf:
            raise self._fault(position, f"alpha is {self.text[position : self.at]}; expected a rate above 0")
        return value

    def _number(self, expected: str) -> float:
        found = _NUMBER.match(self.text, self.at)
        if found is None:
            raise self._unexpected(expected)
        self.at = found.end()
        return float(found.group())

    def _expect(self, token: str, expected: str) -> None:
        if not self.text.startswith(token, self.at):
            raise self._unexpected(expected)
        self.at += len(token)

    def _ended(self, schedule: Schedule) -> Schedule:
        if self.at < len(self.text):
            raise self._unexpected("the end")
        return schedule

    def _unexpected(self, expected: str) -> BadSyntax:
        found = repr(self.text[self.at]) if self.at < len(self.text) else "the end"
        return self._fault(self.at, f"found {found}; expected {expected}")

    def _fault(self, position: int, message: str) -> BadSyntax:
        return BadSyntax(f"schedule {self.text!r}, character {position + 1}: {message}", self.text, position)
