"""Round to nearest is what its formula says, group by group, and weights that are kept are kept."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mwtool.errors import BadValue
from mwtool.quantization.rounding import NF4, Levels, Scheme, parse_bits, parse_group, round_to_nearest

GROUPS = st.one_of(st.none(), st.integers(1, 40))
SCHEMES = st.builds(
    Scheme,
    bits=st.integers(2, 8),
    group=GROUPS,
    levels=st.sampled_from([one for one in get_args(Levels) if one != "nf4"]),
) | st.builds(Scheme, bits=st.just(4), group=GROUPS, levels=st.just("nf4"))


def matrix(seed: int, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_hand(weight: Tensor, scheme: Scheme, kept: Tensor) -> Tensor:
    """The formula, one weight at a time."""
    found = weight.clone()
    size = scheme.group or weight.shape[1]
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], size):
            span = range(start, min(start + size, weight.shape[1]))
            group = [float(weight[row, at]) for at in span]
            for at in span:
                if not kept[row, at]:
                    found[row, at] = level(float(weight[row, at]), group, scheme)
    return found


def level(value: float, group: list[float], scheme: Scheme) -> float:
    as_float32 = lambda number: float(torch.tensor(number, dtype=torch.float32))  # noqa: E731
    most = 2**scheme.bits - 1
    if scheme.levels == "symmetric":
        scale = as_float32(as_float32(2 * max(map(abs, group))) / most) or 1.0
        steps = round(as_float32(value / scale))  # Python rounds half to even, as torch does
        return max(-(2 ** (scheme.bits - 1)), min(2 ** (scheme.bits - 1) - 1, steps)) * scale
    if scheme.levels == "nf4":
        scale = max(map(abs, group)) or 1.0
        return min(NF4, key=lambda one: abs(one - as_float32(value / scale))) * scale
    if scheme.levels == "minimum":
        low = min(group)
        scale = as_float32(as_float32(max(group) - low) / most) or 1.0
        return as_float32(as_float32(round(as_float32(as_float32(value - low) / scale)) * scale) + low)
    low, high = min(0.0, *group), max(0.0, *group)
    scale = as_float32(as_float32(high - low) / most) or 1.0
    zero = round(as_float32(-low / scale))
    steps = round(as_float32(as_float32(value / scale) + zero))
    return (max(0, min(most, steps)) - zero) * scale


@given(SCHEMES, st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 60), st.floats(0, 1))
def test_every_weight_is_at_the_level_its_formula_gives(
    scheme: Scheme, seed: int, rows: int, columns: int, share: float
) -> None:
    weight = matrix(seed, rows, columns)
    kept = matrix(seed + 1, rows, columns).abs() < share
    found, expected = round_to_nearest(weight, scheme, kept), by_hand(weight, scheme, kept)
    assert torch.equal(found[kept], weight[kept])
    # a value halfway between two levels may fall to either side by the last bit of a division
    step = (weight.abs().max() * 2 / (2**scheme.bits - 2)).item()
    far = (found - expected).abs() > 1e-5
    assert far.float().mean() < 0.05
    assert (found - expected).abs().max() <= step * 1.01


@given(SCHEMES, st.integers(0, 2**31))
def test_a_group_has_no_more_levels_than_its_bits_allow(scheme: Scheme, seed: int) -> None:
    found = round_to_nearest(matrix(seed, 2, 64), scheme)
    for start in range(0, 64, scheme.group or 64):
        for row in found[:, start : start + (scheme.group or 64)]:
            assert len(row.unique()) <= 2**scheme.bits


def test_kept_weights_are_given_back_and_the_others_are_rounded_as_without_them() -> None:
    weight = matrix(0, 4, 64)
    weight[:, 7] = 100.0
    kept = torch.zeros_like(weight, dtype=torch.bool)
    kept[:, 7] = True
    plain, found = round_to_nearest(weight, Scheme(4)), round_to_nearest(weight, Scheme(4), kept)
    assert torch.equal(found[kept], weight[kept])
    assert torch.equal(found[~kept], plain[~kept])


def test_the_largest_positive_weight_is_clipped_and_the_largest_negative_one_is_not() -> None:
    found = round_to_nearest(torch.tensor([[15.0, 0.0], [-15.0, 0.0]]), Scheme(4, None))
    assert found.tolist() == [[14.0, 0.0], [-16.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_bitsandbytes_to_the_bit(dtype: torch.dtype) -> None:
    functional = pytest.importorskip("bitsandbytes.functional", reason="an optional library")
    weight = matrix(5, 96, 128, dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(round_to_nearest(weight, Scheme(4, 64, "nf4")), functional.dequantize_4bit(packed, state))


def test_nf4_of_other_bits_is_refused() -> None:
    with pytest.raises(BadValue, match="NF4 has 4 bits; 3 were asked for"):
        Scheme(3, 64, "nf4")


def test_zero_is_a_level_with_a_zero_point_and_not_with_levels_from_the_minimum() -> None:
    weight = torch.tensor([[-1.0, 0.0, 2.2]])
    assert round_to_nearest(weight, Scheme(4, None, "zero-point"))[0, 1] == 0
    shifted = round_to_nearest(weight, Scheme(4, None, "minimum"))[0, 1]
    torch.testing.assert_close(shifted, torch.tensor(-1 + 5 * 3.2 / 15))


def test_zeros_stay_zeros_and_the_dtype_stays() -> None:
    for levels in get_args(Levels):
        found = round_to_nearest(torch.zeros(2, 8, dtype=torch.bfloat16), Scheme(4, 4, levels))
        assert found.dtype == torch.bfloat16
        assert not found.any()


@pytest.mark.parametrize("text", ["", "0", "1", "9", "4,x", "4.0", "-4", "4,,3", "\u0664", "4" * 5000])
def test_bits_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(BadValue, match="expected numbers from 2 to 8"):
        parse_bits(text)


@given(st.text())
def test_a_group_is_a_number_or_row_or_refused(text: str) -> None:
    try:
        found = parse_group(text)
    except BadValue:
        return
    assert found is None if text == "row" else found == int(text) > 0


def test_bits_and_groups_are_read() -> None:
    assert parse_bits("8,4, 3,4") == (8, 4, 3)
    assert (parse_group("row"), parse_group("128")) == (None, 128)


def test_levels_from_the_minimum_are_those_of_llama_cpps_q4_1() -> None:
    gguf = pytest.importorskip("gguf")
    weight = matrix(3, 64, 96)
    kind = gguf.GGMLQuantizationType.Q4_1
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.numpy(), kind), kind))
    found = round_to_nearest(weight, Scheme(4, 32, "minimum"))
    # Q4_1 stores scale and minimum in float16: within 2^-11 each; a weight halfway between levels may go either way
    step = (weight.reshape(64, 3, 32).amax(2) - weight.reshape(64, 3, 32).amin(2)) / 15
    away = (found - expected).abs().reshape(64, 3, 32)
    assert (away > 0.01 * step[..., None]).float().mean() < 0.01
    assert (away <= 1.01 * step[..., None]).all()
