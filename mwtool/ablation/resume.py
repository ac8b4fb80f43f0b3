"""Go on with a sweep from its document: what was measured is kept in it, with every sample, and read again."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mwtool.ablation.measuring import Measurements, Part
from mwtool.ablation.plans import Key, Plan
from mwtool.errors import BadValue
from mwtool.evaluation.document import SAME, made_otherwise, measured_document, measured_of
from mwtool.evaluation.evaluate import PerplexityTask, Prepared
from mwtool.evaluation.measurement import Measured
from mwtool.files.document import finite
from mwtool.massive import ABLATION
from mwtool.surgery.attack import Attack, parse_mode

Keys = Mapping[str, Any]
"""A document, or an object in one."""


def measurements_document(found: Measurements) -> dict[str, Any]:
    """The keys `measured` and `part`: all that `earlier_measurements` needs to read both again, bit for bit."""
    part = found.part
    return {
        "measured": [
            {**_attack(key), "metrics": [_metric(one) for several in metrics.values() for one in several]}
            for key, metrics in found.found.items()
        ],
        "part": None
        if part is None
        else {
            "task": part.task,
            "under": [
                {**_attack(key), "sums": list(map(finite, sums))}
                for key, sums in zip(part.under, part.sums, strict=True)
            ],
        },
    }


def read_earlier(path: Path) -> dict[str, Any]:
    """The document of a sweep that is to be resumed. Raises BadValue if the file is anything else."""
    from mwtool.ablation.schema import AblateDocument
    from mwtool.files.schema import read_document

    return read_document(path, {ABLATION: AblateDocument}, "mwtool ablate -o")[0]


def earlier_measurements(
    path: Path, document: Keys, now: Keys, plans: Sequence[Plan], tasks: Sequence[Prepared]
) -> Measurements:
    """What `document`, read from `path`, holds of a sweep.

    now: the first keys of the document of the sweep that goes on. plans, tasks: all that it measures, which may be
    more than the earlier one did. Raises BadValue where the earlier one was another model's or measured otherwise, or
    holds what is not asked for now and would be lost.
    """
    for key in ("model", "adapter", "on", *SAME):
        if document[key] != now[key]:
            raise made_otherwise(path, key, document[key], now[key])
    names, keys = {str(one.task) for one in tasks}, {plan.same for plan in plans}
    found = Measurements()
    for entry in document["measured"]:
        attack = _key(entry)
        if attack is not None and attack not in keys:
            raise BadValue(
                f"{path} also holds {_named(entry)}, which is not asked for now; to resume, give the same --mode, -k "
                f"and rows, with --draws no fewer, or write elsewhere"
            )
        for one in map(_measured, entry["metrics"]):
            if one.task not in names:
                raise BadValue(f"{path} also holds {one.task}, which is not asked for now; add it, or write elsewhere")
            several = found.found.setdefault(attack, {})
            several[one.task] = (*several.get(one.task, ()), one)
    _refuse_other_text(path, found, tasks)
    found.part = _part(document["part"])
    return found


def _refuse_other_text(path: Path, found: Measurements, tasks: Iterable[Prepared]) -> None:
    for one in tasks:
        if isinstance(one, PerplexityTask):
            for earlier in found.of(None).get(str(one.task), ()):
                if earlier.digest != one.windows.digest:
                    raise BadValue(f"{path} was made with another text of {one.task}; write elsewhere")


def _attack(key: Key | None) -> dict[str, Any]:
    if key is None:
        return {"mode": "none", "k": 0, "places": []}
    attack, places = key
    order = sorted(places, key=lambda place: (place[0], -1 if place[1] is None else place[1]))
    return {
        "mode": attack.name,
        "k": attack.k,
        "places": [{"layer": layer, "expert": expert, "indices": sorted(rows)} for layer, expert, rows in order],
    }


def _key(entry: Keys) -> Key | None:
    if entry["mode"] == "none":
        return None
    places = [(one["layer"], one["expert"], frozenset(one["indices"])) for one in entry["places"]]
    return _parsed(entry).at(entry["k"]), frozenset(places)


def _parsed(entry: Keys) -> Attack:
    return parse_mode(entry["mode"])


def _named(entry: Keys) -> str:
    where = " and ".join(
        f"{', '.join(map(str, one['indices'][:5]))}{' ...' if len(one['indices']) > 5 else ''} of layer {one['layer']}"  # noqa: PLR2004 # enough for a line
        for one in entry["places"]
    )
    return f"{entry['mode']}:{entry['k']} on rows {where}"


def _metric(one: Measured) -> dict[str, Any]:
    """Without its time, in which a resumed sweep differs from one that ran through."""
    return {key: value for key, value in measured_document(one).items() if key != "seconds"}


def _measured(entry: Keys) -> Measured:
    return measured_of({**entry, "seconds": 0.0})


def _part(part: Keys | None) -> Part | None:
    if part is None:
        return None
    return Part(
        task=part["task"],
        under=tuple(map(_key, part["under"])),
        sums=tuple(tuple(math.nan if value is None else value for value in one["sums"]) for one in part["under"]),
    )
