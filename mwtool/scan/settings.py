"""Every setting of a scan, with its default. Imports no torch, so that the command line can read it."""

from __future__ import annotations

from dataclasses import dataclass

from mwtool.models.bos import PROMPT


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What counts as massive.

    magnitude, ratio: an entry of h is massive above `magnitude` and above `ratio` times the median of |h|.
    sun_ratio: the ratio of the strict published test (Sun et al. 2024), evaluated beside it.
    spike: what input and output of ``down_proj`` must exceed at a super weight (Yu et al. 2024).
    """

    magnitude: float = 100.0
    ratio: float = 50.0
    sun_ratio: float = 1000.0
    spike: float = 50.0


@dataclass(frozen=True, slots=True)
class Settings:
    """How to scan.

    k: rows to rank, 1 to I. bos: as `--bos`; prompt: whose first token stands in for bos under `never`.
    all_layers: walk on to the end after the answer has settled; adds later growth, changes nothing else.
    """

    k: int = 5
    bos: str = "auto"
    prompt: str = PROMPT
    thresholds: Thresholds = Thresholds()
    all_layers: bool = False
