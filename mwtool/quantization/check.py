"""What quantizing costs, and which protected weights give how much of it back, beside random controls.

Every variant is measured on the same windows, so that differences are paired: with L the mean loss (nats a token) of
full precision, of the quantized model and of the quantized model with weights protected, the share given back is
(L_quantized - L_protected) / (L_quantized - L_full).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mwtool.architecture.validate import ffn_at
from mwtool.errors import BadValue
from mwtool.evaluation.comparison import LEAST, Ratio, comparable, paired_ratio, student_t
from mwtool.evaluation.config import Options
from mwtool.evaluation.evaluate import prepare
from mwtool.evaluation.measurement import Measured, OnProgress
from mwtool.quantization.config import QuantizeConfig
from mwtool.quantization.protection import (
    Masks,
    Protection,
    columns_of_down,
    entries_of_down,
    matrices_of,
    rows_of_inputs,
)
from mwtool.quantization.rounding import Scheme
from mwtool.quantization.simulation import Linear, linear_weights, quantized
from mwtool.quantization.verdict import verdicts

if TYPE_CHECKING:
    from mwtool.architecture.layout import FFN
    from mwtool.evaluation.tasks import Task
    from mwtool.massive import MassiveWeights
    from mwtool.models.load import Loaded
    from mwtool.scan.scanner import Scan

OnRun = Callable[[int, int, str], OnProgress | None]
"""Called before a variant is measured with variants done, variants in all, and its name."""


@dataclass(frozen=True, slots=True)
class Share:
    """The share of the loss from quantizing that is given back, and its 95 % interval over windows.

    low, high: None where there are too few windows.
    """

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{self.low:.0%}, {self.high:.0%}]"
        return f"{self.value:.0%}{interval}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One quantized model, with some weights protected.

    protection: None where nothing is protected. bytes: what keeping these weights costs beside quantizing them.
    ratio: perplexity over that of full precision, a task each; None where it is not finite or no perplexity.
    back: the share of the cost that is given back, likewise; None too where nothing is protected or quantizing costs
    nothing that can be told from zero.
    """

    scheme: Scheme
    protection: Protection | None
    bytes: int
    measured: tuple[Measured, ...]
    ratio: tuple[Ratio | None, ...]
    back: tuple[Share | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeCheck:
    """All that was measured. weights: how many are quantized, in how many matrices' modules."""

    plan: QuantizeConfig
    weights: int
    baseline: tuple[Measured, ...]
    variants: tuple[Variant, ...]
    notes: tuple[str, ...]

    @property
    def verdicts(self) -> tuple[str, ...]:
        """What it shows, one sentence for each scheme and set of weights."""
        return tuple(verdicts(self.variants))


def quantize_check(
    loaded: Loaded,
    scan: Scan,
    tasks: Sequence[Task],
    plan: QuantizeConfig | None = None,
    options: Options | None = None,
    *,
    on_run: OnRun | None = None,
) -> QuantizeCheck:
    """Measure a loaded model in full precision, quantized, and quantized with each set of weights protected.

    scan: of this model, with at least max(plan.ks) rows ranked at each event. The model's weights are as they were
    when this returns, however it returns. Raises BadValue without events or where k does not fit, and
    UnsupportedModel where weights are quantized already or offloaded.
    """
    plan, options = plan or QuantizeConfig(), options or Options()
    weights = linear_weights(loaded.base, loaded.layers)  # first: the rows of packed weights cannot be named
    protections = tuple(protections_for(loaded, scan, plan))
    ready = prepare(loaded, tasks, options)
    runs: list[tuple[Scheme, Protection | None]] = [
        (scheme, one) for scheme in plan.schemes for one in (None, *protections)
    ]

    def measure(done: int, name: str, scheme: Scheme | None, masks: Masks) -> tuple[Measured, ...]:
        on_progress = None if on_run is None else on_run(done, len(runs) + 1, name)
        with nullcontext() if scheme is None else quantized(loaded.base, weights, scheme, masks):
            return tuple(found for one in ready for found in one.run(loaded, options, on_progress))

    baseline = measure(0, "full precision", None, {})
    variants: list[Variant] = []
    plain = baseline
    for done, (scheme, protection) in enumerate(runs, start=1):
        name = str(scheme) if protection is None else f"{scheme}, {protection.name}"
        found = measure(done, name, scheme, {} if protection is None else protection.masks)
        if protection is None:
            plain = found
        variants.append(_variant(loaded, scheme, protection, found=found, plain=plain, baseline=baseline))
    return QuantizeCheck(
        plan=plan,
        weights=_count(loaded, weights),
        baseline=baseline,
        variants=tuple(variants),
        notes=tuple(note for one in ready for note in one.notes),
    )


def protections_for(loaded: Loaded, scan: Scan, plan: QuantizeConfig) -> Iterator[Protection]:
    """What is protected, most specific first, each followed by its control. Raises BadValue."""
    if not scan.events:
        raise BadValue(
            f"{loaded.source.name} has no events to protect: the scan found no massive dimension that an FFN writes"
        )
    most, fewest = max(plan.ks), min(len(event.rows.indices) for event in scan.events)
    if most > fewest:
        raise BadValue(f"k is {most}; the scan ranked {fewest} rows at an event: scan with -k {most}")
    model, events = loaded.base, [event.rows for event in scan.events]
    massive = scan.massive or events[0]
    for k in plan.ks:
        yield Protection(
            name=f"{_columns(k)} of down_proj, layer {massive.layer}",
            kind="columns at the massive layer",
            masks=columns_of_down(model, {_ffn(loaded, massive): massive.indices[:k]}),
            k=k,
        )
    yield Protection(
        name=f"{most} rows of up and gate, layer {massive.layer}",
        kind="rows of up and gate at the massive layer",
        masks=rows_of_inputs(model, {_ffn(loaded, massive): massive.indices[:most]}),
        k=most,
    )
    for k in plan.ks:
        yield Protection(
            name=f"{_columns(k)} of down_proj, {_layers(events)}",
            kind="columns at every event",
            masks=columns_of_down(model, {_ffn(loaded, rows): rows.indices[:k] for rows in events}),
            k=k,
        )
    yield Protection(
        name=f"{most} random columns of down_proj, {_layers(events)}",
        kind="random columns at every event",
        masks=columns_of_down(
            model, {_ffn(loaded, rows): _random_columns(loaded, rows, most, plan.seed) for rows in events}
        ),
        k=most,
        control=True,
    )
    if scan.super_weights:
        yield _super_weights(loaded, scan)
    yield from _matrices(loaded, events, plan.seed)


def _super_weights(loaded: Loaded, scan: Scan) -> Protection:
    places: dict[FFN, list[tuple[int, int]]] = {}
    for one in scan.super_weights:
        place = ffn_at(loaded.layers, one.layer, one.expert)
        places.setdefault(place, []).append((one.hidden_dim, one.ffn_index))
    count = len(scan.super_weights)
    name = f"{count} super weight{'s' if count > 1 else ''}"
    return Protection(name=name, kind="super weights", masks=entries_of_down(loaded.base, places))


def _matrices(loaded: Loaded, events: Sequence[MassiveWeights], seed: int) -> Iterator[Protection]:
    """The FFN matrices of the events, and of as many other layers as there are, drawn at random."""
    chosen = sorted({rows.layer for rows in events})
    ffns = [_ffn(loaded, rows) for rows in events]
    yield Protection(
        name=f"FFN matrices, {_layers(events)}", kind="FFN matrices of the events", masks=matrices_of(loaded.base, ffns)
    )
    others = [layer for layer in range(len(loaded.layers)) if layer not in chosen]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed)).tolist()
    drawn = sorted(others[at] for at in order[: len(chosen)])
    if drawn:
        control = [_largest_ffn(loaded, layer, ffns) for layer in drawn]
        name = f"FFN matrices, {len(drawn)} other layers: {', '.join(map(str, drawn))}"
        yield Protection(
            name=name, kind="FFN matrices of other layers", masks=matrices_of(loaded.base, control), control=True
        )


def _largest_ffn(loaded: Loaded, layer: int, like: Sequence[FFN]) -> FFN:
    """An FFN of a control layer: a routed expert if the events are in one, so that both keep as many weights."""
    routed = any(ffn.expert is not None for ffn in like)
    ffns = [ffn for ffn in loaded.layers[layer].ffns if (ffn.expert is not None) == routed]
    return (ffns or list(loaded.layers[layer].ffns))[0]


def _random_columns(loaded: Loaded, rows: MassiveWeights, k: int, seed: int) -> tuple[int, ...]:
    """k intermediate entries that are not among the ranked ones; another draw in each layer."""
    ranked = set(rows.indices)
    others = [index for index in range(_ffn(loaded, rows).width(loaded.base)) if index not in ranked]
    generator = torch.Generator().manual_seed(seed + 1000003 * rows.layer)
    return tuple(others[at] for at in torch.randperm(len(others), generator=generator).tolist()[:k])


def _ffn(loaded: Loaded, rows: MassiveWeights) -> FFN:
    return ffn_at(loaded.layers, rows.layer, rows.expert)


def _columns(k: int) -> str:
    return "1 column" if k == 1 else f"{k} columns"


def _layers(events: Sequence[MassiveWeights]) -> str:
    layers = sorted({rows.layer for rows in events})
    return f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"


def _count(loaded: Loaded, weights: Sequence[Linear]) -> int:
    return sum(loaded.base.get_parameter(f"{one.path}.{name}").numel() for one in weights for name in one.parameters)


def _variant(
    loaded: Loaded,
    scheme: Scheme,
    protection: Protection | None,
    *,
    found: Sequence[Measured],
    plain: Sequence[Measured],
    baseline: Sequence[Measured],
) -> Variant:
    kept = 0 if protection is None else protection.weights
    bits = loaded.base.dtype.itemsize * 8 - scheme.bits
    return Variant(
        scheme=scheme,
        protection=protection,
        bytes=kept * bits // 8,
        measured=tuple(found),
        ratio=tuple(
            paired_ratio(one, [full]) if comparable(one, full) else None
            for one, full in zip(found, baseline, strict=True)
        ),
        back=tuple(
            None if protection is None else share_given_back(one, rough, full)
            for one, rough, full in zip(found, plain, baseline, strict=True)
        ),
    )


def share_given_back(protected: Measured, plain: Measured, full: Measured) -> Share | None:
    """(L_quantized - L_protected) / (L_quantized - L_full) with L a mean loss, and a paired interval.

    A ratio of two sums over the same windows, g_i / c_i: its variance is that of the residuals g_i - share * c_i, over
    the sum of c_i squared; t of n - 1 degrees of freedom. None where a loss is not finite, or where quantizing costs
    so little that its own interval includes zero.
    """
    if not (comparable(protected, full) and comparable(plain, full)):
        return None
    given = [a - b for a, b in zip(plain.samples, protected.samples, strict=True)]
    cost = [a - b for a, b in zip(plain.samples, full.samples, strict=True)]
    n, total = len(cost), math.fsum(cost)
    costs = paired_ratio(plain, [full])
    if (costs.low is not None and costs.low <= 1) or total <= 0:
        return None
    value = math.fsum(given) / total
    if n < LEAST:
        return Share(value, None, None)
    squares = math.fsum((g - value * c) ** 2 for g, c in zip(given, cost, strict=True))
    half = student_t(n - 1) * math.sqrt(squares * n / (n - 1)) / total
    return Share(value, value - half, value + half)
