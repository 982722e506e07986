"""linear_int4_dynamic: every tier gives the reference's bits on every odd size, group and zero point."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.linear_cases import COLUMNS, DEPTHS, ROWS, Tiers, assert_same, int4_arguments, native, reference

NAME = "linear_int4_dynamic"


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_size_gives_the_reference_bits(every_tier: Tiers, depth: int) -> None:
    for rows in ROWS:
        for columns in COLUMNS:
            bias = columns % 2 == 0
            assert_same(every_tier, NAME, *int4_arguments(rows, columns, depth, bias=bias))
            assert_same(every_tier, NAME, *int4_arguments(rows, columns, depth, bias=bias, asymmetric=True))


@pytest.mark.parametrize("depth", [64, 172, 385])
@pytest.mark.parametrize("group", [64, 128, 0])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_every_group_gives_the_reference_bits(every_tier: Tiers, depth: int, group: int, asymmetric: bool) -> None:
    for rows in (1, 2, 3, 17):
        assert_same(every_tier, NAME, *int4_arguments(rows, 35, depth, group=group or depth, asymmetric=asymmetric))


@pytest.mark.parametrize("shape", [(7, 130, 64), (130, 200, 384), (300, 384, 384), (1, 3000, 1000), (5, 2000, 1000)])
def test_large_and_threaded_sizes_give_the_reference_bits(every_tier: Tiers, shape: tuple[int, int, int]) -> None:
    assert_same(every_tier, NAME, *int4_arguments(*shape))
    assert_same(every_tier, NAME, *int4_arguments(*shape, asymmetric=True, group=128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out_gives_the_reference_bits(every_tier: Tiers, dtype: torch.dtype) -> None:
    for rows, depth in ((1, 33), (3, 64), (17, 172)):
        x, *rest = int4_arguments(rows, 35, depth)
        assert_same(every_tier, NAME, x.to(dtype), *rest)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("zero_point", [0, 15])
def test_extreme_codes_do_not_saturate(tier: str, rows: int, zero_point: int) -> None:
    depth, columns = 4096, 18
    weight = torch.full((columns, depth // 2), 0xFF if zero_point == 0 else 0, dtype=torch.uint8)
    zero_points = torch.full((columns, depth // 32), zero_point, dtype=torch.uint8)
    x = torch.full((rows, depth), 127.0)
    scale = torch.ones(columns, depth // 32, dtype=torch.float16)
    y = native(NAME, x, weight, scale, zero_points, None, 32)
    assert torch.equal(y, torch.full_like(y, 127.0 * depth * (15 if zero_point == 0 else -15)))


def test_non_contiguous_and_many_dimensional_input(tier: str) -> None:
    x, *rest = int4_arguments(24, 33, 100)
    expected = native(NAME, x, *rest)
    assert torch.equal(native(NAME, x.reshape(2, 3, 4, 100), *rest), expected.reshape(2, 3, 4, 33))
    assert torch.equal(native(NAME, x.t().contiguous().t(), *rest), expected)


@pytest.mark.parametrize("depth", [0, 8])
def test_empty_batches_and_empty_depth(tier: str, depth: int) -> None:
    _, weight, scale, zero_point, bias, group = int4_arguments(1, 6, depth)
    for shape in ((0, depth), (3, 0, depth), (2, depth)):
        y = native(NAME, torch.zeros(shape), weight, scale, zero_point, bias, group)
        assert torch.equal(y, bias.expand(*shape[:-1], 6))


def test_zero_groups_and_denormals_count_as_zero(every_tier: Tiers) -> None:
    x, *rest = int4_arguments(3, 17, 100)
    x[0, :32] = 0.0
    x[1, 32:64] = 1e-42
    assert_same(every_tier, NAME, x, *rest)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_activation_raises_and_names_the_first_row(tier: str, value: float) -> None:
    x, *rest = int4_arguments(5, 20, 70)
    x[3, 69] = value
    for body in (native, reference):
        with pytest.raises(RuntimeError, match="Non-finite value in row 3 of x"):
            body(NAME, x, *rest)


def test_thread_count_does_not_change_the_result(tier: str, threads: None) -> None:
    for shape in ((1, 3000, 700), (257, 100, 385)):
        arguments = int4_arguments(*shape)
        torch.set_num_threads(1)
        alone = native(NAME, *arguments)
        torch.set_num_threads(2)
        assert torch.equal(native(NAME, *arguments), alone)


def test_wrong_arguments_raise() -> None:
    x, weight, scale, zero_point, bias, _ = int4_arguments(2, 6, 64, asymmetric=True)
    wrong = [
        (x[:, :60], weight, scale, zero_point, bias, 32, "x has 60 input features, weight has rows of 32 bytes"),
        (x, weight.char(), scale, zero_point, bias, 32, "weight must be uint8"),
        (x, weight, scale.float(), zero_point, bias, 32, "scale must be float16"),
        (x, weight, scale, zero_point[:, :1], bias, 32, "zero_point must have shape"),
        (x, weight, scale, zero_point.char(), bias, 32, "zero_point must be uint8"),
        (x, weight, scale, zero_point, bias, 64, "scale must have shape"),
        (x, weight, scale, zero_point, bias, 48, "group must be a multiple of 32"),
        (x, weight, scale, zero_point, bias, 0, "group must be a multiple of 32"),
        (x, weight, scale, zero_point, bias[:1], 32, "bias must have shape"),
    ]
    for *arguments, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            native(NAME, *arguments)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_opcheck_passes(asymmetric: bool) -> None:
    arguments = int4_arguments(3, 17, 40, asymmetric=asymmetric)
    torch.library.opcheck(torch.ops.narrowcast.linear_int4_dynamic.default, arguments)
