"""Sections on scans: one, two side by side, and those of a training run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mwtool.evaluation.numbers import fine
from mwtool.files.tabular import shown
from mwtool.report.section import Document, Section, Table
from mwtool.scan.comparison.plot import plot_comparison
from mwtool.scan.plot import plot_scan
from mwtool.scan.states_plot import WHERE, figures_of
from mwtool.scan.tracking.plot import plot_track

TOKENS = 12
"""Triggers that are listed; the document has more."""
DESCRIBED = {
    "positions": "Magnitudes of both states over position and dimension, and the attention each position receives; the "
    "table has the largest ones.",
    "attention": "Attention weights, query by key, of the massive layer and its neighbours.",
    "sinks": "The share of heads that are attention sinks in each layer, and the score of each head; the table has the "
    "shares.",
    "router": "The probability of each expert in each layer, for the first token.",
}
"""By the short name of a figure, what it shows."""


def scan_section(document: Document) -> Section:
    """A scan, with its check and what it found in whole texts."""
    bos = document["bos"]
    tables: list[Table] = []
    if document["massive"] is not None:
        tables.append((f"Rows of {document['massive']['module']}, ranked by |z|", list(_rows(document["massive"]))))
    if document["events"]:
        tables.append(("Events: layers that write a massive dimension", list(map(_event, document["events"]))))
    if document["check"] is not None:
        tables.append(
            ("Check: perplexity ratio without and with only the rows of each event", list(_checked(document["check"])))
        )
    return Section(
        heading="Scan",
        said=tuple(_found(document)),
        figures=(
            (
                "Largest magnitudes and median of both states over the layers; the numbers are in the document.",
                plot_scan(document),
            ),
            *((DESCRIBED[name], figure) for name, figure in figures_of(document) if name in DESCRIBED),
        ),
        tables=(*tables, *_of_texts(document)),
        facts={"first token": f"{bos['token'] or ''} (id {bos['id']}, from: {bos['how']})", **document["thresholds"]},
    )


def _found(document: Document) -> Iterator[str]:
    one = document["massive"]
    if one is None:
        yield f"No massive layer was found: {document['absence']}."
    else:
        count = max(1, min(one["count"], len(one["indices"])))
        rows = ", ".join(map(str, one["indices"][:count]))
        expert = "" if one["expert"] is None else f", expert {one['expert']}"
        yield (
            f"Layer {one['layer']}{expert} is the massive layer. Row{'s' if count > 1 else ''} {rows} "
            f"account{'' if count > 1 else 's'} for {sum(one['shares'][:count]):.1%} of what it adds to dimension "
            f"{one['dimension']}, which is {shown(one['value'])} after it."
        )
    if document["partial"]:
        yield f"Only the first {document['layers_walked']} layers were scanned; a later one may change this."
    yield from (document["check"] or {}).get("conclusion", ())


def _rows(massive: Document) -> Iterator[dict[str, Any]]:
    for index, magnitude, share in zip(massive["indices"], massive["magnitudes"], massive["shares"], strict=True):
        yield {"row": index, "|z|": magnitude, "share": f"{share:.1%}".replace("-0.0%", "0.0%")}


def _event(event: Document) -> dict[str, Any]:
    return {
        **{name: event[name] for name in ("layer", "kind", "dimension", "written", "before", "after")},
        "rows": event["rows"]["indices"],
    }


def _checked(check: Document) -> Iterator[dict[str, Any]]:
    """What is lost without the rows of each event, of all that write together, and of random rows."""
    for one in check["events"]:
        where = f"event {one['event']}, layer {one['layer']}"
        yield _attacked(where, one["indices"], one["zero"], one["retain"])
    if check["zero_all_up"] is not None:
        yield _attacked("all writes together", (), check["zero_all_up"], None)
    if check["random"] is not None:
        one = check["random"]
        yield _attacked(f"random, layer {one['layer']}", one["indices"], one["zero"], None)


def _attacked(where: str, rows: Sequence[int], zero: Document | None, retain: Document | None) -> dict[str, Any]:
    return {"rows of": where, "rows": rows, "zeroed": _ratio(zero), "only these kept": _ratio(retain)}


def _ratio(one: Document | None) -> str | None:
    if one is None:
        return None
    interval = "" if one["low"] is None else f" [{fine(one['low'])}, {fine(one['high'])}]"
    return f"x{fine(one['ratio'])}{interval}"


def _of_texts(document: Document) -> Iterator[Table]:
    """Tables of positions, sink rates and triggers, where the scan looked for them."""
    positions, sinks, triggers = (document.get(name) for name in ("positions", "sinks", "triggers"))
    for one in positions["placements"] if positions else ():
        name = f"Layer {positions['layer']} by position, {WHERE[one['where']]}" if positions else ""
        yield name, list(_positions(one))
    if sinks:
        said = f"more than {sinks['eps']:g} of their attention on the first of {sinks['length']} tokens"
        lines = [{"layer": one["layer"], "sink rate": f"{one['rate']:.1%}"} for one in sinks["layers"]]
        yield f"Attention sinks: heads with {said}; {sinks['rate']:.1%} of all", lines
    if triggers:
        total = triggers["windows"] * triggers["length"]
        names = ("token", "id", "seen", "massive", "first", "value", "dimension", "layer")
        lines = [{name: one[name] for name in names} for one in triggers["tokens"][:TOKENS]]
        yield f"Triggers: tokens of the {triggers['massive']:,} massive positions of {total:,}", lines


def _positions(placement: Document) -> Iterator[dict[str, Any]]:
    states = zip(placement["tokens"], placement["hidden"]["top"], placement["intermediate"]["top"], strict=True)
    for at, (token, hidden, intermediate) in enumerate(states):
        yield {
            "position": at,
            "token": token,
            "largest |h|": abs(hidden[0]["value"]),
            "dimension": hidden[0]["index"],
            "largest |z|": abs(intermediate[0]["value"]),
            "row": intermediate[0]["index"],
            "attention received": None if placement["after"] is None else placement["after"][at],
        }


def comparison_section(document: Document) -> Section:
    """Two scans side by side."""
    both = {"both": "A and B", "a": "A only", "b": "B only"}
    events = [
        {
            **{name: event[name] for name in ("layer", "dimension")},
            "event in": both[event["found_in"]],
            **{
                f"{said} {side.upper()}": event[f"{key}_{side}"]
                for key, said in (("after", "h after"), ("z", "|z|"))
                for side in "ab"
            },
            **{
                fate: [row["row"] for row in event["rows"] if row["fate"] == fate]
                for fate in ("kept", "moved", "lost", "new")
            },
        }
        for event in document["events"]
    ]
    return Section(
        heading=f"Comparison with {document['b']['name']}",
        said=tuple(document["said"]),
        figures=(("Magnitudes at the massive dimensions of both scans over the layers.", plot_comparison(document)),)
        if document["same_shape"] and document["dimensions"]
        else (),
        tables=(("Events of A and B, and what became of the rows that carry them", events),) if events else (),
        facts={"A": document["a"]["name"], "B": document["b"]["name"]},
    )


def track_section(document: Document) -> Section:
    """Scans of the checkpoints of one training run."""
    points = document["checkpoints"]
    first = next((one for one in points if one["massive"] is not None), None)
    lines = [
        {
            "checkpoint": one["name"] if one["step"] is None else one["step"],
            "massive layer": None if one["massive"] is None else one["massive"]["layer"],
            "rows": None if one["massive"] is None else one["massive"]["rows"],
            "largest |z|": abs(one["intermediate"]["value"]),
            "largest |h|": abs(one["hidden"]["value"]),
            "kurtosis": one["kurtosis"],
        }
        for one in points
    ]
    said = "No checkpoint has a massive layer."
    if first is not None:
        named = first["name"] if first["step"] is None else f"step {first['step']:,}"
        said = f"The first checkpoint with a massive layer is {named}, where it is layer {first['massive']['layer']}."
    return Section(
        heading="Over training",
        said=(said,),
        figures=(
            (
                "Magnitudes and kurtosis of both states over the checkpoints, as in the table.",
                plot_track(document),
            ),
        ),
        tables=(("Checkpoints: the layers before the last, first token alone", lines),),
        facts=document["settings"],
    )
