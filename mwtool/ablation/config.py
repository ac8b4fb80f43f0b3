"""Every setting of an ablation and of a check, with its default.

Imports no torch, so that the command line can read it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class AblateConfig:
    """What to ablate, as the command line spells it.

    modes: `zero`, `retain`, `scale:X` or `mean`. ks: how many of the ranked rows. draws: random controls for each
    attack, seeded from `seed` on.
    """

    modes: tuple[str, ...] = ("zero", "retain")
    ks: tuple[int, ...] = (0, 1, 3, 5)
    tasks: tuple[str, ...] = ("ppl:demo",)
    draws: int = 3
    seed: int = 0
    bos: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckConfig:
    """How `mwtool scan --check` measures.

    text: as in `ppl:TEXT`. limit, window: how much of it is read, in windows and tokens of a window, bos included.
    shortest: fewest tokens of a window; a text too short for full windows is cut into shorter ones. seed: of the
    random rows.
    """

    text: str = "demo"
    limit: int = 8
    window: int = 512
    shortest: int = 32
    seed: int = 0
