"""The table of a document, by its schema: the values its report shows, for `--table FILE`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mwtool.errors import BadValue
from mwtool.evaluation.comparison import compare_with_first, is_number
from mwtool.evaluation.document import COMPARISON, entries_of
from mwtool.evaluation.document import SCHEMA as EVALUATION
from mwtool.evaluation.numbers import short
from mwtool.evaluation.plot import evaluations_of, named_models
from mwtool.evaluation.task_mean import compared_means, mean_document
from mwtool.files.figure import model_name
from mwtool.files.table_file import Column, TableOfValues
from mwtool.finetune.config import SCHEMA as TRAINING
from mwtool.massive import ABLATION
from mwtool.massive import SCHEMA as SCAN
from mwtool.quantization.document import SCHEMA as QUANTIZATION
from mwtool.report.section import Document
from mwtool.scan.comparison.document import SCHEMA as SCANS

Row = dict[str, Any]


def table_of(document: Document) -> TableOfValues:
    """The table of a document whose schema is in `TABLES`. Raises BadValue for another one."""
    schema = document.get("schema")
    if not isinstance(schema, str) or schema not in TABLES:
        raise BadValue(f"a document of schema {schema!r} has no table; expected one of {', '.join(TABLES)}")
    return TABLES[schema](document)


def _table(what: str, document: Document, label: str, columns: Sequence[Column], rows: Iterator[Row]) -> TableOfValues:
    caption = f"{what} of {model_name(document)}"
    return TableOfValues(caption=caption, label=label, columns=tuple(columns), rows=tuple(rows))


def _columns(*headings: tuple[str, str], intervals: Sequence[tuple[str, str]] = ()) -> list[Column]:
    """Columns of one value each, then those with an interval: `KEY_low` and `KEY_high`."""
    plain = [Column(key=key, heading=heading) for key, heading in headings]
    return plain + [
        Column(key=key, heading=heading, low=f"{key}_low", high=f"{key}_high") for key, heading in intervals
    ]


def _interval(key: str, value: Any, ends: Sequence[Any] | None) -> Row:
    low, high = (None, None) if ends is None else ends
    return {key: value, f"{key}_low": low, f"{key}_high": high}


def _scan(document: Document) -> TableOfValues:
    columns = _columns(
        ("event", "#"),
        ("layer", "layer"),
        ("kind", "event"),
        ("dimension", "dim"),
        ("written", "written"),
        ("before", "before"),
        ("after", "after"),
        ("lives", "lives"),
        ("expert", "expert"),
        ("row", "row"),
        ("z", "|z|"),
        ("share", "share"),
        intervals=[("zero", "zeroed, ratio"), ("retain", "only these kept, ratio")],
    )
    return _table("Events", document, "events", columns, _events(document))


def _events(document: Document) -> Iterator[Row]:
    checked = {one["event"]: one for one in (document["check"] or {}).get("events", ())}
    for number, event in enumerate(document["events"]):
        rows, check = event["rows"], checked.get(number, {})
        ratios: Row = {}
        for key in ("zero", "retain"):
            one = check.get(key) or {}
            ratios |= _interval(key, one.get("ratio"), (one.get("low"), one.get("high")))
        yield {
            "event": number,
            **{key: event[key] for key in ("layer", "kind", "dimension", "written", "before", "after", "lives")},
            "expert": rows["expert"],
            "row": rows["indices"][0],
            "z": rows["magnitudes"][0],
            "share": rows["shares"][0],
            **ratios,
        }


def _ablation(document: Document) -> TableOfValues:
    columns = _columns(
        ("layers", "layers"),
        ("attack", "attack"),
        ("k", "rows"),
        ("task", "task"),
        ("value", "value"),
        intervals=[("ratio", "ratio"), ("points", "points")],
    )
    columns.append(Column(key="random", heading="random rows, mean [range]", low="random_least", high="random_most"))
    columns.append(Column(key="norm", heading="rows of largest norm"))
    return _table("Ablation", document, "ablation", columns, _runs(document))


def _runs(document: Document) -> Iterator[Row]:
    """The unchanged model and each attack on ranked rows, task by task, then in the mean over tasks.

    Controls stand beside an attack as ratios or points: random rows by their mean and range.
    """
    for name in document["baseline"]:
        yield {"attack": "none", "k": 0, "task": short(name), "value": document["baseline"][name]}
        for run in document["runs"]:
            if run["control"] is None:
                ratio, points = run["ratio"][name], run["delta"][name]
                kind = "delta" if ratio is None else "ratio"
                beside = [(one["control"], one[kind][name]) for one in document["runs"] if _beside(one, run)]
                yield {
                    "layers": _places(run),
                    "attack": run["mode"],
                    "k": run["k"],
                    "task": short(name),
                    "value": run["results"][name],
                    **_interval("ratio", ratio, run["interval"][name]),
                    **_interval("points", points, run.get("delta_interval", {}).get(name)),
                    **_controls(beside),
                }
    yield from _mean_runs(document.get("means", ()))


def _mean_runs(means: Sequence[Document]) -> Iterator[Row]:
    for one in means:
        if one["control"] is None:
            beside = [
                (other["control"], other["points"])
                for other in means
                if other["control"] is not None
                and all(other[key] == one[key] for key in ("mode", "k", "layers", "metric"))
            ]
            yield {
                "layers": None if one["layers"] is None else "+".join(map(str, one["layers"])),
                "attack": one["mode"] or "none",
                "k": one["k"] or 0,
                "task": f"mean {one['metric']} of {len(one['tasks'])} tasks",
                "value": one["value"],
                **_interval("points", one["points"], one["points_interval"]),
                **_controls(beside),
            }


def _beside(one: Document, run: Document) -> bool:
    """Whether `one` is a control of `run`."""
    return one["control"] is not None and (one["mode"], one["k"], _places(one)) == (run["mode"], run["k"], _places(run))


def _places(run: Document) -> str:
    return "+".join(str(place["layer"]) for place in run["places"])


def _controls(beside: Sequence[tuple[str, float | None]]) -> Row:
    random = [value for name, value in beside if name != "norm" and value is not None]
    row: Row = {"norm": next((value for name, value in beside if name == "norm"), None)}
    if random:
        row |= {"random": statistics.fmean(random), "random_least": min(random), "random_most": max(random)}
    return row


def _evaluation(document: Document) -> TableOfValues:
    columns = _columns(
        ("model", "model"),
        ("attack", "attack"),
        ("task", "task"),
        ("part", "subtask"),
        ("metric", "metric"),
        ("value", "value"),
        ("stderr", "standard error"),
        ("n", "n"),
        ("change", "change"),
        intervals=[("beside_first", "beside the first")],
    )
    what = "Evaluation" if document["schema"] == EVALUATION else "Comparison"
    return _table(what, document, what.lower(), columns, _results(document))


def _results(document: Document) -> Iterator[Row]:
    entries = entries_of(evaluations_of(document), named_models(document))
    beside = {id(entry): found for entry, _, found in compare_with_first(entries)}
    for entry in entries:
        one, found = entry.measured, beside.get(id(entry))
        if is_number(one):
            yield {
                "model": entry.model,
                "attack": entry.attack,
                "task": short(one.task),
                "part": one.part,
                "metric": one.metric,
                "value": one.nonfinite or one.value,
                "stderr": one.stderr,
                "n": one.n,
                "change": None if found is None else found.kind,
                **({} if found is None else _interval("beside_first", found.value, (found.low, found.high))),
            }
    for model, attack, mean, reference in compared_means(entries):
        values = mean_document(mean, reference)
        yield {
            "model": model,
            "attack": attack,
            "task": f"mean of {len(mean.tasks)} tasks",
            **{key: values[key] for key in ("metric", "value", "stderr")},
            "change": None if values["points"] is None else "points",
            **_interval("beside_first", values["points"], values["points_interval"]),
        }


def _scans(document: Document) -> TableOfValues:
    sides = [(f"{key}_{side}", f"{name} {side.upper()}") for key, name in (("after", "h after"), ("z", "|z|"))
             for side in "ab"]  # fmt: skip
    columns = _columns(
        ("layer", "layer"),
        ("dimension", "dim"),
        ("found_in", "event in"),
        *sides,
        *((fate, f"rows {fate}") for fate in ("kept", "moved", "lost", "new")),
    )
    rows = (
        {
            **{key: event[key] for key in ("layer", "dimension", "found_in", *(key for key, _ in sides))},
            **{
                fate: [row["row"] for row in event["rows"] if row["fate"] == fate] or None
                for fate in ("kept", "moved", "lost", "new")
            },
        }
        for event in document["events"]
    )
    return _table(f"Events of A ({document['a']['name']}) and B ({document['b']['name']}), scan", document, "scans",
                  columns, rows)  # fmt: skip


def _quantization(document: Document) -> TableOfValues:
    columns = _columns(
        ("bits", "bits"),
        ("protected", "kept in full precision"),
        ("control", "control"),
        ("kept_bytes", "bytes"),
        ("task", "task"),
        ("value", "value"),
        intervals=[("ratio", "ratio"), ("given_back", "given back")],
    )
    return _table("Quantization", document, "quantization", columns, _quantized(document))


def _quantized(document: Document) -> Iterator[Row]:
    for one in document["baseline"]:
        yield {"protected": "everything", "task": short(one["task"]), "value": one["value"]}
    for variant in document["variants"]:
        found = zip(variant["results"], variant["ratios"], variant["shares_given_back"], strict=True)
        for one, ratio, share in found:
            ends = [
                _interval(key, (part or {}).get("value"), ((part or {}).get("low"), (part or {}).get("high")))
                for key, part in (("ratio", ratio), ("given_back", share))
            ]
            yield {
                "bits": variant["bits"],
                "protected": variant["protected"] or "nothing",
                "control": True if variant["control"] else None,
                "kept_bytes": variant["kept_bytes"],
                "task": short(one["task"]),
                "value": one["value"],
                **ends[0],
                **ends[1],
            }


def _training(document: Document) -> TableOfValues:
    columns = _columns(("figure", ""), ("first", "first"), ("last", "last"))
    found = document["measured"]
    rows = [
        {"figure": "training loss", "first": found["first_loss"], "last": found["last_loss"]},
        {"figure": "held-out loss", "first": found["first_eval_loss"], "last": found["last_eval_loss"]},
        {"figure": "seconds a step", "last": found["step_seconds"]},
    ]
    kept = (row for row in rows if row["last"] is not None)
    settings = document["settings"]
    what = f"Fine-tuning with {settings['peft']} and {settings['curriculum']['schedule']}, {document['steps']} steps,"
    return _table(what, document, "training", columns, kept)


TABLES: Mapping[str, Callable[[Document], TableOfValues]] = {
    SCAN: _scan,
    SCANS: _scans,
    ABLATION: _ablation,
    TRAINING: _training,
    EVALUATION: _evaluation,
    COMPARISON: _evaluation,
    QUANTIZATION: _quantization,
}
"""By schema."""
