"""Bytes and durations in words, the same wherever they are shown."""

from __future__ import annotations

GIGA, MEGA = 1e9, 1e6


def size(count: float) -> str:
    """Bytes in GB from a tenth of one on, else in MB."""
    return f"{count / GIGA:,.2f} GB" if count >= GIGA / 10 else f"{count / MEGA:,.1f} MB"


def duration(seconds: float) -> str:
    """Seconds, from two minutes on minutes, from two hours on hours."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.3g} {unit}"
    return f"{seconds:,.2g} s" if seconds < 1 else f"{seconds:,.3g} s"
