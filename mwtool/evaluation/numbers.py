"""How reports and plots print numbers and task names."""

from __future__ import annotations

from pathlib import Path


def figure(value: float) -> str:
    """A perplexity or ratio with two decimals, or none from 1,000 on."""
    return f"{value:,.2f}" if abs(value) < 1000 else f"{value:,.0f}"  # noqa: PLR2004 - decimals of large numbers tell nothing


def fine(value: float) -> str:
    """As `figure`, with four decimals near 1, where two would hide on which side of 1 a ratio is."""
    return f"{value:.4f}" if 0 < abs(value - 1) < 0.01 else figure(value)  # noqa: PLR2004 - as described


def short(task: str) -> str:
    """The name of a task without the folders of its file."""
    kind, colon, target = task.partition(":")
    return f"{kind}{colon}{Path(target).name}" if colon else task
