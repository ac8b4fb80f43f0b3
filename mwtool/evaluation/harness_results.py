"""Turn results of lm-evaluation-harness into metrics with their samples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from mwtool.evaluation.measurement import Measured, digest_of, mean_of, perplexity_of
from mwtool.evaluation.perplexity import nonfinite, summarize


def harness_metrics(found: Any, task: str, seconds: float, setting: dict[str, Any]) -> Iterator[Measured]:
    """The metrics of each task and group, with standard errors from the harness's log of samples."""
    for name, results in {**found["results"], **found.get("groups", {})}.items():
        rows = found.get("samples", {}).get(name, [])
        better = found.get("higher_is_better", {}).get(name, {})
        more = {"version": found.get("versions", {}).get(name), "shots": found.get("n-shot", {}).get(name)}
        for key, value in results.items():
            metric, _, selected = key.partition(",")
            if not selected or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            chosen = [row for row in rows if row.get("filter", "none") == selected]
            figure = _figure(metric if selected == "none" else f"{metric}/{selected}", float(value), chosen, metric)
            figure |= {"higher_is_better": better.get(metric) is not False}  # as the task defines it
            yield Measured(
                task=task,
                part=None if name == setting["name"] else name,
                seconds=seconds,
                setting={**setting, **more},
                digest=_digest(chosen),
                **figure,
            )


def _digest(rows: Sequence[dict[str, Any]]) -> str | None:
    """Equal for the same questions with the same prompts."""
    return digest_of("".join(row["doc_hash"] + row["prompt_hash"] for row in rows)) if rows else None


def _figure(name: str, value: float, rows: Sequence[dict[str, Any]], metric: str) -> dict[str, Any]:
    """Fields of Measured; with samples if the value is their mean, or the perplexity of ln p or (ln p, count) pairs."""
    each = [row[metric] for row in rows if metric in row]
    broken = [at for at, row in enumerate(rows) if not _finite(row.get("filtered_resps"))]
    if broken:  # an argmax over NaN is still some choice, and its accuracy some number
        why = nonfinite(broken, len(rows))
        return {"metric": name, "value": math.nan, "stderr": None, "n": len(rows), "nonfinite": why}
    single = bool(each) and all(isinstance(one, (int, float)) for one in each)
    if single:
        figure = mean_of(name, list(map(float, each)))
        if math.isclose(figure["value"], value, rel_tol=1e-6, abs_tol=1e-9):
            return figure
    if each and metric.endswith("perplexity") and (single or all(isinstance(one, (tuple, list)) for one in each)):
        pairs = [(one, 1) if single else one for one in each]
        found = summarize([-float(one[0]) for one in pairs], [int(one[1]) for one in pairs], 0.0)
        if math.isclose(found.value, value, rel_tol=1e-6):
            return perplexity_of(name, found)
    bad = None if math.isfinite(value) else f"the harness returned {value}"
    return {"metric": name, "value": value, "stderr": None, "n": len(rows), "nonfinite": bad}


def _finite(answers: Any) -> bool:
    """Whether no number in these nested lists is NaN or infinite."""
    if isinstance(answers, float):
        return math.isfinite(answers)
    return not isinstance(answers, (list, tuple)) or all(map(_finite, answers))
