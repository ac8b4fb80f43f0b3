"""What an ablation records of its model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mwtool.evaluation.document import envelope_of
from mwtool.massive import ABLATION
from mwtool.models.load import Loaded


@dataclass(frozen=True, slots=True)
class Head:
    """The first keys of the document of an ablation, and the notes on the model for its last one."""

    keys: dict[str, Any]
    notes: tuple[str, ...] = ()


def head_of(loaded: Loaded, *, seed: int = 0, command: str | None = None) -> Head:
    """The head of an ablation of this model."""
    keys = envelope_of(ABLATION, loaded, seed=seed, command=command)
    return Head({**keys, "shape": loaded.identity.shape}, loaded.notes)
