"""What JSON documents must be like: the base of the models they are written and read with, and how they are read.

pydantic takes a tenth of a second to import. Whoever needs a model imports it where a document is read or written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mwtool.errors import BadValue
from mwtool.files.text import link_fault, shown

LARGEST = 2**53
"""Whole numbers above are not exact in every reader of JSON."""
Count = Annotated[int, Field(ge=0, le=LARGEST)]
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
Share = Annotated[float, Field(ge=0, le=1)]
Magnitude = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=-LARGEST, le=LARGEST)]


class Strict(BaseModel):
    """An object of a document: types as they are (`true` is no number), numbers finite, unknown keys passed over."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False, extra="ignore")


class Envelope(Strict):
    """The keys every document about a model begins with."""

    mwtool_version: str
    model: str
    revision: str | None
    model_type: str
    dtype: str
    device: str
    seed: Seed | None
    versions: dict[str, str]
    command: str | None


class Measured(Envelope):
    """The keys of documents about a loaded model, with the PEFT adapter on it and where rows were attacked."""

    adapter: str | None
    on: Literal["base", "merged"] | None


Model = TypeVar("Model", bound=Strict)


def checked(model: type[Strict], document: dict[str, Any]) -> dict[str, Any]:
    """A document that was just made, held against its model and returned.

    Names of files that are not UTF-8 are written with escapes. Raises ValueError where it does not fit, or has a key,
    at any depth, that its model does not know: a fault of this program.
    """
    document = encodable(document)
    known = model.model_validate(document).model_dump(by_alias=True)
    unknown = sorted(_unknown(document, known))
    if unknown:
        raise ValueError(f"{model.__name__} does not know {', '.join(unknown)}")
    return document


def encodable(document: dict[str, Any]) -> dict[str, Any]:
    """The document, with what is no Unicode text as escapes: Python reads such text from names in other encodings."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return dict(_encodable(document))
    return document


def _encodable(value: Any) -> Any:
    if isinstance(value, dict):
        return {_encodable(key): _encodable(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_encodable(one) for one in value]
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value


def _unknown(document: Any, known: Any) -> Iterator[str]:
    """Keys of a document that are not in what its model made of it."""
    if isinstance(document, dict):
        for key, value in document.items():
            if key not in known:
                yield key
            else:
                yield from (f"{key}.{name}" for name in _unknown(value, known[key]))
    elif isinstance(document, list) and document and isinstance(document[0], dict | list):  # and not 100,000 numbers
        for one, other in zip(document, known, strict=True):
            yield from _unknown(one, other)


def read_document(path: Path, models: Mapping[str, type[Model]], written_by: str) -> tuple[dict[str, Any], Model]:
    """A document from a file: as JSON, and as its model.

    models: by schema, the newest first. written_by: the command that writes such documents, for the message.
    Raises BadValue, on one line, for any other file: what was found, where, what was expected.
    """
    document = _parsed(path, written_by)
    schema = document.get("schema")
    if not isinstance(schema, str) or schema not in models:
        expected = " or ".join(map(repr, models))
        raise BadValue(f"{path} has schema {shown(schema)}; expected {expected}, as `{written_by}` writes")
    try:
        return document, models[schema].model_validate(document)
    except ValidationError as fault:
        raise BadValue(f"{path} is no {schema} document: {complaint(fault)}") from fault
    except RecursionError as fault:
        raise BadValue(f"{path} is nested too deeply; expected a {schema} document") from fault


def complaint(fault: ValidationError) -> str:
    """The first thing a document does not fulfil, on one line: where, what is expected, what was found."""
    first = fault.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    said = " ".join(first["msg"].split()).removeprefix("Value error, ")
    found = "" if first["type"] in ("missing", "value_error") else f", found {shown(first['input'])}"
    expected = f"{said[:1].lower()}{said[1:]}{found}"
    return " ".join(f"{where}: {expected}".split()) if where else expected


def _parsed(path: Path, written_by: str) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadValue(
            link_fault(path) or f"{path} does not exist; expected a document that `{written_by}` writes"
        ) from None
    except IsADirectoryError:
        raise BadValue(f"{path} is a folder; expected a document that `{written_by}` writes") from None
    except UnicodeDecodeError as fault:
        raise BadValue(f"{path} is not UTF-8 text: byte {fault.start} is {fault.object[fault.start]:#04x}") from fault
    except OSError as fault:
        raise BadValue(f"{path} cannot be read: {fault.strerror or fault}") from fault
    try:
        document = json.loads(text, parse_constant=_refused, parse_float=_finite)
    except RecursionError as fault:
        raise BadValue(f"{path} is nested too deeply; expected a document that `{written_by}` writes") from fault
    except ValueError as fault:
        raise BadValue(f"{path} is not JSON: {' '.join(str(fault).split())}") from fault
    if not isinstance(document, dict):
        raise BadValue(f"{path} holds a {type(document).__name__}; expected a JSON object, as `{written_by}` writes")
    return document


def _refused(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON; expected finite numbers, or null")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{shown(digits)} is too large for a number; expected finite ones")
    return value
