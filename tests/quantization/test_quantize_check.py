"""What quantizing costs and what protection gives back is what the perplexities of the variants say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch

from mwtool.errors import BadValue
from mwtool.evaluation.measurement import Measured, Options
from mwtool.evaluation.tasks import parse_tasks
from mwtool.files.document import text_of
from mwtool.models.load import Loaded, load
from mwtool.quantization.check import QuantizeCheck, quantize_check, share_given_back
from mwtool.quantization.config import QuantizeConfig
from mwtool.quantization.document import quantize_document
from mwtool.quantization.verdict import verdicts
from mwtool.scan.loaded import scan_loaded
from mwtool.scan.scanner import Scan, Settings

PLAN = QuantizeConfig(bits=(3,), ks=(1, 2))
OPTIONS = Options(limit=6, window=64)


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return load("demo", dtype="float32")


@pytest.fixture(scope="module")
def scan(demo: Loaded) -> Scan:
    return scan_loaded(demo, Settings(k=2))


@pytest.fixture(scope="module")
def found(demo: Loaded, scan: Scan) -> QuantizeCheck:
    return quantize_check(demo, scan, parse_tasks(["ppl:demo"]), PLAN, OPTIONS)


def perplexity(samples: list[float]) -> Measured:
    return Measured(
        task="ppl:x",
        metric="perplexity",
        value=1.0,
        stderr=None,
        n=len(samples),
        seconds=0,
        samples=tuple(samples),
        weights=(10.0,) * len(samples),
        digest="a",
    )


def test_the_share_given_back_is_the_part_of_the_loss_that_protection_saves() -> None:
    full, plain = perplexity([10, 20, 30, 40]), perplexity([14, 26, 38, 50])
    assert share_given_back(full, plain, full) == pytest.approx(share_given_back(full, plain, full))
    whole, none = share_given_back(full, plain, full), share_given_back(plain, plain, full)
    assert whole is not None
    assert none is not None
    assert (whole.value, whole.low, whole.high) == (1, 1, 1)
    assert (none.value, none.low, none.high) == (0, 0, 0)
    half = share_given_back(perplexity([12, 23, 34, 45]), plain, full)
    assert half is not None
    assert half.value == pytest.approx(0.5)
    uneven = share_given_back(perplexity([10, 26, 30, 50]), plain, full)
    assert uneven is not None
    assert uneven.low is not None
    assert uneven.high is not None
    assert uneven.value == pytest.approx(12 / 28)
    assert uneven.low < uneven.value < uneven.high


def test_no_share_is_given_where_quantizing_costs_nothing_that_shows() -> None:
    full = perplexity([10, 20, 30, 40])
    assert share_given_back(full, perplexity([11, 19, 31, 39]), full) is None
    assert share_given_back(full, perplexity([9, 19, 29, 39]), full) is None
    assert share_given_back(full, replace(full, samples=(math.nan, 1, 1, 1), nonfinite="1 of 4"), full) is None


def test_each_set_of_protected_weights_is_measured_beside_its_control(demo: Loaded, found: QuantizeCheck) -> None:
    kinds = [None if one.protection is None else one.protection.kind for one in found.variants]
    assert kinds[0] is None
    assert kinds.count("columns at every event") == len(PLAN.ks)
    weights = {kind: one.protection.weights for kind, one in zip(kinds, found.variants, strict=True) if one.protection}
    hidden = demo.base.config.hidden_size
    assert weights["columns at every event"] == weights["random columns at every event"] == 2 * 2 * hidden
    assert weights["FFN matrices of the events"] == weights["FFN matrices of other layers"]
    assert all(one.bytes == one.protection.weights * 29 // 8 for one in found.variants if one.protection)
    assert found.weights == sum(p.numel() for n, p in demo.base.named_parameters() if ".layers." in n and p.ndim == 2)


def test_the_first_column_gives_back_more_than_random_ones(found: QuantizeCheck) -> None:
    shares = {one.protection.kind: one.back[0] for one in found.variants if one.protection}
    column, random = shares["columns at every event"], shares["random columns at every event"]
    assert column is not None
    assert random is not None
    assert column.value > random.value


def test_the_model_is_what_it_was(demo: Loaded, scan: Scan) -> None:
    before = tiny.digest(demo.base)
    quantize_check(
        demo, scan, parse_tasks(["ppl:demo"]), QuantizeConfig(bits=(3,), ks=(1,)), Options(limit=1, window=32)
    )
    assert tiny.digest(demo.base) == before


def test_the_document_holds_finite_numbers_and_every_variant(demo: Loaded, found: QuantizeCheck) -> None:
    document: dict[str, Any] = json.loads(text_of(quantize_document(demo, found)))
    assert len(document["variants"]) == len(found.variants)
    assert document["verdicts"] == list(verdicts(found.variants)) != []
    assert document["variants"][0]["protected"] is None
    assert document["variants"][1]["shares_given_back"][0]["value"] == pytest.approx(found.variants[1].back[0].value)


def test_more_columns_than_the_scan_ranked_and_a_model_without_events_are_refused(demo: Loaded, scan: Scan) -> None:
    tasks = parse_tasks(["ppl:demo"])
    with pytest.raises(BadValue, match="k is 5; the scan ranked 2 rows"):
        quantize_check(demo, scan, tasks, QuantizeConfig(ks=(5,)), OPTIONS)
    with pytest.raises(BadValue, match="has no events to protect"):
        quantize_check(demo, replace(scan, events=()), tasks, PLAN, OPTIONS)


def test_random_controls_are_repeated_by_the_seed(demo: Loaded, scan: Scan) -> None:
    from mwtool.quantization.check import protections_for

    def random(seed: int) -> dict[str, torch.Tensor]:
        found = protections_for(demo, scan, replace(PLAN, seed=seed))
        return next(one.masks for one in found if one.kind == "random columns at every event")

    assert all(torch.equal(mask, random(0)[name]) for name, mask in random(0).items())
    assert any(not torch.equal(mask, random(1)[name]) for name, mask in random(0).items())
