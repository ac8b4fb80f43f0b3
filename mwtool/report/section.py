"""What a page says of one document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Document = Mapping[str, Any]
Table = tuple[str, list[dict[str, Any]]]
"""A caption and the lines of a table, which have the same keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """What is shown of one document.

    said: sentences, the result first. figures: each with what it shows, in words. facts: settings, by name.
    """

    heading: str
    said: tuple[str, ...]
    figures: tuple[tuple[str, Figure], ...]
    tables: tuple[Table, ...]
    facts: Mapping[str, Any]
