"""Every setting of a quantization check, with its default. Imports no torch, so that the command line can read it."""

from __future__ import annotations

from dataclasses import dataclass

from mwtool.quantization.rounding import Levels, Scheme


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeConfig:
    """What to try.

    bits, group, levels: see `Scheme`; each number of bits is a scheme of its own. ks: columns kept at each event.
    seed: of the random columns and of the layers that serve as controls. tasks: as the command line spells them.
    """

    bits: tuple[int, ...] = (8, 4, 3)
    group: int | None = 64
    levels: Levels = "symmetric"
    ks: tuple[int, ...] = (1, 2, 5, 10)
    seed: int = 0
    tasks: tuple[str, ...] = ("ppl:demo",)
    bos: str = "auto"

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """One for each number of bits."""
        return tuple(Scheme(bits, self.group, self.levels) for bits in self.bits)
