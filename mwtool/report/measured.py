"""Sections on what was measured: evaluations, comparisons, and quantization checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from mwtool.evaluation.comparison import Entry, Paired, is_number, paired
from mwtool.evaluation.document import entries_of
from mwtool.evaluation.numbers import fine, short
from mwtool.evaluation.plot import UNATTACKED, evaluations_of, named_models, plot_evaluation, reference_of
from mwtool.quantization.plot import label_of, plot_quantization
from mwtool.quantization.rounding import LEVELS
from mwtool.report.section import Document, Section, Table

SAID = 8
"""Comparisons that are put in words; the table has them all."""
PROMPTS = 5
"""Prompts whose answers are shown; the document has them all."""


def evaluation_section(document: Document) -> Section:
    """One evaluation, or several that are compared."""
    several = len(evaluations_of(document)) > 1
    entries = entries_of(evaluations_of(document), named_models(document))
    numbers = [one for one in entries if is_number(one.measured)]
    compared = [(one, reference) for one in numbers if (reference := reference_of(one, numbers)) is not None]
    changes = [(one, reference, paired(one.measured, reference.measured)) for one, reference in compared]
    said = [_sentence(*one) for one in changes if one[2] is not None]
    if len(said) > SAID:
        clear = sum(_clear(found) for _, _, found in changes if found is not None)
        said = [f"{clear} of {len(said)} changes are larger than chance explains; the table has them all."]
    return Section(
        heading="Comparison" if several else "Evaluation",
        said=(*(() if document["complete"] else ("This evaluation is not complete.",)), *said),
        figures=(
            (
                "Each result as a bar with its 95 % interval, and how it changes; the tables have the numbers.",
                plot_evaluation(document),
            ),
        )
        if numbers
        else (),
        tables=(
            ("Results", [_result(one, several=several) for one in numbers]),
            ("Changes, paired on the same examples", [_change(*one, several=several) for one in changes]),
            *_answers(entries),
        ),
        facts=_facts(document),
    )


def _result(entry: Entry, *, several: bool) -> dict[str, Any]:
    one = entry.measured
    return {
        **({"model": entry.model} if several else {}),
        "attack": entry.attack,
        "task": short(one.task),
        "part": one.part,
        "metric": one.metric,
        "value": one.nonfinite or one.value,
        "standard error": one.stderr,
        "examples": one.n,
    }


def _change(entry: Entry, reference: Entry, found: Paired | None, *, several: bool) -> dict[str, Any]:
    one = entry.measured
    return {
        **({"model": entry.model} if several else {}),
        "attack": entry.attack,
        "beside": _named(reference, entry),
        "task": " ".join(filter(None, (short(one.task), one.part))),
        "metric": one.metric,
        "change": "different examples" if found is None else _amount(found, found.value),
        "95 % interval": None if found is None else _interval(found),
    }


def _named(reference: Entry, entry: Entry) -> str:
    """The reference, by what distinguishes it from what is compared with it."""
    attack = "no attack" if reference.attack == UNATTACKED else reference.attack
    if reference.model == entry.model:
        return attack
    return reference.model if reference.attack == entry.attack else f"{reference.model}, {attack}"


def _amount(found: Paired, value: float, *, unit: bool = True) -> str:
    if found.kind == "ratio":
        return f"x{fine(value)}" if unit else fine(value)
    text = f"{value:+.1f}" if found.kind == "points" else f"{value:+.3g}"
    text = text if float(text) else text[1:]  # no sign before zero
    return f"{text} points" if unit and found.kind == "points" else text


def _interval(found: Paired) -> str | None:
    if found.low is None or found.high is None:
        return None
    return f"{_amount(found, found.low, unit=False)} to {_amount(found, found.high, unit=False)}"


def _clear(found: Paired) -> bool:
    """Whether the interval leaves out no change at all."""
    none = 1 if found.kind == "ratio" else 0
    return found.low is not None and found.high is not None and not found.low <= none <= found.high


def _sentence(entry: Entry, reference: Entry, found: Paired | None) -> str:
    assert found is not None, "left out by the caller"
    one = entry.measured
    what = " ".join(filter(None, (short(one.task), one.part, None if one.metric == "perplexity" else one.metric)))
    who = f"under {entry.attack}" if entry.model == reference.model else f"of {entry.model}"
    if entry.model != reference.model and entry.attack != UNATTACKED:
        who += f" under {entry.attack}"
    interval = _interval(found)
    said = f"{what} {who}, beside {_named(reference, entry)}: {_amount(found, found.value)}"
    if interval is None:
        return f"{said}; there are too few examples for an interval."
    return f"{said} [{interval}]{'.' if _clear(found) else ', which cannot be told from no change.'}"


def _answers(entries: Sequence[Entry]) -> Iterator[Table]:
    """The answers to the first prompts of each task, a line a prompt and variant."""
    answered = [one for one in entries if one.measured.answers]
    for key in dict.fromkeys(one.key for one in answered):
        same = [one for one in answered if one.key == key]
        task = " ".join(filter(None, (short(key[0]), key[1])))
        prompts = same[0].measured.setting.get("prompts", ())
        lines = [
            {"prompt": prompt, "model": one.model, "attack": one.attack, "answer": one.measured.answers[at]}
            for at, prompt in enumerate(prompts[:PROMPTS])
            for one in same
            if at < len(one.measured.answers)
        ]
        more = f", the first {PROMPTS} of {len(prompts)}" if len(prompts) > PROMPTS else ""
        yield f"Answers to {task}{more}", lines


def _facts(document: Document) -> dict[str, Any]:
    if len(evaluations_of(document)) == 1:
        one = evaluations_of(document)[0]
        rows = one["massive"]
        attacked = None if rows is None else f"layer {rows['layer']}, rows {', '.join(map(str, rows['indices']))}"
        return {**_options(one), "adapter": one["adapter"], "rows attacked": attacked}
    found: dict[str, Any] = {}
    for name, one in zip(named_models(document), evaluations_of(document), strict=True):
        revision = f" at {one['revision']}" if one["revision"] else ""
        adapter = f", adapter {one['adapter']}" if one["adapter"] else ""
        found[name] = f"{one['model']}{revision}{adapter}, {one['dtype']}"
    return {**found, **_options(evaluations_of(document)[0])}


def _options(document: Document) -> dict[str, Any]:
    return {**document["options"], "delimiter": repr(document["options"]["delimiter"])}


def quantization_section(document: Document) -> Section:
    """A quantization check."""
    return Section(
        heading="Quantization",
        said=tuple(f"{one}." if one[-1:] != "." else one for one in document["verdicts"]) or ("There is no verdict.",),
        figures=(
            (
                "The share of the loss that each set of protected weights gives back; the table has the numbers.",
                plot_quantization(document),
            ),
        ),
        tables=tuple(
            (f"{short(one['task'])}: what is kept in full precision, and what it gives back", list(_kept(document, at)))
            for at, one in enumerate(document["baseline"])
        ),
        facts={
            "method": document["method"],
            "group": "a row" if document["group"] is None else document["group"],
            "levels": LEVELS.get(document["levels"], document["levels"]),
            "quantized weights": f"{document['quantized_weights']:,}",
            **{
                f"{short(one['task'])} {one['metric']}, full precision": one["nonfinite"] or one["value"]
                for one in document["baseline"]
            },
        },
    )


def _kept(document: Document, at: int) -> Iterator[dict[str, Any]]:
    for variant in document["variants"]:
        result, share = variant["results"][at], variant["shares_given_back"][at]
        interval = None if share is None or share["low"] is None else f"{share['low']:.0%} to {share['high']:.0%}"
        yield {
            "bits": variant["bits"],
            "kept": label_of(variant),
            "bytes": f"{variant['kept_bytes']:,}",
            result["metric"]: result["nonfinite"] or result["value"],
            "given back": None if share is None else f"{share['value']:.0%}".replace("-0%", "0%"),
            "95 % interval": interval,
        }
