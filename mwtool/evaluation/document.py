"""Documents of schema mwtool.eval/1 and mwtool.comparison/1: writing and reading. docs/json.md describes every key."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mwtool.errors import BadValue
from mwtool.evaluation.comparison import Entry, Paired, compare_with_first
from mwtool.evaluation.config import Options
from mwtool.evaluation.evaluate import Result
from mwtool.evaluation.measurement import Measured, bos_for
from mwtool.evaluation.task_mean import compared_means, mean_document
from mwtool.files.document import envelope, finite, text_of
from mwtool.massive import MassiveWeights
from mwtool.models.load import Loaded
from mwtool.scan.targets import Group
from mwtool.surgery.attack import Attack, parse_attack

SCHEMA = "mwtool.eval/1"
COMPARISON = "mwtool.comparison/1"
SAME = ("revision", "dtype", "attention", "bos", "seed", "options")
"""Keys that all results of a document share. A run is resumed only if these and the attacked rows are equal."""
LIBRARIES = ("accelerate", "datasets", "lm_eval", "peft")


def eval_document(
    loaded: Loaded,
    options: Options,
    *,
    attacks: Sequence[Attack],
    tasks: Sequence[str],
    results: Sequence[Result] = (),
    massive: MassiveWeights | None = None,
    notes: Sequence[str] = (),
    command: str | None = None,
    complete: bool = True,
    groups: Mapping[tuple[int, ...], Group] | None = None,
) -> dict[str, Any]:
    """The document of one evaluation. Numbers that are not finite are null, and `nonfinite` gives the reason."""
    from mwtool.evaluation.schema import EvalDocument
    from mwtool.files.schema import checked

    head = envelope_of(SCHEMA, loaded, seed=options.seed, command=command)
    document = {
        **head,
        "versions": {**head["versions"], **_versions()},
        **conditions_of(loaded, options),
        "massive": None
        if massive is None
        else {"layer": massive.layer, "expert": massive.expert, "indices": list(massive.indices)},
        "places": {
            "+".join(map(str, layers)): [
                {"layer": one.layer, "expert": one.expert, "indices": list(one.indices)} for one in group
            ]
            for layers, group in (groups or {}).items()
        },
        "attacks": [str(attack) for attack in attacks],
        "tasks": list(tasks),
        "complete": complete,
        "results": [result_of(one) for one in results],
        "means": _means([Entry("", str(one.attack), one.measured) for one in results]),
        "notes": list(dict.fromkeys((*loaded.notes, *notes))),
    }
    return checked(EvalDocument, document)


def conditions_of(loaded: Loaded, options: Options) -> dict[str, Any]:
    """Under what all results of a document are measured: results of equal conditions can be put together."""
    bos = bos_for(loaded, options)
    return {
        "attention": getattr(loaded.base.config, "_attn_implementation", None),
        "bos": None if bos is None else {"id": bos.id, "token": bos.token, "how": bos.how},
        "options": {
            "limit": options.limit,
            "protocol": options.protocol,
            "window": options.window,
            "delimiter": options.delimiter,
            "new_tokens": options.new_tokens,
            **({} if options.judge is None else {"judge": options.judge}),
            **({"compile": True} if options.compile else {}),
        },
        "batch_size": options.batch_size,
    }


def result_of(one: Result) -> dict[str, Any]:
    """An entry of `results`."""
    return {"attack": str(one.attack), **measured_document(one.measured)}


def measured_document(measured: Measured) -> dict[str, Any]:
    """What was measured, without the attack it was measured under."""
    return {
        "task": measured.task,
        "part": measured.part,
        "metric": measured.metric,
        "value": finite(measured.value),
        "stderr": None if measured.stderr is None else finite(measured.stderr),
        "n": measured.n,
        "seconds": round(measured.seconds, 3),
        "nonfinite": measured.nonfinite,
        "higher_is_better": measured.higher_is_better,
        "digest": measured.digest,
        "setting": measured.setting,
        "samples": [finite(value) for value in measured.samples],
        "weights": None if measured.weights is None else list(measured.weights),
        "answers": list(measured.answers),
    }


def comparison_document(
    documents: Sequence[dict[str, Any]], names: Sequence[str], command: str | None
) -> dict[str, Any]:
    """Documents of several models, with every metric compared with the first of its task, part and metric."""
    from mwtool.evaluation.schema import ComparisonDocument
    from mwtool.files.schema import checked

    keys = ("mwtool_version", "model", "revision", "model_type", "dtype", "device", "seed", "versions")
    document = {
        "schema": COMPARISON,
        **{key: documents[0][key] for key in keys},
        "command": command,
        "names": list(names),
        "complete": all(one["complete"] for one in documents),
        "pairs": [_pair(*one) for one in compare_with_first(entries_of(documents, names))],
        "means": _means(entries_of(documents, names), models=True),
        "models": list(documents),
    }
    return checked(ComparisonDocument, document)


def entries_of(documents: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Entry]:
    """Every metric in these documents. names: what to call the model of each document."""
    return [
        Entry(name, entry["attack"], measured_of(entry))
        for document, name in zip(documents, names, strict=True)
        for entry in document["results"]
    ]


def measured_of(entry: dict[str, Any]) -> Measured:
    """The measurement in an entry of `results`."""
    nan = math.nan
    return Measured(
        task=entry["task"],
        part=entry["part"],
        metric=entry["metric"],
        value=nan if entry["value"] is None else entry["value"],
        stderr=entry["stderr"],
        n=entry["n"],
        seconds=entry["seconds"],
        samples=tuple(nan if value is None else value for value in entry["samples"]),
        weights=None if entry["weights"] is None else tuple(entry["weights"]),
        higher_is_better=entry["higher_is_better"],
        nonfinite=entry["nonfinite"],
        digest=entry["digest"],
        setting=entry["setting"],
        answers=tuple(entry["answers"]),
    )


def read_documents(path: Path) -> list[dict[str, Any]]:
    """The evaluations in a result file, one or several. Raises BadValue if it is not a result file."""
    from mwtool.evaluation.schema import ComparisonDocument, EvalDocument
    from mwtool.files.schema import Envelope, read_document

    models: dict[str, type[Envelope]] = {SCHEMA: EvalDocument, COMPARISON: ComparisonDocument}
    document, _ = read_document(path, models, "mwtool eval -o")
    return list(document["models"]) if document["schema"] == COMPARISON else [document]


def earlier_notes(now: dict[str, Any], documents: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The notes of the same model among earlier documents: of tasks that are done and not prepared again."""
    return tuple(note for one in documents if _same_model(one, now) for note in one["notes"])


def _same_model(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(one[key] == other[key] for key in ("model", "adapter", "on"))


def earlier_results(path: Path, now: dict[str, Any], documents: Sequence[dict[str, Any]]) -> list[Result]:
    """Earlier results of the same model, to resume from. Raises BadValue if they were measured with other settings."""
    for one in documents:
        if not _same_model(one, now):
            continue
        other = next((key for key in SAME if one[key] != now[key]), None)
        if other is None and not _same_rows(one["massive"], now["massive"]):
            other = "massive"
        if other is None and _conflicting(one.get("places", {}), now["places"]):
            other = "places"
        if other is not None:
            raise made_otherwise(path, other, one[other], now[other])
        return [Result(parse_attack(entry["attack"]), measured_of(entry)) for entry in one["results"]]
    return []


def made_otherwise(path: Path, key: str, was: Any, now: Any) -> BadValue:
    """What is said where a run is to resume from a file that was made under another condition."""
    before, after = _differing(was, now)
    return BadValue(
        f"{path} was made with {key} {before}, now it is {after}; use the same to resume, or write elsewhere"
    )


def _conflicting(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether layers that both attack have other rows; k may have grown since, which ranks more of them."""
    return any(
        len(one[name]) != len(other[name])
        or not all(_same_rows(*pair) for pair in zip(one[name], other[name], strict=True))
        for name in one.keys() & other.keys()
    )


def _differing(one: Any, other: Any) -> tuple[str, str]:
    """The entries that differ, of two objects; of other values, the values themselves."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return str(one), str(other)
    keys = [key for key in one if one[key] != other.get(key)]
    was, new = (", ".join(f"{key} {side.get(key)}" for key in keys) for side in (one, other))
    return was, new


def _same_rows(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    """Whether both rank the same rows, as far as both go."""
    if one is None or other is None:
        return True  # one of them has no attack
    ranked = min(len(one["indices"]), len(other["indices"]))
    places = [(rows["layer"], rows["expert"], rows["indices"][:ranked]) for rows in (one, other)]
    return places[0] == places[1]


def text_of_results(document: dict[str, Any]) -> str:
    """As `text_of`, but with lists of numbers, which have one entry per sample, on one line."""
    return re.sub(r"\[\n\s+((?:[-+\d.eE,\s]|null)+?)\s+\]", _on_one_line, text_of(document))


def _on_one_line(found: re.Match[str]) -> str:
    return f"[{' '.join(found[1].split())}]"


def _pair(entry: Entry, reference: Entry, found: Paired | None) -> dict[str, Any]:
    task, part, metric = entry.key
    interval = None if found is None or found.low is None or found.high is None else [found.low, found.high]
    return {
        "task": task,
        "part": part,
        "metric": metric,
        "model": entry.model,
        "attack": entry.attack,
        "beside": {"model": reference.model, "attack": reference.attack},
        "kind": None if found is None else found.kind,
        "value": None if found is None else finite(found.value),
        "interval": None if interval is None else [finite(value) for value in interval],
        "n": None if found is None else found.n,
        "tied": None if found is None or found.kind != "difference" else _tied(entry.measured, reference.measured),
    }


def _tied(one: Measured, other: Measured) -> int:
    """On how many examples both have the same value, such as a judge's score."""
    return sum(a == b for a, b in zip(one.samples, other.samples, strict=True))


def _means(entries: Sequence[Entry], *, models: bool = False) -> list[dict[str, Any]]:
    """The mean accuracies over tasks, each compared with the first. models: name the model of each."""
    return [
        {**({"model": model} if models else {}), "attack": attack, **mean_document(mean, reference)}
        for model, attack, mean, reference in compared_means(entries)
    ]


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def envelope_of(schema: str, loaded: Loaded, *, seed: int, command: str | None) -> dict[str, Any]:
    """The first keys of a document on a loaded model, with its PEFT adapter and where rows were attacked."""
    identity = loaded.identity
    return {
        **envelope(
            schema,
            model=identity.model,
            revision=identity.revision,
            model_type=identity.model_type,
            dtype=str(loaded.base.dtype).removeprefix("torch."),
            device=str(loaded.base.device),
            seed=seed,
            command=command,
        ),
        "adapter": loaded.source.adapter,
        "on": loaded.on,
    }
