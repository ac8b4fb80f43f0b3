"""What tests of ablation share: a quick sweep, and figures made up."""

from __future__ import annotations

import math

from words import text_of

from mwtool.ablation.sweep import Ablation, Sweep, ablate
from mwtool.evaluation.measurement import Measured, Options
from mwtool.evaluation.tasks import parse_tasks
from mwtool.models.load import Loaded
from mwtool.scan.targets import Choice, find_targets

QUICK = Options(window=16)


def swept(loaded: Loaded, sweep: Sweep, choice: Choice | None = None) -> Ablation:
    targets, _ = find_targets(loaded, choice or Choice(), max(sweep.ks))
    return ablate(loaded, targets, parse_tasks([text_of(loaded)]), sweep, QUICK)


def measured(nll: list[float], counts: list[float]) -> Measured:
    value = math.exp(math.fsum(nll) / sum(counts))
    return Measured("ppl:x", "perplexity", value, None, len(nll), 0.0, tuple(nll), tuple(counts), digest="d")
