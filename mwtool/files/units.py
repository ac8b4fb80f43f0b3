"""Bytes and durations in words, the same wherever they are shown."""

from __future__ import annotations

UNITS = {"GB": 1e9, "MB": 1e6, "kB": 1e3}


def size(count: float) -> str:
    """Bytes in the largest of these units of which there is a tenth; GB with two decimals, others with one."""
    name, unit = next(((name, unit) for name, unit in UNITS.items() if count >= unit / 10), ("kB", UNITS["kB"]))
    return f"{count / unit:,.{2 if name == 'GB' else 1}f} {name}"


def duration(seconds: float) -> str:
    """Seconds, from two minutes on minutes, from two hours on hours."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.3g} {unit}"
    return f"{seconds:,.2g} s" if seconds < 1 else f"{seconds:,.3g} s"
