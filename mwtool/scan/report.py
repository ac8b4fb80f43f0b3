"""A scan as text for people, with Rich: the layers, the rows, what they carry and where they are stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mwtool.scan.definitions import median
from mwtool.scan.published import published

if TYPE_CHECKING:
    from torch import Tensor

    from mwtool.massive import MassiveWeights
    from mwtool.scan.ranking import Router
    from mwtool.scan.scanner import Scan


DRAWN = 70
"""Columns from which on the bars have room beside the numbers, which are never cut."""


def scan_report(scan: Scan, width: int) -> RenderableType:
    """All a scan found: what was fed, the layers, the rows, and what to do with them."""
    legend = "█ median  ─● top-1, on one log scale a column\n" if width >= DRAWN else ""
    parts: list[RenderableType] = [_heading(scan), _layers(scan, width), Text(legend, "dim")]
    if scan.massive is None:
        parts.extend(_nothing(scan))
    else:
        parts.extend([_verdict(scan, scan.massive), _rows(scan.massive), *_consequences(scan, scan.massive)])
    return Group(*parts)


def _heading(scan: Scan) -> RenderableType:
    one, bos = scan.identity, scan.bos
    revision = f" at {one.revision[:12]}" if one.revision else ""
    origin = {"tokenizer": "from the tokenizer", "config": "from config.json", "given": "as given", "none": "not a bos"}
    return Text.assemble(
        (one.model, "bold"),
        f"{revision}: {one.model_type}, {one.layers} layers, hidden {one.hidden_size:,}, "
        f"FFN {one.intermediate_size:,}, {scan.parameters:,} parameters, {scan.dtype} on {scan.device}\n"
        f"fed: {bos.token or '(no tokenizer)'} (id {bos.id}, {origin[bos.how]}) alone at the first position\n",
    )


def _layers(scan: Scan, width: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    bar = max(6, min(24, (width - 58) // 2))
    table.add_column("layer", justify="right")
    for column in ("hidden", "intermediate"):
        if width >= DRAWN:
            table.add_column(column, no_wrap=True)
        table.add_column("top-1" if width >= DRAWN else column, justify="right", no_wrap=True)
        table.add_column("median", justify="right", no_wrap=True)
    table.add_column("share", justify="right", no_wrap=True)
    hidden = [_measures(state.hidden) for state in scan.states]
    intermediate = [_measures(state.intermediate) for state in scan.states]
    for state, h, z in zip(scan.states, hidden, intermediate, strict=True):
        share = f"{scan.attribution[state.layer]:.1%}" if state.layer < len(scan.attribution) else ""
        marked = scan.massive is not None and state.layer == scan.massive.layer
        cells = [f"{'▶ ' if marked else ''}{state.layer}"]
        for figures, whole in ((h, hidden), (z, intermediate)):
            cells += [_bar(*figures, whole, bar)] if width >= DRAWN else []
            cells += map(_number, figures)
        table.add_row(*cells, share, style="bold yellow" if marked else None)
    return table


def _measures(vector: Tensor) -> tuple[float, float]:
    return float(vector.abs().max()), median(vector)


def _bar(top: float, middle: float, column: list[tuple[float, float]], width: int) -> str:
    """A log-scaled bar: solid up to the median, a line up to top-1."""
    present = [value for pair in column for value in pair if value > 0]
    low, high = math.log10(min(present, default=1.0)), math.log10(max(present, default=1.0))

    def cells(value: float) -> int:
        return 0 if value <= 0 else 1 + round((width - 1) * (math.log10(value) - low) / max(high - low, 1e-9))

    solid, end = min(cells(middle), width - 1), cells(top)
    return "█" * solid + ("─" * (end - solid - 1) + "●" if end > solid else "")


def _nothing(scan: Scan) -> Iterator[Text]:
    largest = max(
        (state for state in scan.states if state.layer < scan.identity.layers - 1),
        default=scan.states[-1],
        key=lambda state: float(state.hidden.abs().max()),
    )
    top, middle = _measures(largest.hidden)
    limits = scan.settings.thresholds
    yield Text("No massive activations at this token.", "bold")
    yield Text(
        f"The largest entry of the residual stream is {_number(top)}, {_times(top, middle)} times the median, after "
        f"layer {largest.layer}; massive means above {limits.magnitude:g} and {limits.ratio:g} times the median."
    )


def _verdict(scan: Scan, massive: MassiveWeights) -> Text:
    where = "settles at" if scan.settled is not None else "never settles; it is largest at"
    at = len(scan.attribution) - 1
    text = Text.assemble(
        (f"Massive layer {massive.layer}", "bold"),
        f" ({massive.module}; layer {massive.layer + 1} in the paper's count): "
        f"its FFN writes {scan.attribution[massive.layer]:.1%} of dimension {massive.dimension}, "
        f"which {where} layer {at} with {_number(massive.value)}.\n",
        (f"{massive.count} of {_width(scan, massive):,} rows", "bold"),
        " make up 90 % of it.",
    )
    if scan.growth is not None and abs(scan.growth[1]) > abs(massive.value):
        text.append(f" Later layers take it to {_number(scan.growth[1])} (layer {scan.growth[0]}).")
    if scan.router is not None:
        text.append(_routing(scan.router, massive.expert))
    return text


def _width(scan: Scan, massive: MassiveWeights) -> int:
    """I of the network that carries it; in an MoE model it may differ from layer to layer."""
    parts = scan.states[massive.layer].parts
    return next(part.intermediate.numel() for part in parts if part.ffn.expert == massive.expert)


def _routing(router: Router, carrier: int | None) -> str:
    """Which expert carries it, where the router sends bos, and what the shared expert writes."""
    lines = ["The shared expert carries it." if carrier is None else f"Expert {carrier} carries it."]
    lines += [
        f"bos goes to expert {c.expert}: probability {c.probability:.1%}, weight {c.weight:.3g}, share {c.share:.1%}"
        for c in router.choices
    ]
    if router.shared_share is not None:
        lines.append(f"the shared expert: share {router.shared_share:.1%}")
    return "\n" + "\n  ".join(lines)


def _rows(massive: MassiveWeights) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.add_column("rank", justify="right")
    table.add_column("row", justify="right")
    table.add_column("|z|", justify="right")
    table.add_column("x median", justify="right")
    table.add_column(f"share of output {massive.dimension}", justify="right")
    ranked = zip(massive.indices, massive.magnitudes, massive.shares, strict=True)
    for rank, (index, magnitude, share) in enumerate(ranked, start=1):
        style = "bold yellow" if rank <= massive.count else None
        table.add_row(
            str(rank), str(index), _number(magnitude), _times(magnitude, massive.median), f"{share:.2%}", style=style
        )
    return table


def _consequences(scan: Scan, massive: MassiveWeights) -> Iterator[RenderableType]:
    k = len(massive.indices)
    yield Text(f"\nThe {k} row{'s are' if k > 1 else ' is'} {massive.share_of_parameters:.4%} of all parameters.")
    layers = sorted({layer for layer, _, _ in scan.sun})
    passed = f"passed after layers {_ranges(layers)}" if layers else "not passed"
    yield Text(f"The strict published test (sun, {scan.settings.thresholds.sun_ratio:g} x median) is {passed}.")
    if scan.super_weights:
        coordinates = ", ".join(f"({w.layer}; {w.hidden_dim}; {w.ffn_index})" for w in scan.super_weights)
        yield Text(f"Super weights (layer; hidden dimension; FFN index): {coordinates}.")
    known = published(scan.identity.model)
    if known is not None:
        expert = "" if known.expert is None else f", expert {known.expert}"
        rows = ", ".join(map(str, known.indices))
        yield Text(
            f"Published (layer {known.layer}{expert}: {rows}): {known.agreement(massive.layer, massive.indices)}."
        )
    yield Text("\nKeep in high precision when quantizing:", "bold")
    yield _protected(scan)
    if scan.stopped:
        read = f"{len(scan.states)} of {scan.identity.layers} layers"
        yield Text(f"\nRead {read}: the answer had settled (--all-layers goes on).", "dim")


def _protected(scan: Scan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("parameter", no_wrap=True)  # a name to copy: the indices give way
    table.add_column("dim", justify="right")
    table.add_column("indices")
    for place in scan.protect:
        name = place.parameter if place.expert is None else f"{place.parameter}[{place.expert}]"
        if place.checkpoint_name not in (None, place.parameter):
            name += f"\n  in the files: {place.checkpoint_name}"
        table.add_row(name, str(place.dim), ", ".join(map(str, place.indices)))
    return table


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 5 -> `1-3, 5`."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _times(value: float, middle: float) -> str:
    return f"{value / middle:,.0f}" if middle > 0 else "∞"


def _number(value: float) -> str:
    """Four significant digits, thousands grouped."""
    magnitude = abs(value)
    if magnitude >= 1000:  # noqa: PLR2004 - four digits
        return f"{value:,.0f}"
    return f"{value:.4g}"
