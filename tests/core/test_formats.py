"""Every format against an independent implementation: torch and ml_dtypes casts, numpy, published tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.core import FORMATS, NumberFormat, number_format
from narrowcast.errors import FormatError

# bitsandbytes, create_normal_map and the constants of its dequantize kernel
NF4_TABLE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
INT_FORMATS = [row for row in FORMATS.values() if row.kind == "int"]
FIXED = [row for row in FORMATS.values() if not row.learned]
SMALL_FORMATS = [row for row in FIXED if row.bits <= 8]
ML_DTYPES = {
    "fp8_e4m3": "float8_e4m3fn",
    "fp8_e5m2": "float8_e5m2",
    "fp4_e2m1": "float4_e2m1fn",
    "bf16": "bfloat16",
    "e8m0": "float8_e8m0fnu",
}


def name_of(row: NumberFormat) -> str:
    return row.name


def all_codes(row: NumberFormat) -> Tensor:
    """Every code of a format of at most 8 bits, in its storage dtype, without those that mean NaN or infinity."""
    if row.kind == "int":
        return torch.arange(int(row.low), int(row.high) + 1).to(row.storage)
    codes = torch.arange(2**row.bits, dtype=torch.uint8).view(row.storage)
    return codes.view(torch.uint8)[row.decode(codes).isfinite()].view(row.storage)


def probes(row: NumberFormat) -> Tensor:
    """Every number of the format, every midpoint of two neighbours, and the float32 numbers on both sides of each."""
    numbers = row.decode(all_codes(row)).to(torch.float64).unique()
    middles = ((numbers[1:] + numbers[:-1]) / 2).to(torch.float32)
    points = torch.cat([numbers.to(torch.float32), middles])
    up = torch.nextafter(points, torch.full_like(points, math.inf))
    down = torch.nextafter(points, torch.full_like(points, -math.inf))
    spread = torch.linspace(row.low, row.high, 1001)
    everything = torch.cat([points, up, down, spread])
    return everything.clamp(row.low, row.high)


@pytest.mark.parametrize("row", SMALL_FORMATS, ids=name_of)
def test_every_code_survives_decode_and_encode(row: NumberFormat) -> None:
    codes = all_codes(row)
    values = row.decode(codes)
    assert torch.equal(row.decode(row.encode(values)), values)
    nonzero = values != 0  # 0.0 and -0.0 are one number with two codes
    again = row.encode(values)
    assert torch.equal(again.view(torch.uint8)[nonzero], codes.view(torch.uint8)[nonzero])
    assert (float(values.min()), float(values.max())) == (row.low, row.high)


@pytest.mark.parametrize("row", SMALL_FORMATS, ids=name_of)
def test_encode_gives_the_nearest_number_of_the_format(row: NumberFormat) -> None:
    values = probes(row)
    numbers = row.decode(all_codes(row)).to(torch.float64).unique()
    chosen = (row.decode(row.encode(values)).to(torch.float64) - values.to(torch.float64)).abs()
    best = (numbers[None, :] - values.to(torch.float64)[:, None]).abs().min(1).values
    assert torch.equal(chosen, best)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_casts_agree_with_ml_dtypes(name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed; it is the oracle for small floats")
    row = FORMATS[name]
    values = probes(row) if row.bits <= 8 else torch.randn(5000) * 10.0 ** torch.linspace(-30, 30, 5000)
    if name == "e8m0":
        values = values[values >= 2.0**-126]  # below, ml_dtypes does not round to the nearest
    expected = values.numpy().astype(getattr(ml_dtypes, ML_DTYPES[name])).astype(np.float32)
    assert torch.equal(row.decode(row.encode(values)), torch.from_numpy(expected))


@pytest.mark.parametrize("name", ["fp8_e4m3", "fp8_e5m2", "fp16", "bf16", "fp32"])
def test_floats_within_range_agree_with_torch_casts(name: str) -> None:
    row = FORMATS[name]
    torch.manual_seed(0)
    values = (torch.randn(4000) * 10.0 ** torch.linspace(-9, 4, 4000)).clamp(row.low, row.high)
    assert torch.equal(row.encode(values).view(torch.uint8), values.to(row.storage).view(torch.uint8))


def test_fp16_agrees_with_numpy_at_subnormals() -> None:
    values = np.linspace(-(2.0**-13), 2.0**-13, 4097, dtype=np.float32)
    assert np.array_equal(FORMATS["fp16"].encode(torch.from_numpy(values)).numpy(), values.astype(np.float16))


def test_nf4_is_the_table_that_bitsandbytes_uses() -> None:
    levels = FORMATS["nf4"].decode(torch.arange(16, dtype=torch.uint8))
    assert torch.equal(levels, torch.tensor(NF4_TABLE))


def test_e2m1_is_the_table_of_the_microscaling_standard() -> None:
    positive = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert FORMATS["fp4_e2m1"].decode(torch.arange(8, dtype=torch.uint8)).tolist() == positive


@pytest.mark.parametrize("row", INT_FORMATS, ids=name_of)
def test_integers_round_half_to_even_and_saturate(row: NumberFormat) -> None:
    values = torch.tensor([-1e30, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5, 1e30])
    expected = np.clip(np.rint(values.numpy()), row.low, row.high)
    codes = row.encode(values)
    assert codes.dtype == row.storage
    assert np.array_equal(codes.numpy().astype(np.float32), expected)


def test_a_tie_between_levels_goes_to_the_even_mantissa() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    row = FORMATS["fp4_e2m1"]
    assert row.decode(row.encode(ties)).tolist() == [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert row.decode(row.encode(-ties)).tolist() == [-0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0]


def test_zero_has_one_code_in_a_codebook() -> None:
    assert FORMATS["fp4_e2m1"].encode(torch.tensor([0.0, -0.0, -0.25, 1e-45])).tolist() == [0, 0, 0, 0]


def test_every_scale_exponent_is_exact_and_its_nan_code_is_nan() -> None:
    row = FORMATS["e8m0"]
    values = row.decode(torch.arange(256, dtype=torch.uint8))
    assert values[:255].tolist() == [2.0**exponent for exponent in range(-127, 128)]
    assert bool(values[255].isnan())
    assert row.encode(torch.tensor([0.0, -3.0, 3.4e38])).tolist() == [0, 0, 254]


@pytest.mark.parametrize("row", FIXED, ids=name_of)
def test_values_beyond_the_range_become_the_bound(row: NumberFormat) -> None:
    largest = torch.finfo(torch.float32).max
    decoded = row.decode(row.encode(torch.tensor([-largest, largest])))
    assert decoded.tolist() == [max(row.low, -largest), min(row.high, largest)]


@pytest.mark.parametrize("row", FIXED, ids=name_of)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named_with_its_position(row: NumberFormat, bad: float) -> None:
    with pytest.raises(FormatError, match=rf"{row.name}: element \(1, 2\) is {bad}; 1 of 6"):
        row.encode(torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, bad]]))


@pytest.mark.parametrize("row", FIXED, ids=name_of)
def test_any_shape_is_encoded_also_none_and_non_contiguous(row: NumberFormat) -> None:
    for values in (torch.rand(0, 3), torch.tensor(0.5), torch.rand(3, 4).t(), torch.rand(2, 3, 4)[:, ::2, ::3]):
        codes = row.encode(values)
        assert codes.shape == values.shape
        assert codes.dtype == row.storage
        assert row.decode(codes).shape == values.shape


@given(st.sampled_from([row.name for row in FIXED]), st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_encoding_twice_is_encoding_once(name: str, value: float) -> None:
    row = FORMATS[name]
    once = row.decode(row.encode(torch.tensor([value])))
    assert torch.equal(row.decode(row.encode(once)), once)


@given(
    st.sampled_from([row.name for row in FIXED]),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
)
def test_encoding_keeps_order(name: str, one: float, other: float) -> None:
    low, high = sorted((one, other))
    decoded = FORMATS[name].decode(FORMATS[name].encode(torch.tensor([low, high])))
    assert decoded[0] <= decoded[1]


def test_only_16_and_32_bit_floats_go_without_scales() -> None:
    assert [row.name for row in FORMATS.values() if row.is_cast] == ["fp32", "fp16", "bf16"]
    assert all(row.scaled for row in FIXED if not row.is_cast)


def test_a_number_alone_has_no_code_where_levels_are_learned() -> None:
    row = FORMATS["codebook3"]
    assert (row.learned, row.scaled, row.is_cast) == (True, False, False)
    with pytest.raises(FormatError, match="codebook3: its levels are learned from a weight"):
        row.encode(torch.ones(2, 2))
    with pytest.raises(FormatError, match="codebook3: its levels are learned from a weight"):
        row.decode(torch.ones(2, 2, dtype=torch.uint8))


def test_an_unknown_format_is_answered_with_the_known_ones() -> None:
    with pytest.raises(FormatError, match=r"'int9' is not known; use one of fp32, fp16"):
        number_format("int9")
