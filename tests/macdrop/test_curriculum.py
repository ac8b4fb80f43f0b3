"""Schedules give what their formulas say, are read from what they print, and faults point at the place."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mwtool.errors import BadSyntax, BadValue
from mwtool.macdrop.curriculum import KINDS, Curriculum, Kind, Phase, Schedule, curriculum_of, parse_schedule
from mwtool.macdrop.curriculum_yaml import parse_curriculum, read_curriculum

PROBABILITIES = st.floats(0, 1)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    kind: Kind = draw(st.sampled_from(KINDS))
    if kind == "none":
        return Schedule()
    start = draw(PROBABILITIES)
    if kind == "linear":
        return Schedule(kind, start, draw(PROBABILITIES))
    if kind == "exp":
        return Schedule(kind, start, alpha=draw(st.floats(1e-9, 1e3)))
    return Schedule(kind, start)


@given(schedules())
def test_a_schedule_is_read_from_what_it_prints(schedule: Schedule) -> None:
    assert parse_schedule(str(schedule)) == schedule


@given(schedules(), st.integers(1, 300), st.integers(1, 300))
def test_p_stays_between_0_and_1(schedule: Schedule, steps: int, per_epoch: int) -> None:
    assert all(0 <= p <= 1 for p in Curriculum(phases=(Phase(schedule),)).values(steps, per_epoch))


@given(st.text(alphabet="abcdefilnoprstx:-.,=e0189\n", max_size=14))
def test_no_text_raises_anything_but_a_fault_within_it(text: str) -> None:
    fault = None
    try:
        parse_schedule(text)
    except BadSyntax as raised:
        fault = raised
    assert fault is None or (0 <= fault.position <= len(text) and fault.text == text)


@given(st.text(max_size=40))
def test_no_file_raises_anything_but_bad_value(text: str) -> None:
    with suppress(BadValue):
        parse_curriculum(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("step:0.8", [0.8 * (1 - t / 6) for t in range(1, 7)]),
        ("linear:0.9-0.0", [0.9 - 0.9 * (t - 1) / 5 for t in range(1, 7)]),
        ("linear:0.2-1", [0.2 + 0.8 * (t - 1) / 5 for t in range(1, 7)]),
        ("epoch-before:0.8", [0.8, 0.8, 0.8 * 2 / 3, 0.8 * 2 / 3, 0.8 / 3, 0.8 / 3]),
        ("epoch-after:0.8", [0.8 * 2 / 3, 0.8 * 2 / 3, 0.8 / 3, 0.8 / 3, 0, 0]),
        ("exp:0.8,alpha=0.05", [0.8 * math.exp(-0.05 * t) for t in range(1, 7)]),
        ("exp:0.8", [0.8 * math.exp(-0.01 * t) for t in range(1, 7)]),
        ("constant:0.5", [0.5] * 6),
        ("none", [0.0] * 6),
    ],
)
def test_each_schedule_follows_its_formula(text: str, expected: list[float]) -> None:
    """Six steps, two an epoch; the formulas as the paper has them, to rounding."""
    assert curriculum_of(text).values(6, 2) == pytest.approx(expected, abs=1e-15)


def test_linear_hits_both_ends_exactly() -> None:
    values = curriculum_of("linear:0.9-0.1").values(7)
    assert (values[0], values[-1]) == (0.9, 0.1)
    assert curriculum_of("linear:0.9-0.1").values(1) == (0.9,)


def test_a_step_outside_the_run_is_refused() -> None:
    for t in (0, 7):
        with pytest.raises(BadValue, match="outside the run; it has steps 1 to 6"):
            curriculum_of("step:0.8").p(t, 6)


@pytest.mark.parametrize(
    ("text", "position", "message"),
    [
        ("stp:0.8", 0, "did you mean step"),
        ("step", 4, "found the end; expected ':'"),
        ("step:", 5, "expected a number between 0 and 1"),
        ("step:1.5", 5, "p is 1.5; expected a number between 0 and 1"),
        ("step:-0.1", 5, "found '-'"),
        ("step:0.8x", 8, "found 'x'; expected the end"),
        ("linear:0.9~0.0", 10, "found '~'; expected '-' and the last p"),
        ("linear:0.9-2", 11, "p is 2"),
        ("exp:0.8,beta=1", 7, "expected ',alpha='"),
        ("exp:0.8,alpha=0", 14, "alpha is 0"),
        ("none:1", 4, "expected the end"),
        ("", 0, "unknown schedule ''"),
    ],
)
def test_a_parse_error_points_at_the_character(text: str, position: int, message: str) -> None:
    with pytest.raises(BadSyntax) as caught:
        parse_schedule(text)
    assert caught.value.position == position
    assert message in str(caught.value)
    assert f"character {position + 1}" in str(caught.value)
    assert caught.value.pointer == f"{text}\n{' ' * position}^"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Schedule("stp", 0.8), "schedule is 'stp'; did you mean step"),
        (lambda: Schedule("step", 1.5), "p is 1.5; expected a number between 0 and 1"),
        (lambda: Schedule("linear", 0.5, math.nan), "p is nan"),
        (lambda: Schedule("exp", 0.5, alpha=0.0), "alpha is 0.0; expected a rate above 0"),
        (lambda: Phase(Schedule(), steps=0), "lasts 0 steps"),
        (lambda: Phase(Schedule(), share=1.0), "share of 1.0"),
        (lambda: curriculum_of("step:0.8", k=0), "k is 0; expected 1 row or more"),
        (lambda: curriculum_of("step:0.8", scope="other"), "scope is 'other'; did you mean others"),
        (lambda: curriculum_of("step:0.8", resample="batch"), "resample is 'batch'; did you mean microbatch"),
        (lambda: curriculum_of("step:0.8", masks="one"), "masks is 'one'; known are shared, separate"),
        (lambda: Curriculum(phases=()), "do not add up to one run"),
        (
            lambda: Curriculum(phases=(Phase(Schedule()), Phase(Schedule()))),
            "steps or a share, and the last neither",
        ),
        (lambda: Curriculum(phases=(Phase(Schedule(), steps=3),)), "the last neither"),
        (lambda: Curriculum(phases=(*[Phase(Schedule(), share=0.5)] * 2, Phase(Schedule()))), "sum to 1 or more"),
    ],
)
def test_what_is_made_in_python_is_held_to_the_same(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(BadValue, match=re.escape(message)):
        make()


@given(st.lists(st.floats(0.02, 0.3), min_size=1, max_size=3), st.integers(60, 2000))
def test_shares_end_where_their_sum_says_to_half_a_step(shares: list[float], steps: int) -> None:
    phases = [Phase(Schedule("constant", n / 10), share=share) for n, share in enumerate(shares, start=1)]
    values = Curriculum(phases=(*phases, Phase(Schedule()))).values(steps)
    for n in range(1, len(shares) + 1):
        ended = max(t for t, p in enumerate(values, start=1) if p == n / 10)
        assert abs(ended - sum(shares[:n]) * steps) <= 0.5 + 1e-9


FILE = """\
k: 3
scope: others
resample: microbatch
masks: separate
seed: 7
phases:
  - schedule: constant:0.5
    steps: 2
  - schedule: linear:1.0-0.0
    share: 0.5
  - schedule: none
"""


def test_a_file_gives_every_setting_and_its_phases_follow_one_another() -> None:
    found = parse_curriculum(FILE)
    assert (found.k, found.scope, found.resample, found.masks, found.seed) == (3, "others", "microbatch", "separate", 7)
    assert found.values(10) == (0.5, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0)
    assert str(found) == "constant:0.5 for 2 steps then linear:1.0-0.0 for 50% of the steps then none"


def test_defaults_are_the_papers() -> None:
    found = parse_curriculum("schedule: step:0.8")
    assert found == Curriculum(
        phases=(Phase(Schedule("step", 0.8)),), k=5, scope="massive", resample="step", masks="shared", seed=0
    )


def test_phases_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadValue, match="do not fit into 2 steps"):
        parse_curriculum(FILE).values(2)


@pytest.mark.parametrize(
    ("old", "new", "line", "character", "message"),
    [
        ("scope: others", "scop: others", 2, 1, "unknown key 'scop'; did you mean scope?"),
        ("    steps: 2", "    stps: 2", 8, 5, "unknown key 'stps'; did you mean steps?"),
        ("scope: others", "scope: other", 2, 8, "did you mean others?"),
        ("k: 3", "k: 0", 1, 4, "k is '0'; expected a whole number"),
        ("k: 3", "k: true", 1, 4, "k is 'true'"),
        ("seed: 7", "seed: x", 5, 7, "seed is 'x'"),
        ("share: 0.5", "share: 1.5", 10, 12, "share is '1.5'; expected between 0 and 1"),
        ("constant:0.5", "constant:5", 7, 24, "p is 5"),
        ("constant:0.5", '"constant:5"', 7, 25, "p is 5"),
        ("constant:0.5", "|\n      constant:5", 7, 15, "p is 5"),
        ("  - schedule: none", "  - schedule: none\n    steps: 3", 12, 12, "the last phase takes the remaining steps"),
        ("    steps: 2\n", "", 7, 5, "needs either steps or share"),
        ("seed: 7", "seed: 7\nk: 4", 6, 1, "k is given twice"),
        ("seed: 7", "schedule: none", 1, 1, "expected either schedule or phases"),
    ],
)
def test_a_fault_in_a_file_names_line_and_character(
    tmp_path: Path, old: str, new: str, line: int, character: int, message: str
) -> None:
    file = tmp_path / "curriculum.yaml"
    file.write_text(FILE.replace(old, new), encoding="utf-8")
    with pytest.raises(BadValue) as caught:
        read_curriculum(str(file))
    assert str(caught.value).startswith(f"{file}, line {line}, character {character}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "- 1", "k: [", "schedule: [1]", "phases: []", "phases: 3", "schedule:", "[" * 5000]
)
def test_files_of_another_shape_are_refused(text: str) -> None:
    with pytest.raises(BadValue, match="curriculum"):
        parse_curriculum(text)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match=r"no\.yaml cannot be read"):
        read_curriculum(str(tmp_path / "no.yaml"))


@given(st.integers(1, 50), st.integers(1, 400))
def test_phases_cover_every_step_once(first: int, steps: int) -> None:
    both: Any = Curriculum(phases=(Phase(Schedule("constant", 1.0), steps=first), Phase(Schedule("constant", 0.5))))
    with suppress(BadValue):
        assert both.values(steps) == (1.0,) * first + (0.5,) * (steps - first)
