"""The sections of a page by schema, and those of scans, ablations and fine-tuning runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mwtool.ablation.plot import plot_ablation
from mwtool.evaluation.document import COMPARISON
from mwtool.evaluation.document import SCHEMA as EVALUATION
from mwtool.evaluation.numbers import fine, short
from mwtool.files.tabular import shown
from mwtool.finetune.config import SCHEMA as TRAINING
from mwtool.finetune.plot import plot_training
from mwtool.massive import ABLATION
from mwtool.massive import SCHEMA as SCAN
from mwtool.quantization.document import SCHEMA as QUANTIZATION
from mwtool.report.measured import evaluation_section, quantization_section
from mwtool.report.section import Document, Section, Table
from mwtool.scan.comparison_document import SCHEMA as SCANS
from mwtool.scan.plot import plot_scan
from mwtool.scan.track_document import SCHEMA as TRACK
from mwtool.scan.track_plot import plot_track


def section_of(document: Document) -> Section:
    """The section of a document whose schema is in `SECTIONS`."""
    return SECTIONS[document["schema"]](document)


def _scan(document: Document) -> Section:
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
        figure=plot_scan(document),
        described="Largest magnitudes and median of residual stream and intermediate state over the layers, with "
        "events marked; the numbers are in the document.",
        tables=tuple(tables),
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


def _ablation(document: Document) -> Section:
    said = [one["text"][:1].upper() + one["text"][1:] for one in document["verdicts"]] or ["No attack has a verdict."]
    if not document.get("complete", True):
        said.insert(0, "This ablation is not complete.")
    return Section(
        heading="Ablation",
        said=tuple(said),
        figure=plot_ablation(document) if document["tasks"] else None,
        described="The effect of each attack and of its controls on each task; the tables have the numbers.",
        tables=tuple(
            (
                f"{short(one['name'])}: each attack, beside random rows and the rows of largest norm",
                _runs(document, one),
            )
            for one in document["tasks"]
        ),
        facts={f"{short(name)}, unchanged model": value for name, value in document["baseline"].items()},
    )


def _runs(document: Document, task: Document) -> list[dict[str, Any]]:
    """A line for each attack, and one for all random draws beside it."""
    attacks: dict[tuple[str, str, str], list[Document]] = {}
    for run in document["runs"]:
        layers = "+".join(str(place["layer"]) for place in run["places"])
        rows = "random" if (run["control"] or "").startswith("random") else run["control"] or "ranked"
        attacks.setdefault((f"{run['mode']} {run['k']}", layers, rows), []).append(run)
    order = ("ranked", "norm", "random")
    chosen = sorted(attacks, key=lambda key: (list(attacks).index((*key[:2], "ranked")), order.index(key[2])))
    return [_run(key, attacks[key], task) for key in chosen]


def _run(key: tuple[str, str, str], runs: Sequence[Document], task: Document) -> dict[str, Any]:
    """The runs of one attack on rows of one kind: a measurement with its interval, or draws with their range."""
    attack, layers, rows = key
    name, accuracy = task["name"], task["metric"] != "perplexity"
    values = [run["delta" if accuracy else "ratio"][name] for run in runs]
    known = [value for value in values if value is not None]
    spread = runs[0]["interval"][name] if rows != "random" else [min(known), max(known)] if known else None
    kinds = {"ranked": "ranked", "norm": "largest norm", "random": f"random, {len(runs)} draw{'s' * (len(runs) > 1)}"}
    found = [run["results"][name] for run in runs if run["results"][name] is not None]
    return {
        "attack": attack,
        "layers": layers,
        "rows": kinds[rows],
        "value": statistics.fmean(found) if found else "not finite",
        "points" if accuracy else "ratio": statistics.fmean(known) if known else None,
        "95 % interval, or range of draws": None if spread is None else f"{shown(spread[0])} to {shown(spread[1])}",
    }


def _training(document: Document) -> Section:
    measured = document["measured"]
    losses = (("training", "first_loss", "last_loss"), ("held-out", "first_eval_loss", "last_eval_loss"))
    said = tuple(
        f"The {name} loss went from {measured[first]:.4f} to {measured[last]:.4f}."
        for name, first, last in losses
        if measured[first] is not None and measured[last] is not None
    )
    curriculum = document["settings"]["curriculum"]
    told = ("curriculum", "seed", "dtype")  # here, or at the head of the settings
    facts = {name: value for name, value in document["settings"].items() if name not in told}
    return Section(
        heading="Fine-tuning",
        said=said or ("No loss was logged.",),
        figure=plot_training(document),
        described="Loss over the optimizer steps, and the probability with which MacDrop dropped entries.",
        tables=(),
        facts={
            **facts,
            "macdrop": curriculum["schedule"],
            "steps": document["steps"],
            "data": document["data"]["name"],
        },
    )


def _scans(document: Document) -> Section:
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
        figure=None,
        described="",
        tables=(("Events of A and B, and what became of the rows that carry them", events),) if events else (),
        facts={"A": document["a"]["name"], "B": document["b"]["name"]},
    )


def _track(document: Document) -> Section:
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
        figure=plot_track(document),
        described="Largest magnitudes of both states of the first token and their kurtosis over the checkpoints; the "
        "table has the numbers.",
        tables=(("Checkpoints: the layers before the last, first token alone", lines),),
        facts=document["settings"],
    )


SECTIONS: Mapping[str, Callable[[Document], Section]] = {
    SCAN: _scan,
    SCANS: _scans,
    TRACK: _track,
    ABLATION: _ablation,
    QUANTIZATION: quantization_section,
    TRAINING: _training,
    EVALUATION: evaluation_section,
    COMPARISON: evaluation_section,
}
"""By schema, in the order of the page."""
