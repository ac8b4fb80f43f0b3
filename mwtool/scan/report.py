"""A scan as text for people, with Rich: levels over depth, the events, the massive rows, and what to type next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mwtool.scan.definitions import median
from mwtool.scan.published import published
from mwtool.scan.story import build_up, label_of, overflow, peak, ranges, story, told, trace
from mwtool.scan.tables import number, percent, times

if TYPE_CHECKING:
    from mwtool.massive import MassiveWeights
    from mwtool.scan.ranking import Router
    from mwtool.scan.scanner import Scan

LEVELS = "▁▂▃▄▅▆▇█"

FOLDED_FROM = 12
"""With more events than this, neighbours that do the same to the same dimension share a line."""

NARROW, WIDE = 76, 96
"""Columns from which on the events' table has room for all its columns: alone, and with those of a check."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What a check adds. cells: event number -> texts for "zero k" and "retain k"; lines: what it concludes."""

    k: int
    cells: Mapping[int, tuple[str, str]] = field(default_factory=dict)
    lines: tuple[str, ...] = ()


def scan_report(scan: Scan, width: int, *, every: bool = False, check: Checked | None = None) -> RenderableType:
    """The report of a scan. width: columns of the terminal; every: one line for each event, however many there are."""
    parts: list[RenderableType] = [_heading(scan)]
    if scan.events:
        parts += [
            _levels(scan, width),
            _events(scan, width, every=every, check=check),
            _legend(scan, full=_full(width, check)),
        ]
        parts += [Text(story(scan, dimension)) for dimension in told(scan)]
        parts += [Text(line, "yellow") for d in told(scan) if (line := build_up(scan, d)) is not None]
    if scan.massive is None:
        parts += _nothing(scan)
    else:
        parts += [Text(), _verdict(scan, scan.massive), _rows(scan.massive)]
    parts += [Text(line) for line in (check.lines if check is not None else ())]
    return Group(*parts, *_remarks(scan), *_next(scan, check))


def _heading(scan: Scan) -> RenderableType:
    one, bos = scan.identity, scan.bos
    revision = f" at {one.revision[:12]}" if one.revision else ""
    origin = {"tokenizer": "from the tokenizer", "config": "from config.json", "given": "as given", "none": "not a bos"}
    return Text.assemble(
        (one.model, "bold"),
        f"{revision}: {one.model_type}, {one.layers} layers, hidden {one.hidden_size:,}, "
        f"FFN {one.intermediate_size:,}, {scan.parameters:,} parameters, {scan.dtype} on {scan.device}\n"
        f"input: {bos.token or '(no tokenizer)'} (id {bos.id}, {origin[bos.how]}) alone at the first position\n",
    )


def _levels(scan: Scan, width: int) -> Text:
    """|h_l[d]| of the dimensions worth a sentence, a character a layer, on one log scale."""
    shown = told(scan)
    largest = max(peak(scan, dimension)[1] for dimension in shown)
    text = Text(f"|h| after layers 0 to {len(scan.states) - 1}, log scale\n", "dim")
    for dimension in shown:
        at, value = peak(scan, dimension)
        name = str(dimension).ljust(max(len(str(one)) for one in shown))
        line = sparkline([abs(v) for v in trace(scan, dimension).values], largest, max(width - 40, 20))
        text.append(f"dimension {name} {line} max {number(value)} (layer {at})\n")
    return text


def sparkline(values: list[float], largest: float, width: int) -> str:
    """One character a value from 1 to `largest` on a log scale; neighbours share one, by their maximum, if too many."""
    each = math.ceil(len(values) / width)
    joined = [max(values[at : at + each]) for at in range(0, len(values), each)]
    top = math.log(max(largest, math.e))
    return "".join(
        LEVELS[min(len(LEVELS) - 1, max(0, int(math.log(max(value, 1.0)) / top * len(LEVELS))))] for value in joined
    )


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of the events' table: an event, or neighbours that do the same to the same dimension."""

    first: int
    last: int
    label: str


def _lines(scan: Scan, *, every: bool) -> list[_Line]:
    lines: list[_Line] = []
    for at, event in enumerate(scan.events):
        label = label_of(scan, at)
        if not every and len(scan.events) > FOLDED_FROM and lines:
            last = lines[-1]
            before = scan.events[last.last]
            marked = scan.massive_event in (at, last.last)
            joins = (before.dimension, last.label, before.layer) == (event.dimension, label, event.layer - 1)
            if joins and not marked:
                lines[-1] = _Line(last.first, at, label)
                continue
        lines.append(_Line(at, at, label))
    return lines


def _events(scan: Scan, width: int, *, every: bool, check: Checked | None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    full = _full(width, check)
    for name in ("#", "layer"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("event", no_wrap=True)
    names = ["dim", "before", "after", *(["lives"] if full else []), "row", "|z|", *(["x median"] if full else [])]
    names += ["share", *([] if check is None else [f"zero {check.k}", f"retain {check.k}"])]
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for line in _lines(scan, every=every):
        table.add_row(*_cells(scan, line, full=full, check=check), style=_style(scan, line))
    return table


def _full(width: int, check: Checked | None) -> bool:
    """Whether there is room for how long an event lives and the ratio to the median."""
    return width >= (NARROW if check is None else WIDE)


def _style(scan: Scan, line: _Line) -> str | None:
    return "bold yellow" if scan.massive_event == line.first else None


def _cells(scan: Scan, line: _Line, *, full: bool, check: Checked | None) -> list[str]:
    group = scan.events[line.first : line.last + 1]
    top = max(group, key=lambda event: event.rows.magnitudes[0])
    mark = "▶ " if scan.massive_event == line.first else ""
    cells = [f"{mark}{_span(line.first, line.last)}", _span(group[0].layer, group[-1].layer), line.label]
    cells += [str(top.dimension), number(group[0].before), number(group[-1].after)]
    lives = "" if top.lives is None else str(top.lives)
    row = f"{top.rows.indices[0]}" if top.rows.expert is None else f"e{top.rows.expert}:{top.rows.indices[0]}"
    cells += [*([lives] if full else []), row, number(top.rows.magnitudes[0])]
    cells += [times(top.rows.magnitudes[0], top.rows.median)] if full else []
    cells.append(f"{top.rows.shares[0]:.1%}")
    return cells + ([] if check is None else list(check.cells.get(line.first, ("", ""))))


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _legend(scan: Scan, *, full: bool) -> Text:
    expert = " (eN:row in expert N)" if any(event.rows.expert is not None for event in scan.events) else ""
    lives = "" if not full else " lives: layers until |h| is below half of after."
    return Text(f"row: largest |z| of the FFN{expert}. share: its part of what the FFN adds to dim.{lives}", "dim")


def _nothing(scan: Scan) -> Iterator[Text]:
    dimensions = ", ".join(str(one.dimension) for one in scan.dimensions[:5])
    if scan.absence == "written only in the last layer":
        yield Text("\nNo massive layer: the only FFN that writes a massive dimension up is in the last layer.", "bold")
    elif scan.absence == "not written by an FFN":
        yield Text(
            f"No massive layer: the stream has massive dimensions ({dimensions}), but no FFN writes them up; they come "
            f"from the embedding or from attention.",
            "bold",
        )
    else:
        yield Text("No massive activations at this token.", "bold")
        yield Text(_largest(scan))


def _largest(scan: Scan) -> str:
    counted = [state for state in scan.states if state.layer < scan.identity.layers - 1] or list(scan.states)
    largest = max(counted, key=lambda state: float(state.hidden.abs().max()))
    top, middle, limits = float(largest.hidden.abs().max()), median(largest.hidden), scan.settings.thresholds
    return (
        f"The largest entry of the residual stream is {number(top)}, {times(top, middle)} times the median, after "
        f"layer {largest.layer}; massive means above {limits.magnitude:g} and {limits.ratio:g} times the median."
    )


def _verdict(scan: Scan, massive: MassiveWeights) -> Text:
    title = "Chosen by hand: layer" if scan.settings.by_hand else "Massive layer"
    text = Text.assemble(
        (f"{title} {massive.layer}", "bold"),
        f" ({massive.module}, the paper's layer {massive.layer + 1})",
        "." if scan.settings.by_hand else ": the largest |z| of all writes.",
    )
    verb = "carries" if massive.count == 1 else "carry"
    text.append(f"\n{massive.count} of {_width(scan, massive):,} rows {verb} it", "bold")
    k = len(massive.indices)
    top = f"the {k} rows below are" if k > 1 else "the row below is"
    text.append(f"; {top} {massive.share_of_parameters:.4%} of all parameters.")
    if scan.settings.by_hand and scan.predicted is not None:
        text.append(f"\nBy the definitions it would be layer {scan.predicted.layer}.")
    if scan.router is not None:
        text.append(_routing(scan.router, massive.expert))
    return text


def _width(scan: Scan, massive: MassiveWeights) -> int:
    """I of the network that holds the rows; in an MoE model it may differ from layer to layer."""
    parts = scan.states[massive.layer].parts
    return next(part.intermediate.numel() for part in parts if part.ffn.expert == massive.expert)


def _routing(router: Router, carrier: int | None) -> str:
    """Which network the rows belong to, where the router sends bos, and what the shared expert writes."""
    lines = ["The rows are the shared expert's." if carrier is None else f"The rows are those of expert {carrier}."]
    lines += [
        f"bos goes to expert {c.expert}: probability {c.probability:.1%}, weight {c.weight:.3g}, share {c.share:.1%}"
        for c in router.choices
    ]
    if router.shared_share is not None:
        lines.append(f"the shared expert: share {router.shared_share:.1%}")
    return "\n" + "\n  ".join(lines)


def _rows(massive: MassiveWeights) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    for name in ("rank", "row", "|z|", "x median", f"share of dim {massive.dimension}"):
        table.add_column(name, justify="right")
    ranked = zip(massive.indices, massive.magnitudes, massive.shares, strict=True)
    for rank, (index, magnitude, share) in enumerate(ranked, start=1):
        style = "bold yellow" if rank <= massive.count else None
        cells = (str(rank), str(index), number(magnitude), times(magnitude, massive.median), percent(share))
        table.add_row(*cells, style=style)
    return table


def _remarks(scan: Scan) -> Iterator[Text]:
    """Further findings, one line for each."""
    yield Text()
    if (warning := overflow(scan)) is not None:
        yield Text(warning, "yellow")
    layers = sorted({layer for layer, _, _ in scan.sun})
    passed = f"passed after layers {ranges(layers)}" if layers else "not passed"
    yield Text(f"The stricter published test ({scan.settings.thresholds.sun_ratio:g} x median) is {passed}.")
    yield from map(Text, _compared(scan))
    if scan.partial:
        last = len(scan.states) - 1
        yield Text(
            f"Only layers 0 to {last} of {scan.identity.layers} were run: a later layer may erase this, or write a "
            f"larger value.",
            "yellow",
        )


def _compared(scan: Scan) -> Iterator[str]:
    known = published(scan.identity.model)
    if known is None:
        return
    if known.rows is not None and scan.massive is not None:
        expert = "" if known.rows.expert is None else f", expert {known.rows.expert}"
        rows = ", ".join(map(str, known.rows.indices))
        said = known.rows.agreement(scan.massive.layer, scan.massive.indices)
        yield f"Published (layer {known.rows.layer}{expert}: {rows}): {said}."
    if known.super_weights:
        found = {(w.layer, w.hidden_dim, w.ffn_index) for w in scan.super_weights}
        agreed = sum(one in found for one in known.super_weights)
        yield f"Published super weights: {agreed} of {len(known.super_weights)} found."


def _next(scan: Scan, check: Checked | None) -> Iterator[Text]:
    """What to type from here."""
    model = shlex.quote(scan.identity.model)
    yield Text()
    if scan.massive is not None and check is None:
        yield Text("Next: measure what the model loses without these rows", "bold")
        place = _place(scan, scan.massive)
        yield Text(f"  mwtool ablate {model}{place}" if place else f"  mwtool scan {model} --check")
    flags = ["--states", *(["--super-weights"] if scan.super_weights else [])]
    flags += ["--protect"] if scan.protect else []
    yield Text(f"More tables: mwtool scan with {', '.join(flags)}")


def _place(scan: Scan, massive: MassiveWeights) -> str:
    """The options that name these rows, where a plain scan would choose others."""
    if not (scan.settings.by_hand or scan.partial):
        return ""
    expert = "" if massive.expert is None else f" --expert {massive.expert}"
    rows = f" --indices {','.join(map(str, massive.indices))}" if scan.settings.by_hand.indices else ""
    return f" --layer {massive.layer}{expert}{rows}"
