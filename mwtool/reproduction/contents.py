"""The tables of a study: which model under which attack stands in each line, and which line it stands beside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mwtool.models.load_options import On
from mwtool.reproduction.commands import SWEEPS, all_of, evaluate_command, sweep_command, tasks_of
from mwtool.reproduction.config import ATTACKED, KS, MASSIVE, PLAIN, ZEROED, Part, StudyConfig
from mwtool.reproduction.measurements import Key, Measurements
from mwtool.reproduction.runs import Evaluation, Run, evaluations_of, possible, study_of, wanted, with_tasks
from mwtool.reproduction.statistics import cell_of
from mwtool.reproduction.steps import is_measured

TITLES: dict[Part, str] = {
    "table1": "Table 1: zeroing and retaining the massive rows",
    "figure4": "Figure 4: zeroing and retaining over k",
    "table3": "Table 3: fine-tuning with and without MacDrop",
    "table4": "Table 4: fine-tuned models with the top rows zeroed, on the base rows and on the merged ones",
    "table5": "Table 5 and Figure 7: curricula and p0",
    "figure6": "Figure 6: which rows are dropped from, p constant",
    "choices": "What the paper leaves open: k, masks, learning rate",
}
ORIGINAL = "original"


@dataclass(frozen=True, slots=True)
class Row:
    """A line before it is filled: what it shows, and the label of the line it stands beside.

    random: whether as many random rows are attacked.
    """

    label: str
    key: Key
    beside: str | None = None
    random: bool = False


def tables_of(
    config: StudyConfig, measured: Measurements, parts: Sequence[Part], *, massive: bool
) -> list[dict[str, Any]]:
    """The tables of these parts; Figure 7 is drawn from Table 5."""
    return [
        _table(config, measured, part, list(rows_of(part, config)), title, massive=massive)
        for part, title in TITLES.items()
        if part in parts or (part == "table5" and "figure7" in parts)
    ]


def model_evaluations(part: Part, config: StudyConfig) -> list[Evaluation]:
    """What a part measures of the model itself; Table 1 and Figure 4 share a document."""
    if part == "table1":
        attacks: tuple[str, ...] = ("none", f"zero:{MASSIVE}", f"retain:{MASSIVE}")
    elif part == "figure4":
        attacks = ("none", *(f"zero:{k}" for k in KS), *(f"retain:{k}" for k in (0, *KS)))
    elif part in ("table3", "table5", "figure7", "figure6", "choices"):
        attacks = ("none",)
    elif part == "table4":
        attacks = ("none", f"zero:{ZEROED}")
    else:
        attacks = ()
    kinds = [Evaluation("texts", attacks), Evaluation("tasks", attacks)] if attacks else []
    return with_tasks(kinds[:1] if part == "choices" else kinds, config)


def rows_of(part: Part, config: StudyConfig) -> Iterator[Row]:
    """The lines of a table."""
    original = Row(ORIGINAL, Key(None, "none"))
    yield original
    if part in ("table1", "figure4"):
        for attack in model_evaluations(part, config)[0].attacks[1:] if _has_any(config) else ():
            yield Row(_attack(attack), Key(None, attack), ORIGINAL)
            if part == "figure4" and not attack.endswith(":0"):
                yield Row(f"{attack}, random rows", Key(None, attack), ORIGINAL, random=True)
    elif part == "table3":
        for run in study_of(part, config):
            plain = _label(replace(run, schedule=PLAIN), config)
            yield Row(_label(run, config), Key(run, "none"), ORIGINAL if run.schedule == PLAIN else plain)
    elif part == "table4":
        yield Row(_attack(f"zero:{ZEROED}"), Key(None, f"zero:{ZEROED}"), ORIGINAL)
        yield from _robustness(part, config, [(k, on) for on in ("base", "merged") for k in ATTACKED])
        yield from _with_and_without(config)
    elif part == "choices":
        yield from _robustness(part, config, [(k, "base") for k in ATTACKED])
    else:
        yield from _robustness(part, replace(config, curricula=_all_curricula(config)), [(ZEROED, "base")])


def _all_curricula(config: StudyConfig) -> tuple[str, ...]:
    """All that there are: an earlier call may have done those that this one leaves out."""
    return type(config)(model=config.model, folder=config.folder).curricula


def _has_any(config: StudyConfig) -> bool:
    return bool(config.measuring.texts or config.measuring.tasks)


def _robustness(part: Part, config: StudyConfig, attacks: Sequence[tuple[int, On]]) -> Iterator[Row]:
    """Each run unattacked, beside the one without MacDrop, and attacked, beside itself unattacked."""
    runs = study_of(part, config)
    for run in runs:
        plain = replace(Run(lr=run.lr), peft=run.peft)
        yield Row(_label(run, config), Key(run, "none"), _label(plain, config) if run != plain else ORIGINAL)
        for k, on in attacks:
            yield Row(
                f"{_label(run, config)}, {_attack(f'zero:{k}', on)}", Key(run, f"zero:{k}", on), _label(run, config)
            )


def _with_and_without(config: StudyConfig) -> Iterator[Row]:
    """What MacDrop changes under the paper's attack: the lines with it again, beside those without it."""
    places: tuple[On, ...] = ("base", "merged")
    for run in study_of("table4", config):
        for on in places if run.schedule != PLAIN else ():
            attack = f"zero:{ZEROED}"
            said = _attack(attack, on)
            beside = f"{_label(replace(run, schedule=PLAIN), config)}, {said}"
            yield Row(f"{_label(run, config)}, {said}, beside none", Key(run, attack, on), beside)


def _label(run: Run, config: StudyConfig) -> str:
    parts = [{"lora": "LoRA", "dora": "DoRA"}[run.peft]]
    parts.append("without MacDrop" if run.schedule == PLAIN else run.schedule)
    parts += [run.scope] if run.scope != "massive" or run.schedule.startswith("constant") else []
    parts += ["a mask each micro-batch"] if run.resample != "step" else []
    parts += [f"micro-batches of {run.batch_size}"] if run.batch_size is not None else []
    parts += [f"k={run.k}"] if run.k != MASSIVE else []
    parts += [f"lr {run.lr:g}"] if run.lr != config.training.lr else []
    return ", ".join(parts)


def _attack(attack: str, on: On = "base") -> str:
    return attack if on == "base" else f"{attack} merged"


def _table(
    config: StudyConfig, measured: Measurements, part: Part, rows: Sequence[Row], title: str, *, massive: bool
) -> dict[str, Any]:
    keys = {row.label: row.key for row in rows}
    lines: list[dict[str, Any]] = [
        {
            "label": row.label,
            "run": None if row.key.run is None else _settings(row.key.run),
            "attack": row.key.attack,
            "on": row.key.on,
            "beside": row.beside,
            "cells": {
                column: measured.control(row.key.attack, column)
                if row.random
                else cell_of(
                    measured.by_seed(row.key, column),
                    measured.by_seed(keys[row.beside], column) if row.beside in keys else None,
                )
                for column in measured.columns
            },
            "commands": _controls(config) if row.random else _commands(config, part, row.key),
        }
        for row in rows
    ]
    notes = () if massive else ("the scan found no massive weights: what needs them is skipped",)
    return {
        "name": part,
        "title": title,
        "state": state_of(part, config, massive=massive),
        "columns": [measured.described(column) for column in measured.columns],
        "lines": [line for line in lines if any(line["cells"].values())],
        "notes": list(notes),
    }


def state_of(part: Part, config: StudyConfig, *, massive: bool) -> str:
    """Whether all that a part needs is measured, or some of it; skipped, too, where nothing can be."""
    done = _done(part, config, massive=massive)
    return "skipped" if not any(done) else "complete" if all(done) else "partial"


def is_whole(part: Part, config: StudyConfig, *, massive: bool) -> bool:
    """Whether all of a part is measured that can be. massive: whether there are massive rows to attack."""
    return all(_done(part, config, massive=massive))


def _done(part: Part, config: StudyConfig, *, massive: bool) -> list[bool]:
    """Of each evaluation that a part needs and that can be made, whether it has been."""
    asked = replace(config, only=(part,))
    needed: list[tuple[Run | None, Evaluation]] = [
        (None, one if massive else replace(one, attacks=("none",))) for one in model_evaluations(part, config)
    ]
    needed += [
        (run, one)
        for run, evaluations in possible(wanted(asked), massive=massive).items()
        for one in with_tasks(evaluations, config)
    ]
    return [is_measured(config, run, one) for run, one in needed]


def _settings(run: Run) -> dict[str, Any]:
    return {name: value for name, value in asdict(run).items() if name != "seed"}


def _controls(config: StudyConfig) -> list[str]:
    return [sweep_command(config, kind) for kind in SWEEPS if tasks_of(config, kind)]


def _commands(config: StudyConfig, part: Part, key: Key) -> list[str]:
    """Those that measure a line, with the first seed."""
    if key.run is None:
        return [
            evaluate_command(config, None, replace(one, attacks=_with(key.attack)))
            for one in model_evaluations(part, config)
        ]
    chosen = [one for one in with_tasks(evaluations_of(part), config) if key.attack in one.attacks and one.on == key.on]
    return all_of(config, key.run, [replace(one, attacks=_with(key.attack)) for one in chosen])


def _with(attack: str) -> tuple[str, ...]:
    return (attack,) if attack == "none" else ("none", attack)
