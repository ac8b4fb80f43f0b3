"""`mwtool finetune --macdrop`: the curricula that are named, and how they are shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mwtool.cli.options import WrongUsage
from mwtool.finetune.config import PAPER_STEPS
from mwtool.macdrop.curriculum import Curriculum, Resample, Scope


def curricula_of(
    texts: Sequence[str], *, k: int | None, scope: Scope | None, resample: Resample | None, seed: int
) -> list[Curriculum]:
    """The curriculum of each `--macdrop`, with what other flags say about it."""
    from mwtool.macdrop.curriculum_yaml import read_curriculum

    found = []
    for text in texts:
        changes: dict[str, Any] = {"k": k, "scope": scope, "resample": resample}
        if not text.endswith((".yaml", ".yml")):
            changes["seed"] = seed
        changed = {name: value for name, value in changes.items() if value is not None}
        found.append(replace(read_curriculum(text), **changed))
    return found


def only(curricula: Sequence[Curriculum]) -> Curriculum:
    """The one to train with. Raises WrongUsage where there are several."""
    if len(curricula) > 1:
        raise WrongUsage(f"--macdrop is given {len(curricula)} times; a run takes one, --show-curriculum several")
    return curricula[0]


def show_curricula(curricula: Sequence[Curriculum], max_steps: int | None, epochs: float, plot: Path | None) -> None:
    """Without a model and without data: over --max-steps, else as many as the paper's runs had."""
    from mwtool.cli.terminal import note, report_console
    from mwtool.finetune.report import curriculum_chart

    steps = max_steps or PAPER_STEPS
    per_epoch = math.ceil(steps / max(epochs, 1))
    if max_steps is None:
        note(f"drawn over {PAPER_STEPS} steps, as in the paper; --max-steps N draws another number")
    console = report_console()
    for curriculum in curricula:
        console.print(curriculum_chart(curriculum, steps, per_epoch, console.width))
    if plot is not None:
        from mwtool.files.figure import save_figure
        from mwtool.macdrop.plot import plot_curriculum

        save_figure(plot_curriculum(*curricula, steps=steps, per_epoch=per_epoch), plot)
