"""The longer tables of a scan, shown on request: states by layer, super weights, places to protect."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mwtool.files.units import duration, size
from mwtool.scan.definitions import median
from mwtool.scan.forecast import ScanForecast, SeriesForecast, seconds_of

if TYPE_CHECKING:
    from mwtool.scan.capture import LayerState
    from mwtool.scan.plan import Part
    from mwtool.scan.protect import Protected
    from mwtool.scan.scanner import Scan

NARROW = 76
"""Columns from which on the table of states has room for all of its own."""

NEWS = 0.1
"""A layer with an event or a super weight, or whose largest |h| is in another dimension or differs by this part from
that of the layer before, is shown on its own line."""

LEAST = 3
"""Fewer neighbours than this are not folded."""


def plan_table(found: ScanForecast, before: float) -> RenderableType:
    """What a scan will read and take: a line a run of layers that are alike, and what it comes to.

    before: seconds from the start of the process to the forecast.
    """
    plan, seconds = found.plan, seconds_of(found, before)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("part", no_wrap=True)
    for name in ("tensors", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in _alike(plan.parts):
        first, last = run[0], run[-1]
        name = first.name if first is last else f"layers {first.name.split()[-1]} to {last.name.split()[-1]}, each"
        table.add_row(name, f"{first.tensors:,}", f"{first.size:,}")
    table.add_row("in all", f"{sum(part.tensors for part in plan.parts):,}", f"{plan.size:,}", style="bold")
    walked = len(plan.parts) - 1
    lines = [
        f"{walked} of {plan.layers} layers are walked. Weights in memory at a time: {plan.largest:,} bytes, as stored.",
        f"Files that hold these tensors: {plan.files}, with {plan.whole:,} bytes of weights, "
        + ("on this machine." if plan.cached else "on the Hub; by ranges, only what is listed is fetched."),
    ]
    if plan.unread:
        names = " and ".join(one.parameter for one in plan.unread)
        lines.append(f"Not read, since one position does without: {names} ({plan.spared:,} bytes).")
    if plan.experts is not None:
        lines.append(f"Of each layer's routed experts {plan.experts} are counted, those of one token.")
    lines += _taken(found, seconds)
    return Group(Text(f"{plan.model}: what a scan reads", "bold"), table, *map(Text, lines))


def series_table(found: SeriesForecast, before: float) -> RenderableType:
    """What scans one after the other will read and take. before: as in `plan_table`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("scan")
    for name in ("layers", "bytes"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in found.scans:
        revision = "" if one.plan.revision is None else f" {one.plan.revision}"
        table.add_row(f"{one.plan.model}{revision}", f"{len(one.plan.parts) - 1:,}", f"{one.plan.size:,}")
    table.add_row("in all", "", f"{found.size:,}", style="bold")
    return Group(table, *map(Text, _taken(found, found.seconds(before))))


def _taken(found: ScanForecast | SeriesForecast, seconds: float | None) -> list[str]:
    """Memory and time in words. seconds: None without a trial."""
    measured = "as measured" if seconds is not None else "by shapes"
    shown = {"the process": found.process, "tensors on the GPU": found.gpu}
    parts = [f"{name} {size(count)}" for name, count in shown.items() if count is not None]
    lines = [f"Memory at most, {measured}: {', '.join(parts)}."] if parts else []
    if seconds is not None:
        lines.append(f"Time: about {duration(seconds)} from start to end, from a trial of the first layers.")
    return lines


def _alike(parts: Sequence[Part]) -> list[list[Part]]:
    """Runs of layers with as many tensors and bytes each."""
    runs: list[list[Part]] = []
    for part in parts:
        if (
            runs
            and part.name.startswith("layer ")
            and (part.tensors, part.size) == (runs[-1][0].tensors, runs[-1][0].size)
        ):
            runs[-1].append(part)
        else:
            runs.append([part])
    return runs


def states_table(scan: Scan, width: int, *, every: bool = False) -> RenderableType:
    """Largest entry and median of both states, a line a layer; layers without news are folded unless `every`.

    width: columns of the terminal; a narrow one leaves out the median and the row of the intermediate state.
    """
    names = ["layer", "max |h|", "dim", "median", "max |z|", "row", "median"]
    shown = len(names) if width >= NARROW else len(names) - 2
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names[:shown]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("event", no_wrap=True)
    for group in _folded(scan, every=every):
        cells = _line(scan, group)
        table.add_row(*cells[:shown], cells[-1], style="bold yellow" if _massive(scan, group) else None)
    return Group(Text("\nThe residual stream h and the intermediate state z by layer", "bold"), table)


def _massive(scan: Scan, group: Sequence[LayerState]) -> bool:
    return scan.massive is not None and [scan.massive.layer] == [state.layer for state in group]


def _folded(scan: Scan, *, every: bool) -> list[list[LayerState]]:
    """Layers one by one where there is news, else runs of them."""
    groups: list[list[LayerState]] = []
    quiet = False
    for at, state in enumerate(scan.states):
        calm = not every and 0 < at < len(scan.states) - 1 and not _news(scan, at)
        if calm and quiet:
            groups[-1].append(state)
        else:
            groups.append([state])
        quiet = calm
    return [part for group in groups for part in ([group] if len(group) >= LEAST else [[one] for one in group])]


def _news(scan: Scan, at: int) -> bool:
    here, before = scan.states[at].hidden.abs(), scan.states[at - 1].hidden.abs()
    moved = abs(float(here.max()) / float(before.max()) - 1) > NEWS if float(before.max()) else True
    own = bool(scan.states[at].super_weights) or any(event.layer == at for event in scan.events)
    return own or moved or int(here.argmax()) != int(before.argmax())


def _line(scan: Scan, group: Sequence[LayerState]) -> list[str]:
    first, last, alone = group[0], group[-1], len(group) == 1
    layers = str(first.layer) if alone else f"{first.layer}-{last.layer}"
    cells = [layers, _extent([float(s.hidden.abs().max()) for s in group]), str(int(first.hidden.abs().argmax()))]
    cells += [_extent([median(s.hidden) for s in group]), _extent([float(s.intermediate.abs().max()) for s in group])]
    cells += [str(int(first.intermediate.abs().argmax())), number(median(first.intermediate))] if alone else ["", ""]
    return [*cells, next((str(n) for n, event in enumerate(scan.events) if event.layer == first.layer), "")]


def _extent(values: Sequence[float]) -> str:
    """One value as it is, several as a range of three digits."""
    if len(values) == 1:
        return number(values[0])
    low, high = (f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in (min(values), max(values)))  # noqa: PLR2004 - as in `number`
    return low if low == high else f"{low}-{high}"


def super_weights_table(scan: Scan) -> RenderableType:
    """Super weights with the event of their layer, those of layers without an event included."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("event", "layer", "expert", "hidden dim", "FFN index", "value"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in scan.super_weights:
        event = next((str(n) for n, event in enumerate(scan.events) if event.layer == one.layer), "")
        expert = "" if one.expert is None else str(one.expert)
        table.add_row(event, str(one.layer), expert, str(one.hidden_dim), str(one.ffn_index), f"{one.value:.4g}")
    title = "\nSuper weights: down_proj[hidden dim, FFN index]"
    if not scan.super_weights:
        return Text("\nNo super weights: no layer's down_proj has input and output above the spike threshold.")
    return Group(Text(title, "bold"), table)


def protect_table(scan: Scan) -> RenderableType:
    """Where the rows of every event are stored: what to keep in high precision when quantizing."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("event", justify="right", no_wrap=True)
    table.add_column("parameter", no_wrap=True)  # a name to copy: the indices give way
    table.add_column("dim", justify="right", no_wrap=True)
    table.add_column("indices")
    if scan.settings.by_hand:
        _add_places(table, "chosen", scan.protect)
    for n, places in enumerate(scan.event_protect):
        _add_places(table, str(n), places)
    if not table.row_count:
        return Text("\nNothing to protect: the scan found no events.")
    return Group(Text("\nKeep in high precision when quantizing: the rows of each event", "bold"), table)


def _add_places(table: Table, event: str, places: Sequence[Protected]) -> None:
    for at, place in enumerate(places):
        name = "\n".join(_names(place))
        table.add_row("" if at else event, name, str(place.dim), ", ".join(map(str, place.indices)))


def _names(place: Protected) -> Iterator[str]:
    yield place.parameter if place.expert is None else f"{place.parameter}[{place.expert}]"
    if place.checkpoint_name not in (None, place.parameter):
        yield f"  in the files: {place.checkpoint_name}"


def times(value: float, middle: float) -> str:
    """A value over the median."""
    return f"{value / middle:,.0f}" if middle > 0 else "∞"


def percent(value: float) -> str:
    """A share in hundredths of a percent."""
    return f"{round(value, 4) + 0.0:.2%}"  # the sum makes a rounded -0.0 positive


def number(value: float) -> str:
    """Four significant digits, thousands grouped."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"  # noqa: PLR2004 - four digits
