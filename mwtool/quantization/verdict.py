"""The verdicts of a quantization check, as sentences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mwtool.evaluation.numbers import short

if TYPE_CHECKING:
    from mwtool.quantization.check import Share, Variant
    from mwtool.quantization.rounding import Scheme

CONTROLS = {
    "columns at the massive layer": "random columns at every event",
    "columns at every event": "random columns at every event",
    "FFN matrices of the events": "FFN matrices of other layers",
}
"""Which control a set of protected weights is held against."""


def verdicts(variants: Sequence[Variant]) -> Iterator[str]:
    """For each scheme and perplexity, what protecting columns and matrices gives back beside its control."""
    for scheme in dict.fromkeys(one.scheme for one in variants):
        same = [one for one in variants if one.scheme == scheme]
        for at, measured in enumerate(same[0].measured):
            if measured.weights is not None:
                yield from _of(scheme, same, at)


def _of(scheme: Scheme, variants: Sequence[Variant], at: int) -> Iterator[str]:
    task, cost = short(variants[0].measured[at].task), variants[0].ratio[at]
    if cost is None:
        return
    if all(one.back[at] is None for one in variants):
        yield f"{scheme}: quantizing multiplies {task} by {cost}, too little to protect anything from."
        return
    for kind, against in CONTROLS.items():
        best = _best([one for one in variants if one.protection is not None and one.protection.kind == kind], at)
        control = _best([one for one in variants if one.protection is not None and one.protection.kind == against], at)
        if best is None or best.protection is None or best.back[at] is None:
            continue
        share, beside = best.back[at], None if control is None else control.back[at]
        assert share is not None, "looked at above"
        yield (
            f"{scheme}: keeping {best.protection.name} ({best.bytes:,} bytes) gives back {share} of what "
            f"quantizing costs on {task}; {_judged(share, beside)}"
        )


def _best(variants: Sequence[Variant], at: int) -> Variant | None:
    """The variant that gives the most back for its bytes' sake: the smallest that is within 2 points of the best."""
    shares = {id(one): one.back[at] for one in variants}
    known = [(one, share.value) for one in variants if (share := shares[id(one)]) is not None]
    if not known:
        return None
    most = max(value for _, value in known)
    return min((one for one, value in known if value >= most - 0.02), key=lambda one: one.bytes)


def _judged(share: Share, control: Share | None) -> str:
    if share.low is None:
        return "there are too few windows to tell it from chance."
    if share.low <= 0:
        return "that cannot be told from nothing."
    if control is None:
        return "there was no control to hold it against."
    beyond = control.high is not None and share.low > control.high
    return f"its control {control}, so it {'pays' if beyond else 'is not shown to pay'}."
