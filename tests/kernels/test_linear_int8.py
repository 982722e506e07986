"""linear_int8_dynamic and linear_int8_static: every tier gives the reference's bits on every odd size."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.linear_cases import (
    COLUMNS,
    DEPTHS,
    ROWS,
    Tiers,
    assert_same,
    int8_arguments,
    native,
    reference,
    static_arguments,
)

DYNAMIC, STATIC = "linear_int8_dynamic", "linear_int8_static"


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_size_gives_the_reference_bits(every_tier: Tiers, depth: int) -> None:
    for rows in ROWS:
        for columns in COLUMNS:
            arguments = int8_arguments(rows, columns, depth, bias=columns % 2 == 0)
            assert_same(every_tier, DYNAMIC, *arguments)
            assert_same(every_tier, DYNAMIC, *arguments, False)
            assert_same(every_tier, STATIC, *static_arguments(arguments, 0.037, 101))
            assert_same(every_tier, STATIC, *static_arguments(arguments, 0.037, 101, per_channel=True))


@pytest.mark.parametrize("shape", [(7, 130, 64), (64, 65, 100), (130, 200, 384), (300, 384, 384), (5, 2000, 1000)])
def test_large_and_threaded_sizes_give_the_reference_bits(every_tier: Tiers, shape: tuple[int, int, int]) -> None:
    arguments = int8_arguments(*shape)
    assert_same(every_tier, DYNAMIC, *arguments)
    assert_same(every_tier, DYNAMIC, *arguments, False)
    assert_same(every_tier, STATIC, *static_arguments(arguments, 0.05, 3))
    assert_same(every_tier, STATIC, *static_arguments(arguments, 0.05, 3, per_channel=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("depth", [33, 64, 172])
def test_half_precision_in_and_out_gives_the_reference_bits(every_tier: Tiers, dtype: torch.dtype, depth: int) -> None:
    for rows in (1, 3, 17):
        x, *rest = int8_arguments(rows, 65, depth)
        arguments = (x.to(dtype), *rest)
        assert_same(every_tier, DYNAMIC, *arguments)
        assert_same(every_tier, DYNAMIC, *arguments, False)
        for per_channel in (False, True):
            assert_same(every_tier, STATIC, *static_arguments(arguments, 0.037, 101, per_channel=per_channel))


@pytest.mark.parametrize("rows", [1, 2, 4, 64])
@pytest.mark.parametrize("sign", [-1, 1])
def test_extreme_codes_do_not_saturate(tier: str, rows: int, sign: int) -> None:
    depth, columns = 8192, 20
    x = torch.ones(rows, depth)
    weight = torch.full((columns, depth), 127 * sign, dtype=torch.int8)
    weight_sum = weight.sum(dim=1, dtype=torch.int32)
    y = native(DYNAMIC, x, weight, torch.ones(columns), weight_sum, None)
    step = torch.ones(1) / 127
    assert torch.equal(y, torch.full_like(y, 127.0 * 127 * depth * sign) * step)
    for per_channel in (False, True):
        count = depth if per_channel else 1
        one, zero, none = torch.ones(count), torch.zeros(count, dtype=torch.int32), torch.zeros_like(weight_sum)
        y = native(STATIC, 1e30 * x, weight, torch.ones(columns), none, None, one, zero)
        assert torch.equal(y, torch.full_like(y, 255.0 * 127 * depth * sign))


@pytest.mark.parametrize("rows", [1, 4, 64])
def test_a_row_of_one_sign_uses_all_asymmetric_codes(tier: str, rows: int) -> None:
    x = torch.linspace(0, 255, 256).repeat(rows, 1)  # the scale is exactly 1 and the zero point 0, or 255 negated
    weight = torch.randint(-127, 128, (33, 256), dtype=torch.int8)
    sums = weight.sum(1, dtype=torch.int32)
    expected = (x.long() @ weight.long().t()).float()
    for sign in (1, -1):
        assert torch.equal(native(DYNAMIC, sign * x, weight, torch.ones(33), sums, None, False), sign * expected)


def test_the_largest_finite_range_does_not_overflow_in_asymmetric_codes(tier: str) -> None:
    x = torch.tensor([[3e38, -3e38, 0.0, 1e38]])
    y = native(DYNAMIC, x, torch.eye(4, dtype=torch.int8), torch.ones(4), torch.ones(4, dtype=torch.int32), None, False)
    assert torch.isfinite(y).all() and float(y[0, 2]) == 0.0 and torch.allclose(y, x, rtol=0.02, atol=1.3e36)


def test_integer_sums_are_exact_when_the_scales_are_one(tier: str) -> None:
    codes = torch.randint(-127, 128, (9, 200), generator=torch.Generator().manual_seed(3))
    codes[:, 0] = 127  # the range of every row is then exactly 127 and its scale exactly 1
    weight = torch.randint(-127, 128, (70, 200), dtype=torch.int8)
    y = native(DYNAMIC, codes.float(), weight, torch.ones(70), weight.sum(1, dtype=torch.int32), None)
    assert torch.equal(y.long(), codes @ weight.long().t())


def test_the_smallest_weight_code_is_exact(tier: str) -> None:
    weight = torch.full((5, 100), -128, dtype=torch.int8)
    x = torch.zeros(2, 100)
    y = native(STATIC, *static_arguments((x, weight, torch.ones(5), None, None), 1.0, 255))
    assert torch.equal(y, torch.zeros(2, 5))


def test_scales_per_channel_folded_into_the_weight_give_the_float_product(tier: str) -> None:
    random = torch.Generator().manual_seed(5)
    magnitude, weight = torch.logspace(-2, 2, 77), torch.randn(19, 77, generator=random)
    x = torch.rand(33, 77, generator=random) * magnitude - 0.3 * magnitude
    step, zero_point = magnitude / 255, torch.full((77,), 77, dtype=torch.int32)
    folded = weight * step
    scale = folded.abs().amax(dim=1) / 127
    codes = torch.round(folded / scale[:, None]).to(torch.int8)
    zero_sum = (zero_point * codes).sum(dim=1, dtype=torch.int32)
    y = native(STATIC, x, codes, scale, zero_sum, None, 1 / step, zero_point)
    expected = x @ weight.t()
    assert (y - expected).norm() / expected.norm() < 0.02


def test_non_contiguous_and_many_dimensional_input(tier: str) -> None:
    x, *rest = int8_arguments(24, 33, 100)
    expected = native(DYNAMIC, x, *rest)
    folded = x.reshape(2, 3, 4, 100)
    assert torch.equal(native(DYNAMIC, folded, *rest), expected.reshape(2, 3, 4, 33))
    strided = x.t().contiguous().t()
    assert not strided.is_contiguous()
    assert torch.equal(native(DYNAMIC, strided, *rest), expected)
    assert torch.equal(native(DYNAMIC, x[0], *rest), expected[0])


def test_non_contiguous_weight_and_half_bias(tier: str) -> None:
    x, weight, scale, weight_sum, bias = int8_arguments(5, 16, 64)
    expected = reference(DYNAMIC, x, weight, scale, weight_sum, bias.half())
    assert torch.equal(native(DYNAMIC, x, weight.t().contiguous().t(), scale, weight_sum, bias.half()), expected)


@pytest.mark.parametrize("depth", [0, 8])
def test_empty_batches_and_empty_depth(tier: str, depth: int) -> None:
    _, weight, scale, weight_sum, bias = int8_arguments(1, 6, depth)
    for shape in ((0, depth), (3, 0, depth), (2, depth)):
        y = native(DYNAMIC, torch.zeros(shape), weight, scale, weight_sum, bias)
        assert torch.equal(y, bias.expand(*shape[:-1], 6))


def test_zero_and_denormal_rows_count_as_zero(every_tier: Tiers) -> None:
    x, *rest = int8_arguments(4, 17, 50)
    x[0] = 0.0
    x[1] = 1e-42
    x[2] = 2.0**-101
    assert_same(every_tier, DYNAMIC, x, *rest)
    assert torch.equal(native(DYNAMIC, x, *rest)[:3], rest[-1].expand(3, 17))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", [DYNAMIC, STATIC])
def test_a_non_finite_activation_raises_and_names_the_first_row(tier: str, value: float, name: str) -> None:
    for rows, bad, depth in ((4, 2, 70), (700, 500, 384)):
        dynamic = int8_arguments(rows, 40, depth)
        dynamic[0][bad, depth - 1] = value
        dynamic[0][-1, 0] = value
        for per_channel in (False, True):
            static = static_arguments(dynamic, 0.1, 128, per_channel=per_channel)
            for body in (native, reference):
                with pytest.raises(RuntimeError, match=f"Non-finite value in row {bad} of x"):
                    body(name, *(static if name == STATIC else dynamic))


def test_thread_count_does_not_change_the_result(tier: str, threads: None) -> None:
    for shape in ((2, 3000, 700), (257, 100, 385), (600, 64, 172)):
        arguments = int8_arguments(*shape)
        torch.set_num_threads(1)
        alone = native(DYNAMIC, *arguments)
        torch.set_num_threads(2)
        assert torch.equal(native(DYNAMIC, *arguments), alone)


def test_wrong_arguments_raise() -> None:
    x, weight, scale, weight_sum, bias = int8_arguments(2, 6, 8)
    wrong = [
        (x[:, :7], weight, scale, weight_sum, bias, "x has 7 input features, weight has 8"),
        (x.double(), weight, scale, weight_sum, bias, "x must be float32, bfloat16 or float16, got float64"),
        (x, weight.int(), scale, weight_sum, bias, "weight must be int8, got int32"),
        (x, weight[0], scale, weight_sum, bias, "weight must have 2 dimensions"),
        (x, weight, scale[:5], weight_sum, bias, r"scale must have shape \[6\], got \[5\]"),
        (x, weight, scale.double(), weight_sum, bias, "scale must be float32, got float64"),
        (x, weight, scale, weight_sum[:1], bias, "weight_sum must have shape"),
        (x, weight, scale, weight_sum.long(), bias, "weight_sum must be int32, got int64"),
        (x, weight, scale, weight_sum, bias[:2], "bias must have shape"),
        (torch.tensor(1.0), weight, scale, weight_sum, bias, "x must have 1 to 16 dimensions"),
    ]
    for *arguments, message in wrong:
        with pytest.raises(RuntimeError, match=message):
            native(DYNAMIC, *arguments)


@pytest.mark.parametrize(
    ("inverse", "zero_point", "message"),
    [
        ([0.0], [0], "input_inverse must be positive"),
        ([1.0] * 7 + [float("nan")], [0] * 8, "input_inverse must be positive"),
        ([1.0] * 7 + [float("inf")], [0] * 8, "input_inverse must be positive"),
        ([-1.0], [0], "input_inverse must be positive"),
        ([1.0], [256], "input_zero_point must be in 0..255"),
        ([1.0] * 8, [0] * 7 + [-1], "input_zero_point must be in 0..255"),
        ([1.0] * 7, [0] * 7, "input_inverse must have 1 or 8 entries, got 7"),
        ([1.0] * 8, [0], r"input_zero_point must have shape \[8\]"),
        ([1.0], [0.0], "input_zero_point must be int32"),
    ],
)
def test_a_wrong_input_range_raises(inverse: list[float], zero_point: list[float], message: str) -> None:
    arguments = int8_arguments(2, 6, 8)
    zeros = torch.tensor(zero_point)
    zeros = zeros if zeros.is_floating_point() else zeros.to(torch.int32)
    with pytest.raises(RuntimeError, match=message):
        native(STATIC, *arguments, torch.tensor(inverse), zeros)


def test_opcheck_passes() -> None:
    arguments = int8_arguments(3, 17, 40)
    torch.library.opcheck(torch.ops.narrowcast.linear_int8_dynamic.default, arguments)
    torch.library.opcheck(torch.ops.narrowcast.linear_int8_static.default, static_arguments(arguments, 0.1, 128))
