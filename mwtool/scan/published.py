"""Massive rows as published, to check a scan against.

Oh, Shin, Oh, "House of Cards: Massive Weights in LLMs", arXiv 2410.01866v2, the table of
top-5 indices. The paper counts layers from 1; here they count from 0, as everywhere.
Whether its "expert 4" counts from 0 or 1 is not said.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Published:
    """layer from 0; indices by falling magnitude; expert as printed in the paper."""

    layer: int
    indices: tuple[int, ...]
    expert: int | None = None

    def agreement(self, layer: int, indices: tuple[int, ...]) -> str:
        """How a scan compares: `match` (same layer, order and rows), `same rows`, or what differs."""
        if layer != self.layer:
            return f"another layer: {layer}, published {self.layer}"
        n = min(len(indices), len(self.indices))
        if indices[:n] == self.indices[:n]:
            return "match"
        shared = len(set(indices[:n]) & set(self.indices[:n]))
        return "same rows in another order" if shared == n else f"{shared} of {n} rows shared"


_LLAMA_2_7B = Published(1, (7890, 10411, 1192, 8731, 5843))
_LLAMA_2_13B = Published(3, (7678, 8811, 11371, 6619, 12281))
_LLAMA_3_70B = Published(3, (16581, 3590, 16039, 19670, 13266))

PUBLISHED = {
    "llama-2-7b-hf": _LLAMA_2_7B,
    "llama-2-7b-chat-hf": _LLAMA_2_7B,
    "llama-2-13b-hf": _LLAMA_2_13B,
    "llama-2-13b-chat-hf": _LLAMA_2_13B,
    "llama-3-8b": Published(1, (2427, 198, 6412, 12657, 591)),
    "llama-3-8b-instruct": Published(1, (2427, 198, 6412, 591, 12657)),
    "llama-3-70b": _LLAMA_3_70B,
    "llama-3-70b-instruct": _LLAMA_3_70B,
    "llama-3.1-405b": Published(5, (11891, 30740, 2392, 36238, 12328)),
    "llama-3.1-405b-instruct": Published(5, (11891, 30740, 36238, 2392, 1073)),
    "mistral-7b-v0.1": Published(1, (7310, 8572, 2514, 1878, 8693)),
    "mistral-7b-instruct-v0.1": Published(1, (7310, 8572, 2514, 2484, 1878)),
    "mixtral-8x7b-v0.1": Published(1, (7310, 7530, 11981, 7492, 3178), expert=4),
    "mixtral-8x7b-instruct-v0.1": Published(1, (7310, 11981, 2514, 7530, 3178), expert=4),
    "phi-3-mini-4k-instruct": Published(2, (808, 340, 3644, 2473, 2987)),
    "phi-3-medium-4k-instruct": Published(5, (181, 7540, 19, 15874, 5137)),
    "gemma-2-2b": Published(1, (1257, 2896, 6954, 8624, 7118)),
    "gemma-2-2b-it": Published(1, (1257, 2896, 6954, 8624, 9140)),
    "gemma-2-9b": Published(0, (2769, 6656, 4889, 14293, 11065)),
    "gemma-2-9b-it": Published(0, (2769, 6656, 4889, 14293, 10429)),
    "gemma-2-27b": Published(9, (34659, 32862, 9590, 8959, 32744)),
    "gemma-2-27b-it": Published(9, (34659, 32862, 9590, 32744, 8959)),
}


def published(model: str) -> Published | None:
    """The published rows of a model, by the last part of its Hub id or folder; Meta's older prefix is optional."""
    return PUBLISHED.get(model.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-"))
