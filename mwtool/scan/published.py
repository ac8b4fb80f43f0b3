"""Massive rows and super weights as published, to compare a scan with.

Rows: Oh, Shin, Oh, "House of Cards: Massive Weights in LLMs", arXiv 2410.01866v2, the table of top-5 indices, and those
of two small models that mwtool's own tests of real models use. The paper counts layers from 1; here they count from 0,
as everywhere. Whether its "expert 4" counts from 0 or 1 is not said.

Super weights: Yu et al., "The Super Weight in Large Language Models", arXiv 2411.07191.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Source = Literal["paper", "mwtool"]


@dataclass(frozen=True, slots=True)
class Rows:
    """Ranked rows of a massive layer.

    layer from 0; indices by falling magnitude; expert as printed in the paper.
    source: the paper, or a measurement of this project.
    """

    layer: int
    indices: tuple[int, ...]
    expert: int | None = None
    source: Source = "paper"

    def agreement(self, layer: int, indices: tuple[int, ...]) -> str:
        """How a scan compares: `match` (same layer, order and rows), `same rows`, or what differs."""
        if layer != self.layer:
            return f"another layer: {layer}, published {self.layer}"
        n = min(len(indices), len(self.indices))
        if indices[:n] == self.indices[:n]:
            return "match"
        shared = len(set(indices[:n]) & set(self.indices[:n]))
        return "same rows in another order" if shared == n else f"{shared} of {n} rows shared"


@dataclass(frozen=True, slots=True)
class Published:
    """What is published of one model. super_weights: (layer, hidden dimension, FFN index), all from 0."""

    rows: Rows | None
    super_weights: tuple[tuple[int, int, int], ...] = ()


_LLAMA_2_7B = Rows(1, (7890, 10411, 1192, 8731, 5843))
_LLAMA_2_13B = Rows(3, (7678, 8811, 11371, 6619, 12281))
_LLAMA_3_70B = Rows(3, (16581, 3590, 16039, 19670, 13266))

ROWS = {
    "llama-2-7b-hf": _LLAMA_2_7B,
    "llama-2-7b-chat-hf": _LLAMA_2_7B,
    "llama-2-13b-hf": _LLAMA_2_13B,
    "llama-2-13b-chat-hf": _LLAMA_2_13B,
    "llama-3-8b": Rows(1, (2427, 198, 6412, 12657, 591)),
    "llama-3-8b-instruct": Rows(1, (2427, 198, 6412, 591, 12657)),
    "llama-3-70b": _LLAMA_3_70B,
    "llama-3-70b-instruct": _LLAMA_3_70B,
    "llama-3.1-405b": Rows(5, (11891, 30740, 2392, 36238, 12328)),
    "llama-3.1-405b-instruct": Rows(5, (11891, 30740, 36238, 2392, 1073)),
    "mistral-7b-v0.1": Rows(1, (7310, 8572, 2514, 1878, 8693)),
    "mistral-7b-instruct-v0.1": Rows(1, (7310, 8572, 2514, 2484, 1878)),
    "mixtral-8x7b-v0.1": Rows(1, (7310, 7530, 11981, 7492, 3178), expert=4),
    "mixtral-8x7b-instruct-v0.1": Rows(1, (7310, 11981, 2514, 7530, 3178), expert=4),
    "phi-3-mini-4k-instruct": Rows(2, (808, 340, 3644, 2473, 2987)),
    "phi-3-medium-4k-instruct": Rows(5, (181, 7540, 19, 15874, 5137)),
    "gemma-2-2b": Rows(1, (1257, 2896, 6954, 8624, 7118)),
    "gemma-2-2b-it": Rows(1, (1257, 2896, 6954, 8624, 9140)),
    "gemma-2-9b": Rows(0, (2769, 6656, 4889, 14293, 11065)),
    "gemma-2-9b-it": Rows(0, (2769, 6656, 4889, 14293, 10429)),
    "gemma-2-27b": Rows(9, (34659, 32862, 9590, 8959, 32744)),
    "gemma-2-27b-it": Rows(9, (34659, 32862, 9590, 32744, 8959)),
    # The fourth to seventh are within 2 % of each other and change places with the precision.
    "smollm2-135m-instruct": Rows(11, (1229, 1487, 874), source="mwtool"),
    "gemma-3-270m": Rows(0, (1405, 1702, 1216, 670, 270), source="mwtool"),
}

SUPER_WEIGHTS = {
    "llama-7b": ((2, 3968, 7003),),
    "llama-13b": ((2, 2231, 2278), (2, 2231, 6939)),
    "llama-2-7b-hf": ((1, 2533, 7890),),
    "llama-3-8b": ((1, 788, 2427), (1, 1384, 2427), (1, 4062, 2427)),  # another source has row 12638 in place of 2427
    "mistral-7b-v0.1": ((1, 2070, 7310),),
    "olmo-1b-0724-hf": ((1, 1764, 1710),),
    "olmo-7b-0724-hf": ((1, 269, 7467),),
    "phi-3-mini-4k-instruct": ((2, 525, 808), (2, 1113, 808), (2, 1693, 808)),
    "gemma-7b": ((0, 1995, 21041),),
}


def published(model: str) -> Published | None:
    """What is published of a model, by the last part of its Hub id or folder; Meta's older prefix is optional."""
    name = model.rstrip("/").rpartition("/")[2].lower().removeprefix("meta-")
    if name not in ROWS and name not in SUPER_WEIGHTS:
        return None
    return Published(ROWS.get(name), SUPER_WEIGHTS.get(name, ()))
