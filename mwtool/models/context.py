"""How long a text a model can read at once. Imports no torch."""

from __future__ import annotations

from typing import Any


def positions(config: Any) -> int | None:
    """How many positions a model has according to its configuration; None if it sets no limit."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "max_seq_len", "n_positions"):
        if isinstance(value := getattr(text, name, None), int):
            return value
    return None
