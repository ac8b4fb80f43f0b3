"""What an evaluation of models will run, before it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from mwtool.errors import BadValue
from mwtool.evaluation.config import EvalConfig
from mwtool.evaluation.evaluate import attacking, check, prepare
from mwtool.evaluation.forecast import Forecast, forecast
from mwtool.evaluation.prefix_reuse import Variant
from mwtool.evaluation.run import check_models, rows_for
from mwtool.evaluation.tasks import Task, parse_tasks
from mwtool.evaluation.trial import States
from mwtool.models.load import load
from mwtool.surgery.attack import Attack, parse_attack


def forecast_models(
    models: Sequence[str], config: EvalConfig, *, compare: bool, on_note: Callable[[str], None]
) -> list[Forecast]:
    """What `evaluate_models` will run with the same arguments, and about what it takes; result files are left out.

    Raises what that raises before it measures, and BadValue where only result files are given.
    """
    check_models(models, config, compare=compare)
    attacks, tasks = tuple(dict.fromkeys(map(parse_attack, config.attacks))), parse_tasks(config.tasks)
    check(tasks)
    found = [_of_model(name, config, attacks, tasks, on_note) for name in models if not (compare and _is_file(name))]
    if not found:
        raise BadValue("only result files are given, of which nothing is left to run; expected a model")
    return found


def _is_file(name: str) -> bool:
    return Path(name).is_file()


def _of_model(
    name: str, config: EvalConfig, attacks: Sequence[Attack], tasks: Sequence[Task], on_note: Callable[[str], None]
) -> Forecast:
    """Of one model, which is given up when this returns."""
    loaded = load(name, **asdict(config.loading))
    massive, groups, notes = rows_for(loaded, attacks, config)
    for line in dict.fromkeys((*loaded.notes, *notes)):
        on_note(line)
    first, *others = (Variant(0, partial(attacking, loaded, massive, one, groups)) for one in attacks)
    idle = sum(one.idle for one in attacks)
    states = States(attacked=others, first=first, said={"unchanged": idle, "attacks": len(attacks) - idle})
    return forecast(loaded, prepare(loaded, tasks, config.measuring), states, config.measuring)
