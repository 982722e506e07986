"""The interleaved layout: the way there and back, and the linear ops on it, on every tier."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.kernels.linear_cases import (
    Tiers,
    assert_equal,
    int8_arguments,
    native,
    reference,
    static_arguments,
)
from tests.kernels.lowbit_cases import lowbit_arguments
from torch import Tensor

from narrowcast.core import FORMATS
from narrowcast.kernels.interleave import interleave, interleave_groups, restore, restore_groups
from narrowcast.kernels.reference_linear import LOW_BIT_FORMATS, input_group_of

SIZES = ((1, 1, 1), (2, 16, 32), (3, 17, 33), (5, 65, 172), (6, 64, 64), (7, 130, 385), (17, 33, 260))
"""Rows, columns, depth."""


def interleaved_fields(packed: Tensor, bits: int, depth: int) -> Tensor:
    if bits == 8:
        return interleave(packed, 8)
    return interleave(torch.ops.narrowcast.unpack_codes(packed, bits, 0, depth, False), bits)


def interleaved_lowbit(arguments: tuple, depth: int) -> tuple:
    x, weight, scale, zero_point, bias, name, *rest = arguments
    columns = weight.shape[0]
    weight = interleaved_fields(weight, FORMATS[name].bits, depth)
    zero_point = None if zero_point is None else interleave_groups(zero_point)
    return x, weight, interleave_groups(scale), zero_point, bias, name, *rest, columns


@given(
    rows=st.integers(0, 70), columns=st.integers(0, 130), bits=st.sampled_from((2, 3, 4, 5, 6, 8)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_restoring_gives_the_fields_back(rows: int, columns: int, bits: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    fields = torch.randint(0, 2**bits, (rows, columns), dtype=torch.uint8, generator=random)
    layout = interleave(fields, bits)
    assert layout.shape == (-(-rows // 16), -(-columns // 32), bits, 64)
    assert torch.equal(restore(layout, rows, columns), fields)


def test_a_nibble_lies_where_the_documentation_says() -> None:
    fields = torch.zeros(40, 100, dtype=torch.uint8)
    fields[21, 70] = 11  # panel 1, row 5; chunk 2, code 6: quad 1, the second of unit 0
    layout = interleave(fields, 4)
    assert layout[1, 2, 0, 5 * 4 + 2] == 11 << 4 and layout.count_nonzero() == 1


def test_groups_are_restored() -> None:
    values = torch.randn(37, 5).half()
    assert interleave_groups(values).shape == (3, 5, 16)
    assert torch.equal(restore_groups(interleave_groups(values), 37), values)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_int8_layers_answer_alike_from_both_layouts(
    every_tier: Tiers, size: tuple[int, int, int], symmetric: bool
) -> None:
    x, weight, *rest = int8_arguments(*size)
    expected = reference("linear_int8_dynamic", x, weight, *rest, symmetric)
    layout = interleave(weight, 8)
    assert_equal(reference("linear_int8_dynamic", x, layout, *rest, symmetric), expected, "reference")
    for tier in every_tier():
        assert_equal(native("linear_int8_dynamic", x, layout, *rest, symmetric), expected, tier)


@pytest.mark.parametrize("per_channel", [False, True])
def test_static_layers_answer_alike_from_both_layouts(every_tier: Tiers, per_channel: bool) -> None:
    x, weight, *rest = static_arguments(int8_arguments(7, 70, 172), 0.5, 100, per_channel=per_channel)
    expected = reference("linear_int8_static", x, weight, *rest)
    for tier in every_tier():
        assert_equal(native("linear_int8_static", x, interleave(weight, 8), *rest), expected, tier)


@pytest.mark.parametrize("group", [16, 32, 96, 128, 1000])
@pytest.mark.parametrize("name", LOW_BIT_FORMATS)
def test_low_bit_layers_answer_alike_from_both_layouts(every_tier: Tiers, name: str, group: int) -> None:
    for rows, columns, depth in SIZES:
        for asymmetric in (False, True) if FORMATS[name].kind == "int" and name != "int8" else (False,):
            arguments = lowbit_arguments(
                rows, columns, depth, name, group=group, input_group=input_group_of(group, depth),
                asymmetric=asymmetric, half=rows % 2 == 0,
            )  # fmt: skip
            expected = reference("linear_lowbit_dynamic", *arguments)
            layout = interleaved_lowbit(arguments, depth)
            assert_equal(reference("linear_lowbit_dynamic", *layout), expected, "reference")
            for tier in every_tier():
                assert_equal(native("linear_lowbit_dynamic", *layout), expected, tier)


def test_one_input_group_may_span_several_weight_groups(every_tier: Tiers) -> None:
    arguments = lowbit_arguments(5, 40, 300, group=32, input_group=128)
    expected = reference("linear_lowbit_dynamic", *arguments)
    for tier in every_tier():
        assert_equal(native("linear_lowbit_dynamic", *interleaved_lowbit(arguments, 300)), expected, tier)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_answer_alike(every_tier: Tiers, dtype: torch.dtype) -> None:
    x, *rest = lowbit_arguments(6, 40, 172)
    x = (x / x.abs().max()).to(dtype)
    expected = reference("linear_lowbit_dynamic", x, *rest)
    for tier in every_tier():
        assert_equal(native("linear_lowbit_dynamic", *interleaved_lowbit((x, *rest), 172)), expected, tier)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_every_number_of_threads_gives_the_same_bits(every_tier: Tiers, threads: int) -> None:
    arguments = lowbit_arguments(50, 700, 512)
    expected = reference("linear_lowbit_dynamic", *arguments)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for tier in every_tier():
            assert_equal(native("linear_lowbit_dynamic", *interleaved_lowbit(arguments, 512)), expected, tier)
    finally:
        torch.set_num_threads(before)


def test_inputs_that_are_not_finite_raise(every_tier: Tiers) -> None:
    for bad in (float("nan"), float("inf"), float("-inf")):
        for place in (0, 40, 171):
            x, *rest = lowbit_arguments(3, 20, 172)
            x[1, place] = bad
            y, weight, *others = int8_arguments(3, 20, 172)
            y[1, place] = bad
            for _ in every_tier():
                with pytest.raises(RuntimeError, match="Non-finite value in row 1"):
                    native("linear_lowbit_dynamic", *interleaved_lowbit((x, *rest), 172))
                with pytest.raises(RuntimeError, match="Non-finite value in row 1"):
                    native("linear_int8_dynamic", y, interleave(weight, 8), *others)


def test_wrong_shapes_raise() -> None:
    x, weight, scale, zero_point, bias, *rest, columns = interleaved_lowbit(lowbit_arguments(2, 20, 64), 64)
    wrong = [
        (x[:, :30], weight, scale, rest, columns, "weight of 20 rows and 30 columns of 4 bits has shape"),
        (x, weight[:1], scale, rest, columns, "has shape"),
        (x, weight, scale, rest, 40, "an interleaved weight of 40 rows"),
        (x, weight, scale[:, :, :8].contiguous(), rest, columns, "scale must have shape"),
        (x, weight, scale.float()[0], rest, columns, "scale must have 3 dimensions"),
    ]
    for x_, weight_, scale_, rest_, columns_, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            native("linear_lowbit_dynamic", x_, weight_, scale_, zero_point, bias, *rest_, columns_)
    x, weight, *others = int8_arguments(2, 20, 64)
    with pytest.raises(RuntimeError, match="an interleaved weight of 20 rows and 63 columns of 8 bits"):
        native("linear_int8_dynamic", x[:, :63], interleave(weight, 8)[:, :1], *others)
