"""linear_lowbit_dynamic: every tier gives the reference's bits for every format, group, zero point and odd size."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.linear_cases import Tiers, assert_same, native, reference
from tests.kernels.lowbit_cases import lowbit_arguments

from narrowcast.kernels.reference_linear import LOW_BIT_FORMATS, integer_levels

NAME = "linear_lowbit_dynamic"
ASYMMETRIC = ("int2", "int3", "int4", "uint4", "int5", "int6")
DEPTHS = (1, 2, 31, 33, 64, 100, 172, 385)


@pytest.mark.parametrize("name", LOW_BIT_FORMATS)
@pytest.mark.parametrize("depth", DEPTHS)
def test_every_format_and_size_gives_the_reference_bits(every_tier: Tiers, name: str, depth: int) -> None:
    for rows, columns in ((0, 3), (1, 1), (1, 50), (2, 17), (3, 33), (7, 100)):
        arguments = lowbit_arguments(rows, columns, depth, name, bias=columns % 2 == 0)
        assert_same(every_tier, NAME, *arguments)
        if name in ASYMMETRIC:
            assert_same(every_tier, NAME, *lowbit_arguments(rows, columns, depth, name, asymmetric=True))


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "int5", "int6", "int8", "nf4"])
@pytest.mark.parametrize("group", [16, 48, 64, 128, 256, 400])
def test_every_group_gives_the_reference_bits(every_tier: Tiers, name: str, group: int) -> None:
    asymmetric = name in ASYMMETRIC
    for rows, depth, input_group in ((1, 385, 32), (2, 172, 400), (3, 385, 64), (8, 320, 128), (5, 385, 400)):
        half = rows != 2
        arguments = lowbit_arguments(
            rows, 35, depth, name, group=group, input_group=input_group, asymmetric=asymmetric, half=half
        )
        assert_same(every_tier, NAME, *arguments)


@pytest.mark.parametrize("shape", [(7, 130, 64), (130, 200, 384), (300, 384, 384), (1, 3000, 1000), (5, 2000, 1000)])
def test_large_and_threaded_sizes_give_the_reference_bits(every_tier: Tiers, shape: tuple[int, int, int]) -> None:
    assert_same(every_tier, NAME, *lowbit_arguments(*shape))
    assert_same(every_tier, NAME, *lowbit_arguments(*shape, asymmetric=True, group=128, input_group=128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out_gives_the_reference_bits(every_tier: Tiers, dtype: torch.dtype) -> None:
    for rows, depth in ((1, 33), (3, 64), (17, 172)):
        x, *rest = lowbit_arguments(rows, 35, depth, "int3")
        assert_same(every_tier, NAME, x.to(dtype), *rest)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("name", ["int2", "int4", "int5", "int6", "int8", "nf4", "fp4_e2m1"])
def test_extreme_codes_do_not_saturate(tier: str, name: str, rows: int) -> None:
    depth, columns = 4096, 18
    for byte, zero in ((0xFF, 0), (0, 63)):
        arguments = list(lowbit_arguments(rows, columns, depth, name, asymmetric=name in ASYMMETRIC))
        arguments[1] = torch.full_like(arguments[1], byte if name != "int8" else 0 if byte else -128).fill_(
            -128 if name == "int8" else byte if name not in ("nf4", "fp4_e2m1") or not byte else 0x77
        )
        if arguments[3] is not None:
            arguments[3] = torch.full_like(arguments[3], zero)
        for sign in (1.0, -1.0):
            arguments[0] = torch.full((rows, depth), sign * 127.0)
            assert torch.equal(native(NAME, *arguments), reference(NAME, *arguments))


def test_the_levels_of_nf4_are_rounded_and_those_of_fp4_are_exact() -> None:
    codes = torch.tensor([[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]], dtype=torch.uint8)
    nf4 = integer_levels(codes, None, "nf4", 16, 16)
    assert nf4.tolist() == [[-127, -88, -67, -50, -36, -23, -12, 0, 10, 20, 31, 43, 56, 71, 92, 127]]
    fp4 = integer_levels(codes, None, "fp4_e2m1", 16, 16)
    assert fp4.tolist() == [[0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12]]


def test_non_contiguous_misaligned_and_many_dimensional_input(tier: str) -> None:
    x, weight, *rest = lowbit_arguments(24, 33, 100, "int5")
    expected = native(NAME, x, weight, *rest)
    assert torch.equal(native(NAME, x.reshape(2, 3, 4, 100), weight, *rest), expected.reshape(2, 3, 4, 33))
    assert torch.equal(native(NAME, x.t().contiguous().t(), weight, *rest), expected)
    shifted = torch.empty(weight.numel() + 1, dtype=torch.uint8)[1:].view(weight.shape).copy_(weight)
    assert torch.equal(native(NAME, x, shifted, *rest), expected)
    assert torch.equal(native(NAME, x, weight.t().contiguous().t(), *rest), expected)


@pytest.mark.parametrize("depth", [0, 8])
def test_empty_batches_and_empty_depth(tier: str, depth: int) -> None:
    _, weight, scale, zero_point, bias, *rest = lowbit_arguments(1, 6, depth)
    for shape in ((0, depth), (3, 0, depth), (2, depth)):
        y = native(NAME, torch.zeros(shape), weight, scale, zero_point, bias, *rest)
        assert torch.equal(y, bias.expand(*shape[:-1], 6))


def test_zero_groups_and_denormals_count_as_zero(every_tier: Tiers) -> None:
    x, *rest = lowbit_arguments(3, 17, 100)
    x[0, :32] = 0.0
    x[1, 32:64] = 1e-42
    assert_same(every_tier, NAME, x, *rest)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_activation_raises_and_names_the_first_row(tier: str, value: float) -> None:
    x, *rest = lowbit_arguments(5, 20, 70)
    x[3, 69] = value
    for body in (native, reference):
        with pytest.raises(RuntimeError, match="Non-finite value in row 3 of x"):
            body(NAME, x, *rest)


def test_thread_count_does_not_change_the_result(tier: str, threads: None) -> None:
    for shape in ((1, 3000, 700), (257, 100, 385)):
        arguments = lowbit_arguments(*shape, "int3")
        torch.set_num_threads(1)
        alone = native(NAME, *arguments)
        for count in (2, 3, 4):
            torch.set_num_threads(count)
            assert torch.equal(native(NAME, *arguments), alone)


def test_wrong_arguments_raise() -> None:
    x, weight, scale, zero_point, bias, *_ = lowbit_arguments(2, 6, 64, asymmetric=True)
    right = (x, weight, scale, zero_point, bias, "int4", 32, 32, "none")
    wrong = [
        (0, x[:, :60], "x has 60 input features, weight has rows of 32 bytes"),
        (1, weight.char(), "weight must be uint8"),
        (2, scale.bfloat16(), "scale must be float32"),
        (2, scale[:, :1], "scale must have shape"),
        (3, zero_point[:, :1], "zero_point must have shape"),
        (3, zero_point.char(), "zero_point must be uint8"),
        (4, bias[:1], "bias must have shape"),
        (5, "int7", "format 'int7' is not known"),
        (5, "nf4", "nf4 takes no zero_point"),
        (6, 24, "group must be a multiple of 16"),
        (6, 0, "group must be a multiple of 16"),
        (7, 8, "input_group must be a multiple of 16"),
        (8, "tanh", "fused 'tanh' is not known"),
    ]
    for index, value, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            native(NAME, *right[:index], value, *right[index + 1 :])


@pytest.mark.parametrize("asymmetric", [False, True])
def test_opcheck_passes(asymmetric: bool) -> None:
    arguments = lowbit_arguments(3, 17, 40, asymmetric=asymmetric)
    torch.library.opcheck(torch.ops.narrowcast.linear_lowbit_dynamic.default, arguments)
