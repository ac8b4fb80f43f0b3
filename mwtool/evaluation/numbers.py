"""How reports and plots print numbers and task names."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mwtool.evaluation.measurement import Measured


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


def shown(one: Measured) -> str:
    """The value of a metric in a table: a perplexity, or a mean in percent."""
    if one.nonfinite or not math.isfinite(one.value):
        return "not finite"
    return figure(one.value) if one.weights is not None else f"{100 * one.value:.1f}"
