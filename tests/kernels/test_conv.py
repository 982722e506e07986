"""conv2d_int8: every tier gives the reference's bits for every shape, layout and mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.kernels.conv_cases import SHAPES, ConvCase, vary
from torch import Tensor

from narrowcast import kernels
from narrowcast.kernels.reference_conv import conv_plan

Tiers = Callable[[], Iterator[str]]
OPS = torch.ops.narrowcast


def assert_every_tier_gives_the_reference(tiers: Tiers, arguments: tuple[Any, ...]) -> Tensor:
    expected = kernels.OPS["conv2d_int8"].reference(*arguments)
    for tier in tiers():
        got = OPS.conv2d_int8(*arguments)
        assert got.shape == expected.shape and got.dtype == expected.dtype and got.stride() == expected.stride()
        assert torch.equal(got, expected), f"{tier}: off by {(got.float() - expected.float()).abs().max()}"
    return expected


@pytest.mark.parametrize("shape", SHAPES)
def test_every_tier_gives_the_reference_bits(shape: str, every_tier: Tiers) -> None:
    for number in range(8):
        assert_every_tier_gives_the_reference(every_tier, vary(SHAPES[shape], number).arguments())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_range_per_input_channel_gives_the_reference_bits(shape: str, every_tier: Tiers) -> None:
    for number in (1, 2, 3, 5, 6, 7, 9, 10):
        case = replace(vary(SHAPES[shape], number), per_channel=True)
        assert_every_tier_gives_the_reference(every_tier, case.arguments())


@pytest.mark.parametrize("shape", ["square", "grouped odd", "depthwise", "upsampled"])
def test_equal_ranges_per_channel_are_one_range(shape: str, tier: str) -> None:
    for layout in ("planar", "channels_last"):
        case = replace(SHAPES[shape], layout=layout)
        arguments = list(case.arguments())
        expected = OPS.conv2d_int8(*arguments)
        arguments[5:7] = (value.expand(case.channels).contiguous() for value in arguments[5:7])
        assert torch.equal(OPS.conv2d_int8(*arguments), expected)


@pytest.mark.parametrize("groups", [1, 3, 9])
def test_scales_per_channel_folded_into_the_weight_give_the_float_convolution(groups: int, tier: str) -> None:
    random = torch.Generator().manual_seed(1)
    magnitude = torch.logspace(-1, 1, 9)
    x = (torch.rand(2, 9, 10, 11, generator=random) - torch.linspace(0, 1, 9)[:, None, None]) * magnitude[:, None, None]
    weight = torch.randn(18 if groups < 9 else 9, 9 // groups, 3, 3, generator=random)
    step, zeros = magnitude / 255, torch.round(torch.linspace(0, 1, 9) * 255).to(torch.int32)
    grouped = weight.reshape(groups, -1, 9 // groups, 9) * step.reshape(groups, 1, -1, 1)
    folded = grouped.reshape(len(weight), -1)
    scale = folded.abs().amax(dim=1) / 127
    codes = torch.round(folded / scale[:, None]).to(torch.int8)
    zero_sum = ConvCase(channels=9, outputs=len(weight), groups=groups).zero_sum(codes, zeros)
    packed = OPS.conv2d_int8_pack(codes, (3, 3), groups)
    y = OPS.conv2d_int8(
        x, packed, scale, zero_sum, None, 1 / step, zeros, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), groups, (1, 1),
        (0, 0), False,
    )  # fmt: skip
    expected = F.conv2d(x, weight, padding=1, groups=groups)
    assert (y - expected).norm() / expected.norm() < 0.015


@pytest.mark.parametrize("shape", SHAPES)
def test_unpack_undoes_pack(shape: str) -> None:
    case = SHAPES[shape]
    weight = case.weight()
    packed = OPS.conv2d_int8_pack(weight, case.kernel, case.groups)
    assert torch.equal(packed, kernels.OPS["conv2d_int8_pack"].reference(weight, case.kernel, case.groups))
    inputs = case.channels // case.groups
    for unpack in (OPS.conv2d_int8_unpack, kernels.OPS["conv2d_int8_unpack"].reference):
        assert torch.equal(unpack(packed, case.outputs, inputs, case.kernel, case.groups), weight)


@pytest.mark.parametrize("shape", ["square", "depthwise", "depthwise five", "pointwise"])
def test_extreme_codes_do_not_overflow(shape: str, every_tier: Tiers) -> None:
    case = replace(SHAPES[shape], zero_point=0)
    arguments = list(case.arguments(torch.full((1, case.channels, 9, 9), 1e30)))
    weight = torch.where(torch.arange(case.outputs)[:, None] % 2 == 0, 127, -127).to(torch.int8)
    weight = weight.expand_as(case.weight()).contiguous()
    arguments[1] = OPS.conv2d_int8_pack(weight, case.kernel, case.groups)
    arguments[3] = torch.zeros(case.outputs, dtype=torch.int32)
    y = assert_every_tier_gives_the_reference(every_tier, tuple(arguments))
    taps = weight.shape[1]
    exact = 255.0 * 127 * taps * arguments[2][0] + arguments[4][0]
    assert torch.allclose(y[0, 0, 4, 4], exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_gives_half_precision_out(dtype: torch.dtype, every_tier: Tiers) -> None:
    for layout in ("planar", "channels_last"):
        case = replace(SHAPES["square"], layout=layout, zero_point=None)
        assert_every_tier_gives_the_reference(every_tier, case.arguments(case.x().to(dtype)))


def test_zero_and_tiny_samples_give_the_bias(every_tier: Tiers) -> None:
    case = ConvCase(batch=3, zero_point=None)
    x = case.x()
    x[0] = 0
    x[1] = 1e-38
    arguments = case.arguments(x)
    y = assert_every_tier_gives_the_reference(every_tier, arguments)
    assert torch.equal(y[:2], arguments[4][None, :, None, None].expand_as(y[:2]))


def test_empty_batch_gives_empty_result(every_tier: Tiers) -> None:
    for zero_point in (None, 3):
        case = ConvCase(batch=0, zero_point=zero_point)
        arguments = case.arguments()
        for _ in every_tier():
            assert OPS.conv2d_int8(*arguments).shape == (0, 17, 7, 9)


@pytest.mark.parametrize("shape", ["square", "pointwise on single pixels", "depthwise", "depthwise stride", "grouped"])
def test_result_does_not_depend_on_threads_or_batch_split(shape: str, threads: None) -> None:
    case = replace(SHAPES[shape], batch=7, zero_point=None, height=SHAPES[shape].height * 3)
    x = case.x()
    torch.set_num_threads(1)
    whole = OPS.conv2d_int8(*case.arguments(x))
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        assert torch.equal(OPS.conv2d_int8(*case.arguments(x)), whole)
    parts = [OPS.conv2d_int8(*case.arguments(x[i : i + 1])) for i in range(7)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_upsample_is_transposed_convolution(groups: int, stride: int) -> None:
    torch.manual_seed(0)
    kernel, padding, dilation, more = 3, 1, 2, stride - 1
    x, outputs = torch.randint(-127, 128, (2, 6, 5, 6)).float(), 12 if groups < 6 else 6
    x[:, 0, 0, 0] = 127  # the sample's scale is exactly 1
    weight = torch.randint(-127, 128, (6, outputs // groups, kernel, kernel), dtype=torch.int8)
    expected = F.conv_transpose2d(
        x, weight.float(), None, stride, padding, output_padding=more, groups=groups, dilation=dilation
    )
    direct = weight.reshape(groups, 6 // groups, outputs // groups, kernel, kernel).transpose(1, 2).flip(3, 4)
    rows = direct.reshape(outputs, -1).contiguous()
    edge = dilation * (kernel - 1) - padding
    packed = OPS.conv2d_int8_pack(rows, (kernel, kernel), groups)
    zero_sum = 128 * rows.sum(dim=1, dtype=torch.int32)
    y = OPS.conv2d_int8(
        x, packed, torch.ones(outputs), zero_sum, None, None, None, (kernel, kernel), (1, 1), (edge,) * 4,
        (dilation, dilation), groups, (stride, stride), (more, more), False,
    )  # fmt: skip
    assert torch.equal(y, expected)


def test_close_to_float_convolution() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 32, 14, 14), torch.randn(48, 32, 3, 3)
    scale = weight.abs().amax(dim=(1, 2, 3)) / 127
    codes = torch.round(weight / scale[:, None, None, None]).to(torch.int8).reshape(48, -1)
    packed, zero_sum = OPS.conv2d_int8_pack(codes, (3, 3), 1), 128 * codes.sum(dim=1, dtype=torch.int32)
    y = OPS.conv2d_int8(
        x, packed, scale, zero_sum, None, None, None, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1, (1, 1), (0, 0), False
    )
    expected = F.conv2d(x, weight, padding=1)
    assert (y - expected).norm() / expected.norm() < 0.015


def test_planned_call_is_the_same_call() -> None:
    for number, shape in enumerate(("asymmetric", "grouped odd", "depthwise long", "upsampled")):
        arguments = vary(SHAPES[shape], number).arguments()
        planned = OPS.conv2d_int8_planned(*arguments[:7], conv_plan(*arguments[7:]))
        assert torch.equal(planned, OPS.conv2d_int8(*arguments))
        assert torch.equal(
            kernels.OPS["conv2d_int8_planned"].reference(*arguments[:7], conv_plan(*arguments[7:])), planned
        )


@pytest.mark.filterwarnings("ignore")
def test_opcheck_accepts_the_convolution_ops() -> None:
    case = vary(SHAPES["grouped"], 1)
    arguments = case.arguments()
    torch.library.opcheck(OPS.conv2d_int8.default, arguments)
    torch.library.opcheck(OPS.conv2d_int8_planned.default, (*arguments[:7], conv_plan(*arguments[7:])))
    torch.library.opcheck(OPS.conv2d_int8_pack.default, (case.weight(), case.kernel, case.groups))
    inputs = case.channels // case.groups
    torch.library.opcheck(
        OPS.conv2d_int8_unpack.default, (arguments[1], case.outputs, inputs, case.kernel, case.groups)
    )
