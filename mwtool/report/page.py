"""Write documents of one model as a self-contained HTML page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from posixpath import normpath
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic import ValidationError

from mwtool._version import __version__
from mwtool.errors import BadValue, line_of
from mwtool.evaluation.plot import named_models
from mwtool.files.figure import model_name, without_caption
from mwtool.files.schema import Envelope, complaint, encodable
from mwtool.files.tabular import shown
from mwtool.models.source import DEMO
from mwtool.report.section import Document, Section, Table
from mwtool.report.sections import SECTIONS, section_of
from mwtool.report.svg import inline_svg


@dataclass(frozen=True, slots=True, kw_only=True)
class _Drawn:
    """A figure, what it shows in words, and its caption."""

    described: str
    svg: Markup
    caption: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A section as the template shows it; `anchor` is its id. notes: of the document, or of all that it compares."""

    anchor: str
    section: Section
    heading: str
    figures: tuple[_Drawn, ...]
    tables: tuple[Table, ...]
    document: Document
    notes: tuple[str, ...]


def page_of(documents: Sequence[Document], names: Sequence[str] = ()) -> str:
    """The page of these documents, which are of one model: scans first, comparisons last.

    names: of the files they were read from, for messages. It loads nothing, runs no script, and escapes every text of a
    document. Raises BadValue where no model is in all documents, a schema is unknown, or a document is not complete.
    """
    known = list(SECTIONS)
    named = list(zip(documents, names or [f"document {at}" for at in range(1, len(documents) + 1)], strict=True))
    unknown = next((one for one, _ in named if one.get("schema") not in known), None)
    if unknown is not None:
        raise BadValue(f"a document has schema {unknown.get('schema')!r}; expected one of {', '.join(known)}")
    named.sort(key=lambda one: known.index(one[0]["schema"]))
    parts: list[_Part] = []
    for document, name in named:
        try:
            models()[document["schema"]].model_validate(document)
            parts.append(_part(len(parts) + 1, document, [part.section.heading for part in parts]))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as fault:
            said = complaint(fault) if isinstance(fault, ValidationError) else line_of(fault)
            raise BadValue(f"{name} is no complete {document['schema']} document ({said}); write it again") from fault
    environment = Environment(
        loader=PackageLoader("mwtool.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    return environment.get_template("page.html").render(
        title=_one_model([document for document, _ in named]), first=named[0][0], parts=parts, version=__version__
    )


def _place(model: str) -> str:
    """A model's name, the same for all names of one folder: a PEFT adapter's configuration has the absolute one."""
    folder = DEMO if model == "demo" else Path(model)
    try:
        return str(folder.resolve()) if folder.is_dir() else normpath(model)
    except (OSError, ValueError):  # too long, or with a character that no path has
        return normpath(model)


def _one_model(documents: Sequence[Document]) -> str:
    """What the page is headed: the model that all documents have, or the models of a comparison. Raises BadValue."""
    found = [{_place(one["model"]): one for one in document.get("models", [document])} for document in documents]
    shared = [model for model in found[0] if all(model in models for models in found)]
    if not shared:
        every = {place: one["model"] for models in reversed(found) for place, one in reversed(models.items())}
        names = list(reversed(every.values()))
        raise BadValue(f"documents of {len(names)} models were given ({', '.join(names)}); expected those of one")
    if len(documents) == 1 and len(found[0]) > 1:
        return " and ".join(named_models(documents[0]))
    return model_name(found[0][shared[0]])


def _part(number: int, document: Document, before: Sequence[str]) -> _Part:
    """The part of one document. before: the headings above it, so that two of one kind are told apart."""
    section = section_of(document)
    anchor = f"part-{number}"
    same = before.count(section.heading)
    figures = []
    for at, (described, figure) in enumerate(section.figures, 1):
        caption = without_caption(figure)
        # matplotlib escapes the text in a figure
        svg = Markup(inline_svg(figure, f"{anchor}-{at}"))  # noqa: S704 # see above
        figures.append(_Drawn(described=described, svg=svg, caption=caption))
    notes = dict.fromkeys(note for one in document.get("models", [document]) for note in one["notes"])
    return _Part(
        anchor=anchor,
        section=section,
        heading=f"{section.heading} ({same + 1})" if same else section.heading,
        figures=tuple(figures),
        tables=tuple((name, _filled(records)) for name, records in section.tables if records),
        document=document,
        notes=tuple(notes),
    )


def _filled(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of a table without the columns that are empty in all of them."""
    names = [name for name in records[0] if any(record[name] not in (None, []) for record in records)]
    return [{name: record[name] for name in names} for record in records]


def read_for_page(paths: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The documents in these files, by their names, and in the folders among them, two levels deep.

    Raises BadValue for a file that is not such a document, and where there is none at all.
    """
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        if path.is_dir():
            found |= _inside(path)
        else:
            document = _read(path)
            if not _is_document(document):
                found_schema = document.get("schema") if isinstance(document, dict) else None
                raise BadValue(f"{path} has schema {found_schema!r}; expected one of {', '.join(SECTIONS)}")
            found[str(path)] = encodable(document)
    if not found:
        names = ", ".join(map(str, paths))
        raise BadValue(f"there is no document in {names}; expected files that mwtool wrote with -o")
    return found


def models() -> dict[str, type[Envelope]]:
    """What documents are held against, by schema."""
    from mwtool.ablation.schema import AblateDocument
    from mwtool.evaluation.schema import ComparisonDocument, EvalDocument
    from mwtool.files.scan_schema import ScanDocument
    from mwtool.finetune.schema import FinetuneDocument
    from mwtool.quantization.schema import QuantizeDocument
    from mwtool.scan.comparison.schema import CompareDocument
    from mwtool.scan.tracking.schema import TrackDocument

    known = (
        ScanDocument,
        CompareDocument,
        TrackDocument,
        AblateDocument,
        QuantizeDocument,
        FinetuneDocument,
        EvalDocument,
        ComparisonDocument,
    )
    return dict(zip(SECTIONS, known, strict=True))


def _inside(folder: Path) -> dict[str, dict[str, Any]]:
    read = {str(path): _read(path) for path in sorted((*folder.glob("*.json"), *folder.glob("*/*.json")))}
    return {name: encodable(document) for name, document in read.items() if _is_document(document)}


def _is_document(read: Any) -> bool:
    return isinstance(read, dict) and isinstance(read.get("schema"), str) and read["schema"] in SECTIONS


def _read(path: Path) -> Any:
    """What a JSON file holds. Raises BadValue."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as fault:
        raise BadValue(f"{path} is nested too deeply; expected a document that mwtool wrote") from fault
    except (OSError, ValueError) as fault:
        raise BadValue(f"{path} cannot be read as a document: {line_of(fault)}") from fault
