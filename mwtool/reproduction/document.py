"""A study as a document of schema mwtool.reproduction/1; docs/json.md describes every key."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mwtool.files.document import envelope
from mwtool.reproduction.config import SCHEMA, Part, StudyConfig
from mwtool.reproduction.contents import is_whole, tables_of
from mwtool.reproduction.measurements import Measurements

DOCUMENT, PAGE = "reproduction.json", "reproduction.md"
"""Names of the document and of the page in the folder of a study."""
SCANNED = ("massive", "absence", "check")
"""What is taken over from the scan."""


def document_of(
    config: StudyConfig,
    scan: dict[str, Any] | None,
    *,
    parts: Sequence[Part] = (),
    failures: Sequence[dict[str, Any]] = (),
    command: str | None = None,
) -> dict[str, Any]:
    """The document of what is measured so far.

    scan: the document of the scan, None before it is done. parts: those that were asked for, now or earlier.
    """
    from mwtool.files.schema import checked
    from mwtool.reproduction.schema import ReproductionDocument

    massive = scan is not None and scan["massive"] is not None
    measured = Measurements(config, seeds_in(config.folder))
    tables = tables_of(config, measured, parts, massive=massive)
    head = scan or {}
    document = {
        **envelope(
            SCHEMA,
            model=config.model,
            revision=head.get("revision", config.loading.revision),
            model_type=head.get("model_type", "unknown"),
            dtype=head.get("dtype", config.loading.dtype),
            device=head.get("device", config.loading.device),
            command=command,
        ),
        "settings": config.settings(),
        "parts": list(parts),
        "scan": None if scan is None else {name: scan[name] for name in SCANNED},
        "tables": tables,
        "failures": list(failures),
        "complete": scan is not None
        and not failures
        and all(is_whole(one["name"], config, massive=massive) for one in tables),
        "notes": [*_notes(config), *_environments(measured)],
    }
    return checked(ReproductionDocument, document)


def _notes(config: StudyConfig) -> list[str]:
    notes = [
        "intervals are of 95 %: over seeds (Student's t of values or paired differences), for one seed over examples",
        "a perplexity is the geometric mean over seeds, an accuracy the mean, in percent",
        "accuracy is by characters (acc_norm), but for boolq and winogrande (acc)",
    ]
    if config.measuring.limit is not None:
        notes.append(f"the first {config.measuring.limit} questions of each task")
    if config.measuring.windows is not None:
        notes.append(f"the first {config.measuring.windows} windows of each text")
    return notes


def _environments(measured: Measurements) -> list[str]:
    """A study that was continued elsewhere: how much of it was measured with what."""
    found = measured.measured_with
    if len(found) == 1:
        return []
    return [f"{count} of {found.total()} evaluations were made with {what}" for what, count in found.most_common()]


def earlier(folder: Path) -> dict[str, Any] | None:
    """The document of the study in a folder; None where there is none. Raises BadValue for another file."""
    from mwtool.files.schema import read_document
    from mwtool.reproduction.schema import ReproductionDocument

    path = folder / DOCUMENT
    if not path.exists():
        return None
    document, _ = read_document(path, {SCHEMA: ReproductionDocument}, "mwtool reproduce -o")
    return document


def seeds_in(folder: Path) -> int:
    """How many seeds the runs in a folder have, at most."""
    found = [int(match[1]) for path in folder.glob("*") if (match := re.search(r"-seed(\d+)$", path.name))]
    return max(found, default=-1) + 1
