"""The sections of a page by schema, and those of ablations and fine-tuning runs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mwtool.ablation.plot import plot_ablation
from mwtool.evaluation.document import COMPARISON
from mwtool.evaluation.document import SCHEMA as EVALUATION
from mwtool.evaluation.numbers import short
from mwtool.files.tabular import shown
from mwtool.finetune.config import SCHEMA as TRAINING
from mwtool.finetune.plot import plot_training
from mwtool.massive import ABLATION
from mwtool.massive import SCHEMA as SCAN
from mwtool.quantization.document import SCHEMA as QUANTIZATION
from mwtool.report.measured import evaluation_section, quantization_section
from mwtool.report.scans import comparison_section, scan_section, track_section
from mwtool.report.section import Document, Section
from mwtool.scan.comparison.document import SCHEMA as SCANS
from mwtool.scan.tracking.document import SCHEMA as TRACK


def section_of(document: Document) -> Section:
    """The section of a document whose schema is in `SECTIONS`."""
    return SECTIONS[document["schema"]](document)


def _ablation(document: Document) -> Section:
    said = [one["text"][:1].upper() + one["text"][1:] for one in document["verdicts"]] or ["No attack has a verdict."]
    if not document.get("complete", True):
        said.insert(0, "This ablation is not complete.")
    return Section(
        heading="Ablation",
        said=tuple(said),
        figures=(("The effect of each attack beside its controls; the tables have it.", plot_ablation(document)),)
        if document["tasks"]
        else (),
        tables=tuple(
            (
                f"{short(one['name'])}: each attack, beside random rows and the rows of largest norm",
                _runs(document, one),
            )
            for one in document["tasks"]
        ),
        facts={f"{short(name)}, unchanged model": value for name, value in document["baseline"].items()},
    )


def _runs(document: Document, task: Document) -> list[dict[str, Any]]:
    """A line for each attack, and one for all random draws beside it."""
    attacks: dict[tuple[str, str, str], list[Document]] = {}
    for run in document["runs"]:
        layers = "+".join(str(place["layer"]) for place in run["places"])
        rows = "random" if (run["control"] or "").startswith("random") else run["control"] or "ranked"
        attacks.setdefault((f"{run['mode']} {run['k']}", layers, rows), []).append(run)
    order = ("ranked", "norm", "random")
    chosen = sorted(attacks, key=lambda key: (list(attacks).index((*key[:2], "ranked")), order.index(key[2])))
    return [_run(key, attacks[key], task) for key in chosen]


def _run(key: tuple[str, str, str], runs: Sequence[Document], task: Document) -> dict[str, Any]:
    """The runs of one attack on rows of one kind: a measurement with its interval, or draws with their range."""
    attack, layers, rows = key
    name, accuracy = task["name"], task["metric"] != "perplexity"
    values = [run["delta" if accuracy else "ratio"][name] for run in runs]
    known = [value for value in values if value is not None]
    span = runs[0]["interval"][name] or runs[0].get("delta_interval", {}).get(name)
    spread = span if rows != "random" else [min(known), max(known)] if known else None
    kinds = {"ranked": "ranked", "norm": "largest norm", "random": f"random, {len(runs)} draw{'s' * (len(runs) > 1)}"}
    found = [run["results"][name] for run in runs if run["results"][name] is not None]
    return {
        "attack": attack,
        "layers": layers,
        "rows": kinds[rows],
        "value": statistics.fmean(found) if found else "not finite",
        "points" if accuracy else "ratio": statistics.fmean(known) if known else None,
        "95 % interval, or range of draws": None if spread is None else f"{shown(spread[0])} to {shown(spread[1])}",
    }


def _training(document: Document) -> Section:
    measured = document["measured"]
    losses = (("training", "first_loss", "last_loss"), ("held-out", "first_eval_loss", "last_eval_loss"))
    said = tuple(
        f"The {name} loss went from {measured[first]:.4f} to {measured[last]:.4f}."
        for name, first, last in losses
        if measured[first] is not None and measured[last] is not None
    )
    curriculum = document["settings"]["curriculum"]
    told = ("curriculum", "seed", "dtype")  # here, or at the head of the settings
    facts = {name: value for name, value in document["settings"].items() if name not in told}
    return Section(
        heading="Fine-tuning",
        said=said or ("No loss was logged.",),
        figures=(
            (
                "Loss over the optimizer steps, and p, with which MacDrop drops entries.",
                plot_training(document),
            ),
        ),
        tables=(),
        facts={
            **facts,
            "macdrop": curriculum["schedule"],
            "steps": document["steps"],
            "data": document["data"]["name"],
        },
    )


SECTIONS: Mapping[str, Callable[[Document], Section]] = {
    SCAN: scan_section,
    SCANS: comparison_section,
    TRACK: track_section,
    ABLATION: _ablation,
    QUANTIZATION: quantization_section,
    TRAINING: _training,
    EVALUATION: evaluation_section,
    COMPARISON: evaluation_section,
}
"""By schema, in the order of the page."""
