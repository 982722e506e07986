"""The equation: ranges, scales, zero points, codes; exact at the edges, honest beyond them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.core import (
    PerGroup,
    QuantSpec,
    choose_scale,
    expand_to_matrix,
    quantize,
    round_scale,
    scale_shape,
    split_int8_scale,
)
from narrowcast.errors import FormatError

SPECS = [
    "int8/channel", "int8/tensor/asym", "uint8", "int8/token", "int6/group7", "int5/group32/asym", "int4/group32",
    "int4/group32/asym", "int4/block4x8", "int4/group16/scale:int8", "int3/channel", "int2/group8", "int2/group8/asym",
    "uint4/group32", "nf4/group16", "nf4/group16/scale:int8", "fp4_e2m1/channel", "fp8_e4m3/channel", "fp8_e5m2/tensor",
    "mxfp4", "mxfp8", "fp32", "fp16", "bf16", "int4/group32/asym/scale:k6", "int2/group16/asym/scale:k6",
    "int6/group16/scale:k6", "codebook4/channel", "codebook2/group8",
]  # fmt: skip
SCALED = [text for text in SPECS if QuantSpec.parse(text).format.scaled]
CASTS = ("fp32", "fp16", "bf16")
INTEGER = [text for text in SPECS if QuantSpec.parse(text).format.kind == "int"]


@st.composite
def matrices(draw: st.DrawFn) -> torch.Tensor:
    """Small matrices of any magnitude that every scale format can hold, with zeros, ties and outliers."""
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    values = torch.randn(rows, columns, generator=generator) * 10.0 ** draw(st.integers(-45, 4))
    if draw(st.booleans()):
        values[draw(st.integers(0, rows - 1))] = 0
    if draw(st.booleans()):
        values += values.abs().max()
    return values


@given(st.sampled_from(SPECS), matrices())
def test_quantizing_what_was_dequantized_gives_the_same_record(text: str, values: torch.Tensor) -> None:
    spec = QuantSpec.parse(text)
    first = quantize(values, spec)
    again = quantize(first.dequantize(), spec, first.scale, first.zero_point)
    assert again == first


@pytest.mark.parametrize(
    "text", ["int8/channel", "int6/group7", "int4/group32", "int4/block4x8", "int2/group8", "int8/group32/scale:e8m0"]
)
def test_codes_survive_even_when_the_scale_is_chosen_anew(text: str) -> None:
    torch.manual_seed(0)
    first = quantize(torch.randn(8, 70), QuantSpec.parse(text))
    again = quantize(first.dequantize(), first.spec)
    assert first.scale is not None
    assert again.scale is not None
    assert torch.equal(again.codes.view(torch.uint8), first.codes.view(torch.uint8))
    # 127 * scale / 127 can differ from scale in the last bit of a float32, not in a float16 or a power of two
    tolerance = 2.0**-23 if first.spec.scale_format == "fp32" else 0.0
    assert torch.allclose(again.scale, first.scale, rtol=tolerance, atol=0.0)


@given(st.sampled_from(INTEGER), matrices())
def test_the_error_of_an_integer_is_at_most_half_a_step(text: str, values: torch.Tensor) -> None:
    spec = QuantSpec.parse(text)
    record = quantize(values, spec)
    assert record.scale is not None
    codes = record.codes.to(torch.int32)
    assert int(codes.min()) >= spec.code_low
    assert int(codes.max()) <= spec.code_high
    inside = (codes > spec.code_low) & (codes < spec.code_high)
    step = expand_to_matrix(record.scale, spec.granularity, record.shape).double()
    error = (record.dequantize().double() - values.double()).abs() / step
    assert bool((error[inside] <= 0.50001).all())
    if spec.scale_format != "int8":  # at the ends the rounding of scale and zero point comes on top
        assert bool((error <= 1.1).all())


@given(st.sampled_from([t for t in SPECS if QuantSpec.parse(t).zero_step == 1 and t in (*SCALED, *CASTS)]), matrices())
def test_zero_is_exact(text: str, values: torch.Tensor) -> None:
    values[0, 0] = 0.0
    assert float(quantize(values, QuantSpec.parse(text)).dequantize()[0, 0]) == 0.0


@pytest.mark.parametrize("text", SCALED)
def test_an_all_zero_block_has_scale_1_and_stays_zero(text: str) -> None:
    record = quantize(torch.zeros(4, 32), QuantSpec.parse(text))
    assert record.scale is not None
    if record.spec.scale_format == "k6":  # a scale of 1 would be the largest of its super-block
        assert bool((record.scale == 2.0**-24).all())
    elif record.spec.scale_format == "int8":  # one outer scale a row is 1/127 in bfloat16
        assert torch.allclose(record.scale, torch.ones(4, 2), rtol=2**-8)
    else:
        assert torch.equal(record.scale, torch.ones_like(record.scale))
    assert torch.equal(record.dequantize(), torch.zeros(4, 32))


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("shape", [(0, 0), (0, 7), (7, 0), (1, 1), (1, 33), (5, 1)])
def test_empty_and_tiny_matrices_work(text: str, shape: tuple[int, int]) -> None:
    spec = QuantSpec.parse(text)
    values = torch.full(shape, -0.75)
    record = quantize(values, spec)
    assert record.shape == shape
    assert record.codes.dtype == spec.format.storage
    if record.scale is not None:
        assert record.scale.shape == scale_shape(spec.granularity, shape)
    assert torch.allclose(record.dequantize(), values, rtol=0.15)


@pytest.mark.parametrize("text", ["int6/group7", "int4/group32", "int5/group32/asym", "nf4/group16", "mxfp4", "mxfp8"])
def test_a_ragged_last_group_is_quantized_as_if_it_stood_alone(text: str) -> None:
    torch.manual_seed(0)
    spec = QuantSpec.parse(text)
    assert isinstance(spec.granularity, PerGroup)
    values = torch.randn(3, 32 + 12)
    whole = quantize(values, spec).dequantize()
    parts = [quantize(part, spec).dequantize() for part in values.split(spec.granularity.size, dim=1)]
    assert torch.equal(whole, torch.cat(parts, 1))


def test_codes_are_rounded_half_to_even() -> None:
    spec = QuantSpec.parse("int8/tensor")
    values = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.0]])
    record = quantize(values, spec)
    assert record.scale is not None
    assert float(record.scale) == 1.0
    assert record.codes.tolist() == [[0, 2, 2, 0, -2, -2, 126, 127]]


def test_integer_codes_agree_with_numpy() -> None:
    torch.manual_seed(0)
    values = torch.randn(16, 64)
    record = quantize(values, QuantSpec.parse("int8/channel"))
    exact = values.numpy()
    scale = (np.abs(exact).max(1, keepdims=True) / np.float32(127)).astype(np.float32)
    assert np.array_equal(record.codes.numpy(), np.clip(np.rint(exact / scale), -127, 127).astype(np.int8))


def test_asymmetric_codes_agree_with_torch() -> None:
    torch.manual_seed(0)
    values = torch.rand(8, 33) * 3 - 1
    record = quantize(values, QuantSpec.parse("uint8/channel"))
    assert record.scale is not None
    assert record.zero_point is not None
    scale, zero = record.scale.double()[:, 0], record.zero_point.long()[:, 0]
    theirs = torch.fake_quantize_per_channel_affine(values, scale.float(), zero.int(), 0, 0, 255)
    assert torch.allclose(record.dequantize(), theirs, atol=float(scale.max()) * 1e-3)


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (0.0, 255.0, 1.0, 0),
        (-255.0, 0.0, 1.0, 255),
        (5.0, 255.0, 1.0, 0),  # widened to contain 0
        (-255.0, -5.0, 1.0, 255),
        (-100.0, 155.0, 1.0, 100),
        (0.0, 0.0, 1.0, 0),
    ],
)
def test_the_range_is_widened_to_contain_zero(low: float, high: float, scale: float, zero_point: int) -> None:
    chosen, zero = choose_scale(torch.tensor([[low]]), torch.tensor([[high]]), QuantSpec.parse("uint8"))
    assert zero is not None
    assert (float(chosen), int(zero)) == (scale, zero_point)


@pytest.mark.parametrize(
    "text", ["int8/channel", "int4/channel/asym", "uint8", "nf4/channel", "fp8_e4m3/channel", "mxfp8"]
)
@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-38, 1e-30, 1e30, 3e38])
def test_extreme_magnitudes_give_finite_results(text: str, magnitude: float) -> None:
    torch.manual_seed(0)
    values = (torch.rand(3, 40) * 2 - 1) * magnitude
    values[0, 0] = magnitude
    decoded = quantize(values, QuantSpec.parse(text)).dequantize()
    assert bool(decoded.isfinite().all())
    error = float((decoded.double() - values.double()).abs().max())
    assert error <= max(0.15 * magnitude, 2.0**-126)


@pytest.mark.parametrize("text", ["int4/group32", "int4/group32/asym"])
@pytest.mark.parametrize("magnitude", [1e-8, 3e-7, 7e-7, 1e-6, 5e-5])
def test_float16_scales_below_the_normal_numbers_never_clip(text: str, magnitude: float) -> None:
    torch.manual_seed(0)
    values = torch.randn(64, 32) * magnitude
    record = quantize(values, QuantSpec.parse(text))
    assert record.scale is not None
    error = (record.dequantize() - values).abs()
    assert bool((error <= record.scale * (0.5001 if record.zero_point is None else 1.0)).all())


def test_a_scale_beyond_float16_is_an_error_with_the_remedy() -> None:
    values = torch.ones(2, 64)
    values[1, 40] = 1e6
    with pytest.raises(
        FormatError, match=r"block \(1, 1\) of int4/group32: its scale 142857 does not fit fp16 \(largest 65504\)"
    ):
        quantize(values, QuantSpec.parse("int4/group32"))
    assert float(quantize(values, QuantSpec.parse("int4/group32/scale:fp32")).dequantize()[1, 40]) == pytest.approx(1e6)


def test_a_scale_beyond_the_powers_of_two_is_an_error_too() -> None:
    with pytest.raises(FormatError, match=r"its scale 3\.4e\+38 does not fit e8m0"):
        quantize(torch.full((1, 8), 3.4e38), QuantSpec.parse("nf4/channel/scale:e8m0"))


@pytest.mark.parametrize(
    "text", ["int8/channel", "int6/channel", "uint8", "int4/channel/asym", "nf4/channel/scale:int8"]
)
@pytest.mark.parametrize("low", [0.0, -0.1, -0.3, -0.5, -1.0])
def test_the_largest_float_is_quantized_or_refused_but_never_infinite(text: str, low: float) -> None:
    largest = torch.finfo(torch.float32).max
    try:
        decoded = quantize(torch.tensor([[largest, low * largest]]), QuantSpec.parse(text)).dequantize()
    except FormatError as error:
        assert "so near the largest float32" in str(error) or "does not fit int8" in str(error)
    else:
        assert bool(decoded.isfinite().all())


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_named_with_their_position(text: str, bad: float) -> None:
    values = torch.ones(3, 5)
    values[1, 4] = bad
    with pytest.raises(FormatError, match=rf"element \(1, 4\) is {bad}; 1 of 15"):
        quantize(values, QuantSpec.parse(text))


@pytest.mark.parametrize(("text", "value"), [("fp16", 7e4), ("fp16", -1e30), ("bf16", 3.4e38)])
def test_a_value_that_a_plain_float_cannot_hold_is_an_error(text: str, value: float) -> None:
    with pytest.raises(FormatError, match=rf"element \(1, 0\) is .*, beyond the largest {text} number"):
        quantize(torch.tensor([[1.0], [value]]), QuantSpec.parse(text))
    assert quantize(torch.tensor([[65519.0]]), QuantSpec.parse("fp16")).dequantize().tolist() == [[65504.0]]


@pytest.mark.parametrize("values", [torch.ones(4), torch.ones(2, 2, 2), torch.ones(2, 2, dtype=torch.int32)])
def test_only_a_float_matrix_can_be_quantized(values: torch.Tensor) -> None:
    with pytest.raises(FormatError, match="takes a float matrix"):
        quantize(values, QuantSpec.parse("int8"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_dtypes_are_quantized_by_their_float32_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(4, 40).to(dtype)
    for text in SPECS:
        spec = QuantSpec.parse(text)
        assert quantize(values, spec) == quantize(values.to(torch.float32), spec)


def test_a_view_is_quantized_as_its_copy_and_is_not_changed() -> None:
    torch.manual_seed(0)
    values = torch.randn(40, 6).t()
    before = values.clone()
    for text in SPECS:
        spec = QuantSpec.parse(text)
        assert quantize(values, spec) == quantize(before.contiguous(), spec)
    assert torch.equal(values, before)


@pytest.mark.parametrize(("low", "high"), [(1.0, -1.0), (math.nan, 1.0), (0.0, math.inf), (-1e39, 1.0)])
def test_a_range_that_is_none_is_an_error_that_names_the_block(low: float, high: float) -> None:
    lows, highs = torch.zeros(2, 3, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64)
    lows[1, 2], highs[1, 2] = low, high
    with pytest.raises(FormatError, match=r"block \(1, 2\): the range"):
        choose_scale(lows, highs, QuantSpec.parse("int8/group4"))


@pytest.mark.parametrize("text", SCALED)
def test_rounding_a_rounded_scale_changes_nothing(text: str) -> None:
    torch.manual_seed(0)
    spec = QuantSpec.parse(text)
    scale = torch.rand(6, 9) * 10.0 ** torch.linspace(-44, 3, 54).reshape(6, 9)
    rounded = round_scale(scale, spec)
    assert torch.equal(round_scale(rounded, spec), rounded)
    assert bool((rounded > 0).all())


def test_power_of_two_scales_are_rounded_up_so_that_nothing_is_clipped() -> None:
    spec = QuantSpec.parse("int8/channel/scale:e8m0")
    scale = torch.tensor([[1.0, 1.0001, 1.9, 2.0, 0.75, 2.0**-120 * 1.5]])
    assert round_scale(scale, spec).tolist() == [[1.0, 2.0, 2.0, 2.0, 1.0, 2.0**-119]]


def test_int8_scales_are_a_code_times_one_bfloat16_number_per_row() -> None:
    torch.manual_seed(0)
    scale = torch.rand(5, 12) + 0.01
    rounded = round_scale(scale, QuantSpec.parse("int4/group32/scale:int8"))
    codes, outer = split_int8_scale(rounded)
    assert torch.equal(codes.to(torch.float32) * outer, rounded)
    assert torch.equal(outer.to(torch.bfloat16).to(torch.float32), outer)
    assert codes.amax(1).tolist() == [127] * 5
    assert bool(((rounded - scale).abs() <= 0.5001 * outer.clamp(min=1e-3) + scale * 2.0**-8).all())


def test_a_callers_scale_must_be_a_number_of_the_scale_format() -> None:
    spec, values = QuantSpec.parse("int4/group4"), torch.ones(1, 8)
    for bad in (0.1, 0.0, -1.0, math.nan, 2.0**-30):
        with pytest.raises(FormatError, match="block"):
            quantize(values, spec, torch.tensor([[1.0, bad]]))
    exact = torch.tensor([[1.0, 0.1]]).half().float()
    assert quantize(values, spec, exact).codes.tolist() == [[1, 1, 1, 1, 7, 7, 7, 7]]


@pytest.mark.parametrize(
    ("text", "scale", "zero_point"),
    [
        ("int8/channel", (2,), None),
        ("int8/channel", (1, 1), None),
        ("int8/channel", (2, 1), (2, 1)),
        ("int8/channel/asym", (2, 1), None),
        ("int8/channel/asym", (2, 1), (1, 1)),
    ],
)
def test_scales_of_the_wrong_shape_are_an_error(
    text: str, scale: tuple[int, ...], zero_point: tuple[int, ...] | None
) -> None:
    zeros = None if zero_point is None else torch.zeros(zero_point, dtype=torch.int32)
    with pytest.raises(FormatError, match="needs scales of shape"):
        quantize(torch.ones(2, 3), QuantSpec.parse(text), torch.ones(scale), zeros)


def test_a_zero_point_outside_the_codes_is_an_error() -> None:
    with pytest.raises(FormatError, match=r"zero point is outside the codes 0\.\.255"):
        quantize(torch.ones(1, 3), QuantSpec.parse("uint8"), torch.ones(1, 1), torch.tensor([[256]], dtype=torch.int32))
