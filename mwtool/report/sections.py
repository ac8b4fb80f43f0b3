"""What the page says of one document: sentences, a figure, tables, settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mwtool.ablation.plot import plot_ablation
from mwtool.evaluation.document import SCHEMA as EVALUATION
from mwtool.files.tabular import shown
from mwtool.finetune.config import SCHEMA as TRAINING
from mwtool.finetune.plot import plot_training
from mwtool.massive import ABLATION
from mwtool.massive import SCHEMA as SCAN
from mwtool.scan.comparison_document import SCHEMA as COMPARISON
from mwtool.scan.plot import plot_scan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Document = Mapping[str, Any]
Table = tuple[str, list[dict[str, Any]]]
"""A caption and the lines of a table, which have the same keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What is shown of one document.

    said: sentences, the result first. figure: None where the document has none; described: what it shows, in words.
    facts: settings, by name.
    """

    heading: str
    said: tuple[str, ...]
    figure: Figure | None
    described: str
    tables: tuple[Table, ...]
    facts: Mapping[str, Any]


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


def _ablation(document: Document) -> Section:
    return Section(
        heading="Ablation",
        said=tuple(one["text"][:1].upper() + one["text"][1:] for one in document["verdicts"])
        or ("No attack has a verdict.",),
        figure=plot_ablation(document),
        described="The effect of each attack and of its controls on each task; the table has the numbers.",
        tables=(("Runs", [_run(run, name) for name in document["baseline"] for run in document["runs"]]),),
        facts={f"{name}, unchanged model": value for name, value in document["baseline"].items()},
    )


def _run(run: Document, task: str) -> dict[str, Any]:
    return {
        "task": task,
        "attack": f"{run['mode']} {run['k']}",
        "rows": {None: "ranked", "norm": "largest norm"}.get(run["control"], run["control"]),
        "layers": "+".join(str(place["layer"]) for place in run["places"]),
        "value": run["results"][task],
        "ratio": run["ratio"][task],
        "95 % interval": run["interval"][task],
        "points": run["delta"][task],
    }


def _training(document: Document) -> Section:
    measured = document["measured"]
    said = f"The training loss went from {measured['first_loss']:.4f} to {measured['last_loss']:.4f}."
    if measured["last_eval_loss"] is not None:
        said += f" The held-out loss went from {measured['first_eval_loss']:.4f} to {measured['last_eval_loss']:.4f}."
    curriculum = document["settings"]["curriculum"]
    facts = {name: value for name, value in document["settings"].items() if name != "curriculum"}
    return Section(
        heading="Fine-tuning",
        said=(said,),
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


def _evaluation(document: Document) -> Section:
    keys = ("attack", "task", "part", "metric", "value", "stderr", "n")
    lines = [{name: result[name] for name in keys} for result in document["results"]]
    return Section(
        heading="Evaluation",
        said=() if document["complete"] else ("This evaluation is not complete.",),
        figure=None,
        described="",
        tables=(("Results", lines),),
        facts=document["options"],
    )


def _comparison(document: Document) -> Section:
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


SECTIONS: Mapping[str, Callable[[Document], Section]] = {
    SCAN: _scan,
    COMPARISON: _comparison,
    ABLATION: _ablation,
    TRAINING: _training,
    EVALUATION: _evaluation,
}
"""By schema, in the order of the page."""
