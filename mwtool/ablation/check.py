"""Which event a model leans on: measured by zeroing and by retaining the rows of each, on a short text.

What a scan finds at bos is a prediction. Here the top k rows of each event are zeroed, and apart from that retained;
those of all `up` events are zeroed together; and k random rows of the massive layer are zeroed as a control. Every
attack is paired with the unchanged model on the same windows, and runs only the layers it can change
(`evaluation.prefix_reuse`). The cost is kept within `PASSES` evaluations of the unchanged model: with many events
fewer tokens of each window are scored, or fewer windows are run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from mwtool.ablation.config import CheckConfig
from mwtool.ablation.controls import random_rows
from mwtool.errors import BadValue
from mwtool.evaluation.comparison import LEAST, Ratio, ratio_of
from mwtool.evaluation.config import Options
from mwtool.evaluation.corpora import text_for
from mwtool.evaluation.evaluate import PerplexityTask
from mwtool.evaluation.measurement import Measured, OnProgress
from mwtool.evaluation.numbers import figure
from mwtool.evaluation.prefix_reuse import Variant
from mwtool.evaluation.tasks import Task
from mwtool.evaluation.windows import Windows, windows
from mwtool.massive import MassiveWeights
from mwtool.models.context import positions
from mwtool.models.load import Loaded
from mwtool.scan.scanner import Scan
from mwtool.scan.targets import Target
from mwtool.surgery.attack import Attack, Edit, edited_together

DEFAULTS = CheckConfig()
PASSES = 16
"""Highest cost of a check, in evaluations of the unchanged model on the same windows."""
BREAKS = 1.5
"""A model leans on an event whose rows, when zeroed, multiply the perplexity by more than this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventCheck:
    """One event, by its number in the scan. zero, retain: perplexity ratios; None where one is not finite."""

    event: int
    layer: int
    rows: tuple[int, ...]
    zero: Ratio | None
    retain: Ratio | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """Random rows of one layer, zeroed."""

    layer: int
    rows: tuple[int, ...]
    zero: Ratio | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """The result of a check.

    text: what it was measured on; windows, tokens: how many, the latter scored in all. dtype: computed in.
    perplexity: of the unchanged model. together: the rows of all `up` events zeroed, None where there are fewer than
    two or it is not finite. random: the control; None where there is no massive layer or it has too few rows.
    predicted: number of the event the scan headlines. leans_on: number of the event the model leans on, None for none.
    conclusion: both in sentences.
    """

    text: str
    k: int
    windows: int
    tokens: int
    dtype: str
    perplexity: float
    events: tuple[EventCheck, ...]
    together: Ratio | None
    random: Control | None
    predicted: int | None
    leans_on: int | None
    conclusion: tuple[str, ...]
    seconds: float
    notes: tuple[str, ...] = ()

    def document(self) -> dict[str, Any]:
        """The `check` object of a scan document. A ratio is null where a perplexity is not finite."""
        return {
            "text": self.text,
            "k": self.k,
            "windows": self.windows,
            "tokens": self.tokens,
            "dtype": self.dtype,
            "perplexity": self.perplexity if math.isfinite(self.perplexity) else None,
            "events": [
                {
                    "event": one.event,
                    "layer": one.layer,
                    "indices": list(one.rows),
                    "zero": _ratio(one.zero),
                    "retain": _ratio(one.retain),
                }
                for one in self.events
            ],
            "zero_all_up": _ratio(self.together),
            "random": None
            if self.random is None
            else {"layer": self.random.layer, "indices": list(self.random.rows), "zero": _ratio(self.random.zero)},
            "predicted": self.predicted,
            "leans_on": self.leans_on,
            "conclusion": list(self.conclusion),
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


def check_scan(
    loaded: Loaded,
    scan: Scan,
    text: str = DEFAULTS.text,
    *,
    limit: int = DEFAULTS.limit,
    window: int = DEFAULTS.window,
    seed: int = DEFAULTS.seed,
    on_progress: OnProgress | None = None,
) -> Check:
    """Measure how much the model depends on the rows of each event of `scan`.

    loaded: the scanned model, without a PEFT adapter. text: as in ``ppl:TEXT``. limit, window: how much of it is read,
    in windows and tokens of a window. seed: of the random rows. on_progress: called with what is done and how much
    there is. Raises BadValue where the text is too short, or the scan has no event to check.
    """
    if not scan.events:
        raise BadValue(f"the scan of {scan.identity.model} found no event, so there is nothing to check")
    k = scan.settings.k
    attacks = _attacks(loaded, scan, k, seed)
    cut, notes = _fitted(_windows(loaded, scan, text, limit, window), attacks, len(loaded.layers))
    task = PerplexityTask(Task("ppl", text), cut, ())
    variants = [Variant(min(one.layers), partial(_applied, loaded, one)) for one in attacks]
    plain, *attacked = task.under(loaded, variants, Options(), on_progress)
    ratios = {one.key: ratio_of(measured, plain) for one, measured in zip(attacks, attacked, strict=True)}
    control = next((one for one in attacks if one.key == ("random", 0)), None)
    events = tuple(
        EventCheck(
            event=number,
            layer=event.layer,
            rows=event.rows.indices[:k],
            zero=ratios["zero", number],
            retain=ratios["retain", number],
        )
        for number, event in enumerate(scan.events)
    )
    random = None
    if control is not None:
        edit = control.edits[0]
        random = Control(layer=control.layers[0], rows=edit.rows, zero=ratios["random", 0])
    leans_on = leaning(events, random)
    check = Check(
        text=text,
        k=k,
        windows=len(cut.ids),
        tokens=sum(cut.scored),
        dtype=str(loaded.base.dtype).removeprefix("torch."),
        perplexity=plain.value,
        events=events,
        together=ratios.get(("together", 0)),
        random=random,
        predicted=_predicted(scan),
        leans_on=leans_on,
        conclusion=(),
        seconds=math.fsum(one.seconds for one in (plain, *attacked)),
        notes=tuple(dict.fromkeys((*notes, *cut.notes, *plain.setting["notes"]))),
    )
    return replace(check, conclusion=_conclusion(check, plain))


def leaning(events: Sequence[EventCheck], random: Control | None) -> int | None:
    """The event of the largest zeroing ratio whose lower bound exceeds `BREAKS` and the control's upper bound.

    Where there are too few windows for an interval, the ratio itself takes the place of both bounds.
    """
    above = BREAKS
    if random is not None and random.zero is not None:
        above = max(above, random.zero.value if random.zero.high is None else random.zero.high)
    found = [
        (one.zero.value, one.event)
        for one in events
        if one.zero is not None and (one.zero.value if one.zero.low is None else one.zero.low) > above
    ]
    return max(found)[1] if found else None


@dataclass(frozen=True, slots=True)
class _Attack:
    """key: what it is and which event it belongs to."""

    key: tuple[str, int]
    attack: Attack
    edits: tuple[Edit, ...]
    layers: tuple[int, ...]


def _attacks(loaded: Loaded, scan: Scan, k: int, seed: int) -> list[_Attack]:
    rows = [event.rows for event in scan.events]
    zero, retain = Attack("zero", k), Attack("retain", k)
    found = [
        _Attack((attack.mode, number), attack, (_edit(loaded, one, k),), (one.layer,))
        for number, one in enumerate(rows)
        for attack in (zero, retain)
    ]
    up = [event.rows for event in scan.events if event.kind == "up"]
    if len(up) > 1:
        edits = tuple(_edit(loaded, one, k) for one in up)
        found.append(_Attack(("together", 0), zero, edits, tuple(one.layer for one in up)))
    if scan.predicted is not None:
        massive = scan.predicted.rows
        target = Target(layer=massive.layer, ffn=loaded.ffn(massive), indices=massive.indices, count=massive.count)
        drawn = random_rows(target, target.ffn.width(loaded.base), k, seed)
        if drawn is not None:
            found.append(_Attack(("random", 0), zero, (Edit(target.ffn, drawn),), (massive.layer,)))
    return found


def _edit(loaded: Loaded, rows: MassiveWeights, k: int) -> Edit:
    return Edit(loaded.ffn(rows), rows.indices[:k])


def _applied(loaded: Loaded, one: _Attack) -> Any:
    return edited_together(loaded.base, one.edits, one.attack)


def _windows(loaded: Loaded, scan: Scan, text: str, limit: int, window: int) -> Windows:
    """The first windows of the text, or shorter windows if it has too few tokens."""
    if loaded.tokenizer is None:
        raise BadValue(f"{loaded.source.name} has no tokenizer; --check needs one to read text")
    bos = None if scan.bos.how == "none" else scan.bos.id
    most = positions(loaded.base.config)
    length = window if most is None else min(window, most)
    protocol: Any = "sun-4096" if bos is None else "bos"
    whole = windows(loaded.tokenizer, text_for(text), protocol, length, bos).first(limit)
    tokens = sum(len(ids) for ids in whole.ids)
    if tokens >= limit * length:
        return whole
    shorter = tokens // limit
    if shorter < DEFAULTS.shortest:
        raise BadValue(
            f"{text} has {tokens} tokens; --check needs at least {limit * DEFAULTS.shortest}, {limit} windows of "
            f"{DEFAULTS.shortest}: give a longer text"
        )
    return windows(loaded.tokenizer, text_for(text), protocol, shorter, bos).first(limit)


def _fitted(cut: Windows, attacks: Sequence[_Attack], total: int) -> tuple[Windows, tuple[str, ...]]:
    """The part of the windows that keeps the check within `PASSES`, and what is left out.

    A forward costs the head, for the tokens that are scored, and the layers that run. Scoring a part of each window
    bounds the former, running a part of the windows the latter.
    """
    heads, notes = 1 + len(attacks), []
    layers = 1 + sum((total - min(one.layers)) / total for one in attacks)
    if layers > PASSES:
        kept = max(LEAST, int(len(cut.ids) * PASSES / layers))
        if kept < len(cut.ids):
            notes.append(f"{len(attacks)} attacks: {kept} of {len(cut.ids)} windows are run")
            cut = cut.first(kept)
    if heads > PASSES:
        scored = tuple(max(1, one * PASSES // heads) for one in cut.scored)
        notes.append(f"{len(attacks)} attacks: the last {max(scored)} tokens of each window are scored")
        cut = replace(cut, scored=scored, units=scored)
    return cut, tuple(notes)


def _predicted(scan: Scan) -> int | None:
    if scan.predicted is None:
        return None
    return next(number for number, event in enumerate(scan.events) if event.layer == scan.predicted.layer)


def _conclusion(check: Check, plain: Measured) -> tuple[str, ...]:
    """Which event the model leans on, compared with the prediction of the scan."""
    if plain.nonfinite:
        return (f"The check says nothing: the unchanged model's perplexity is not finite ({plain.nonfinite}).",)
    measured = [one for one in check.events if one.zero is not None]
    if not measured:
        return ("The check says nothing: no perplexity under an attack is finite.",)
    worst = max(measured, key=lambda one: one.zero.value if one.zero is not None else 0.0)
    rows = f"its {check.k} rows" if check.k > 1 else "its row"
    said = []
    if check.leans_on is None:
        of_one = f"the {check.k} rows" if check.k > 1 else "the row"
        said.append(
            f"Checked: this model does not break. Zeroing {of_one} of one event costs at most x{worst.zero}, for event "
            f"{worst.event} (layer {worst.layer})."
        )
    else:
        one = next(one for one in measured if one.event == check.leans_on)
        said.append(
            f"Checked: this model leans on event {one.event} (layer {one.layer}). Zeroing {rows} costs x{one.zero}"
            + (f", keeping only them x{one.retain}." if one.retain is not None else ".")
        )
    said += _beside(check)
    if check.predicted is not None and check.predicted != check.leans_on:
        layer = next(one.layer for one in check.events if one.event == check.predicted)
        found = "on none" if check.leans_on is None else f"on event {check.leans_on}"
        said.append(f"The scan predicts event {check.predicted} (layer {layer}); by the check the model leans {found}.")
    return tuple(said)


def _beside(check: Check) -> list[str]:
    parts = []
    if check.random is not None and check.random.zero is not None:
        parts.append(f"{check.k} random rows of layer {check.random.layer} cost x{check.random.zero}.")
    if check.together is not None:
        parts.append(f"The rows of all events that write up, zeroed together, cost x{check.together}.")
    return parts


def cells_of(check: Check) -> dict[int, tuple[str, str]]:
    """Event -> its ratios under zeroing and retaining, formatted for a table."""
    return {one.event: (_cell(one.zero), _cell(one.retain)) for one in check.events}


def lines_of(check: Check) -> tuple[str, ...]:
    """The lines of a report below its table: the conclusion and how it was measured."""
    how = (
        f"Perplexity {figure(check.perplexity)} over {check.windows} windows of {check.text}, {check.tokens:,} tokens "
        f"scored, in {check.dtype}; brackets are paired 95 % intervals."
    )
    return ("", *check.conclusion, how)


def _cell(ratio: Ratio | None) -> str:
    return "not finite" if ratio is None else f"x{figure(ratio.value)}"


def _ratio(ratio: Ratio | None) -> dict[str, float | None] | None:
    if ratio is None or not math.isfinite(ratio.value):
        return None
    bounds = [None if one is None or not math.isfinite(one) else one for one in (ratio.low, ratio.high)]
    return {"ratio": ratio.value, "low": bounds[0], "high": bounds[1]}
