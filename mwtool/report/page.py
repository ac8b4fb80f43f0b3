"""Write documents of one model as a self-contained HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from mwtool._version import __version__
from mwtool.errors import BadCheckpoint, BadValue
from mwtool.files.figure import model_name
from mwtool.files.tabular import shown
from mwtool.files.text import read_json
from mwtool.report.sections import SECTIONS, Document, Section, section_of
from mwtool.report.svg import inline_svg


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A section as the template shows it; `anchor` is its id."""

    anchor: str
    section: Section
    svg: Markup | None
    document: Document


def page_of(documents: Sequence[Document]) -> str:
    """The page of these documents, which are of one model: scans first, then ablations, fine-tuning, evaluations.

    It loads nothing, runs no script, and escapes every text of a document. Raises BadValue where the models differ, or
    a schema is unknown.
    """
    known = list(SECTIONS)
    unknown = next((one for one in documents if one.get("schema") not in known), None)
    if unknown is not None:
        raise BadValue(f"a document has schema {unknown.get('schema')!r}; expected one of {', '.join(known)}")
    models = list(dict.fromkeys(one["model"] for one in documents))
    if len(models) != 1:
        raise BadValue(f"documents of {len(models)} models were given ({', '.join(models)}); expected those of one")
    ordered = sorted(documents, key=lambda one: known.index(one["schema"]))
    environment = Environment(
        loader=PackageLoader("mwtool.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["shown"] = shown
    parts = [_part(at, one) for at, one in enumerate(ordered, 1)]
    return environment.get_template("page.html").render(
        model=model_name(ordered[0]), first=ordered[0], parts=parts, version=__version__
    )


def _part(number: int, document: Document) -> _Part:
    section = section_of(document)
    anchor = f"part-{number}"
    # matplotlib escapes the text in a figure
    svg = None if section.figure is None else Markup(inline_svg(section.figure, anchor))  # noqa: S704 # see above
    return _Part(anchor=anchor, section=section, svg=svg, document=document)


def read_for_page(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The documents in these files, and in the folders among them, two levels deep.

    Raises BadValue for a file that is not such a document, and where there is none at all.
    """
    found: list[dict[str, Any]] = []
    for path in paths:
        if path.is_dir():
            found += _inside(path)
        else:
            document = _read(path)
            if document.get("schema") not in SECTIONS:
                raise BadValue(f"{path} has schema {document.get('schema')!r}; expected one of {', '.join(SECTIONS)}")
            found.append(document)
    if not found:
        names = ", ".join(map(str, paths))
        raise BadValue(f"there is no document in {names}; expected files that mwtool wrote with -o")
    return found


def _inside(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted((*folder.glob("*.json"), *folder.glob("*/*.json"))):
        document = _read(path)
        if document.get("schema") in SECTIONS:
            yield document


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(read_json(path))
    except (BadCheckpoint, OSError) as fault:
        raise BadValue(f"{path} cannot be read as a document: {fault}") from fault
