"""What an ablation records of its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mwtool.evaluation.config import Options
from mwtool.evaluation.document import conditions_of, envelope_of
from mwtool.massive import ABLATION
from mwtool.models.load import Loaded


@dataclass(frozen=True, slots=True)
class Head:
    """The first keys of the document of an ablation, and the notes on the model for its last one."""

    keys: dict[str, Any]
    notes: tuple[str, ...] = ()


def head_of(loaded: Loaded, *, seed: int = 0, options: Options | None = None, command: str | None = None) -> Head:
    """The head of an ablation of this model. options: how it is measured."""
    keys = envelope_of(ABLATION, loaded, seed=seed, command=command)
    how = conditions_of(loaded, options or Options())
    return Head({**keys, "shape": loaded.identity.shape, **how}, loaded.notes)
