"""What a sweep will run, before it does."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from mwtool.ablation.means import edits_of, untaken_means
from mwtool.ablation.plans import Plan, distinct_of, plans_of
from mwtool.ablation.sweep import Sweep
from mwtool.evaluation.config import Options
from mwtool.evaluation.evaluate import prepare
from mwtool.evaluation.forecast import Forecast, forecast
from mwtool.evaluation.prefix_reuse import Variant
from mwtool.evaluation.tasks import Task
from mwtool.evaluation.trial import States
from mwtool.models.load import Loaded
from mwtool.scan.targets import Group
from mwtool.surgery.attack import Attack, attacked_rows, edited_together


def forecast_sweep(
    loaded: Loaded, groups: Sequence[Group], tasks: Sequence[Task], sweep: Sweep, options: Options | None = None
) -> Forecast:
    """What `ablate` will run with the same arguments, and about what it takes. Raises what that raises at its start."""
    options = options or Options()
    ready = prepare(loaded, tasks, options)
    plans = distinct_of([plan for group in groups for plan in plans_of(loaded, group, sweep)])
    means = untaken_means(loaded, groups, sweep, ready)

    def variant(plan: Plan) -> Variant:
        edits = edits_of(plan.targets, plan.rows, means)
        return Variant(
            min(one.layer for one in plan.targets), partial(edited_together, loaded.base, edits, plan.attack)
        )

    controls = sum(plan.control is not None for plan in plans)
    # of those that change one layer the trial takes the first: the one that keeps a copy of the most rows
    states = States(
        attacked=[variant(plan) for plan in sorted(plans, key=lambda one: -_written(loaded, one))],
        first=Variant(0, partial(edited_together, loaded.base, (), Attack())),
        reuse=True,
        passes=len(means),
        said={"unchanged": 1, "attacks": len(plans) - controls, "controls": controls},
    )
    return forecast(loaded, ready, states, options)


def _written(loaded: Loaded, plan: Plan) -> int:
    """How many rows it overwrites."""
    places = zip(plan.targets, plan.rows, strict=True)
    return sum(len(attacked_rows(rows, one.ffn.width(loaded.base), plan.attack)) for one, rows in places)
