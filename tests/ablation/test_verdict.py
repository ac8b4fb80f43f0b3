"""What an attack does beside its controls: ratios, their intervals, and the words for them."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from sweeps import measured

from mwtool.ablation.verdict import judge
from mwtool.evaluation.comparison import paired_ratio, student_t
from mwtool.surgery.attack import Attack


def test_the_paired_interval_holds_the_true_ratio_in_95_of_100_cases() -> None:
    """Windows whose difficulty varies much more than the difference: 2,000 draws, so +-1.5 points at 3 sigma."""
    generator, held = torch.Generator().manual_seed(0), 0
    counts = [15.0] * 11 + [6.0]
    for _ in range(2000):
        difficulty = 3 + torch.randn(12, generator=generator, dtype=torch.float64)
        change = 0.2 + 0.1 * torch.randn(12, generator=generator, dtype=torch.float64)
        n = torch.tensor(counts, dtype=torch.float64)
        plain, attacked = (difficulty * n).tolist(), ((difficulty + change) * n).tolist()
        ratio = paired_ratio(measured(attacked, counts), [measured(plain, counts)])
        assert ratio.low is not None
        assert ratio.high is not None
        held += ratio.low <= math.exp(0.2) <= ratio.high
    assert 0.925 < held / 2000 < 0.975


def test_the_ratio_is_that_of_the_perplexities_and_of_several_their_geometric_mean() -> None:
    one, two, three = (
        measured([3, 4, 5, 6, 2], [2, 2, 2, 2, 1]),
        measured([2, 3, 4, 5, 1], [2, 2, 2, 2, 1]),
        measured([1, 1, 1, 1, 1], [2, 2, 2, 2, 1]),
    )
    assert paired_ratio(one, [two]).value == pytest.approx(one.value / two.value, rel=1e-12)
    expected = one.value / math.sqrt(two.value * three.value)
    assert paired_ratio(one, [two, three]).value == pytest.approx(expected, rel=1e-12)
    assert paired_ratio(measured([1, 2, 3], [1, 1, 1]), [measured([1, 1, 1], [1, 1, 1])]).low is None  # too few


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(3, 3.182446), (5, 2.570582), (10, 2.228139), (30, 2.042272), (209, 1.971379)]
)
def test_quantiles_of_student_t_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_t(freedom) == pytest.approx(quantile, rel=5e-3)


@pytest.mark.parametrize(
    ("change", "mode", "words"),
    [
        (0.5, "zero", "matter more than random"),
        (0.0, "zero", "do no more and no less"),
        (0.5, "retain", "leaves less"),
        (-0.3, "retain", "leaves more"),
    ],
)
def test_the_verdict_says_what_the_figures_say(change: float, mode: Any, words: str) -> None:
    generator = torch.Generator().manual_seed(1)
    plain = [3 + float(x) for x in torch.randn(30, generator=generator)]
    noise = [0.01 * float(x) for x in torch.randn(30, generator=generator)]
    counts = [1.0] * 30
    attacked = measured([p + change + n for p, n in zip(plain, noise, strict=True)], counts)
    random = [measured([p + s * n for p, n in zip(plain, noise[::-1], strict=True)], counts) for s in (1, -1, 0.5)]
    found = judge(
        Attack(mode, 5),
        attacked,
        measured(plain, counts),
        random=random,
        norm=None,
        shared=0,
        layers=(1,),
        experts=(None,),
    )
    assert found is not None
    assert words in found.text
    assert f"by {statistics.fmean(found.random):.2f} (3 draws" in found.text


@pytest.mark.parametrize(
    ("k", "shared", "layers", "words"),
    [
        (1, 0, (1,), "the row of largest norm by 1.00"),
        (1, 1, (1,), "the row of largest norm, which is the attacked one, by 1.00"),
        (3, 0, (1,), "the 3 rows of largest norm by 1.00"),
        (3, 1, (1,), "the 3 rows of largest norm, 1 of them an attacked one, by 1.00"),
        (3, 3, (1,), "the 3 rows of largest norm, which are the attacked ones, by 1.00"),
        (1, 1, (2, 11), "the row of largest norm in each, 1 of these 2 an attacked one, by 1.00"),
        (1, 2, (2, 11), "the row of largest norm in each, which are the attacked ones, by 1.00"),
        (3, 4, (2, 11), "the 3 rows of largest norm in each, 4 of these 6 attacked ones, by 1.00"),
    ],
)
def test_rows_of_largest_norm_are_told_from_those_attacked(
    k: int, shared: int, layers: tuple[int, ...], words: str
) -> None:
    plain = measured([1.0, 2.0, 3.0, 4.0], [1.0] * 4)
    experts = (None,) * len(layers)
    attack = Attack("zero", k)
    found = judge(attack, plain, plain, random=[plain], norm=plain, shared=shared, layers=layers, experts=experts)
    assert found is not None
    assert words in found.text
    random = f"{k} random row{'s' if k > 1 else ''}"
    assert (f"; {random} in each by 1.00;" if len(layers) > 1 else f"; {random} by 1.00;") in found.text
