"""conv2d_int8 answers wrong arguments and non-finite values with an error that names them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.kernels.conv_cases import SHAPES, ConvCase

OPS = torch.ops.narrowcast

ARGUMENTS = (
    "x", "packed", "scale", "zero_sum", "bias", "input_inverse", "input_zero_point", "kernel_size", "stride",
    "padding", "dilation", "groups", "upsample", "output_padding", "channels_last",
)  # fmt: skip

WRONG = {
    "x with three dimensions": ("x", torch.zeros(8, 7, 9), "4 dimensions"),
    "x of integers": ("x", torch.zeros(2, 8, 7, 9, dtype=torch.int32), "x must be float32"),
    "x with other channels": ("x", torch.zeros(2, 9, 7, 9), "packed has"),
    "x smaller than the kernel": ("x", torch.zeros(2, 8, 0, 9), "no pixels"),
    "packed of floats": ("packed", torch.zeros(10), "packed must be int8"),
    "packed too short": ("packed", torch.zeros(10, dtype=torch.int8), "packed has 10 bytes"),
    "scale of doubles": ("scale", torch.ones(17, dtype=torch.float64), "scale must be float32"),
    "sums of other length": ("zero_sum", torch.zeros(16, dtype=torch.int32), "zero_sum"),
    "bias of other length": ("bias", torch.zeros(3), "bias"),
    "no input inverse": ("input_inverse", torch.zeros(0), "1 or 8 entries, got 0"),
    "input inverses of other length": ("input_inverse", torch.ones(7), "1 or 8 entries, got 7"),
    "negative input inverse": ("input_inverse", torch.tensor([-1.0]), "input_inverse must be positive"),
    "NaN input inverse": ("input_inverse", torch.tensor([float("nan")]), "input_inverse must be positive"),
    "input inverse without zero point": ("input_zero_point", None, "together"),
    "zero point out of range": ("input_zero_point", torch.tensor([256], dtype=torch.int32), "0..255"),
    "zero points of other length": ("input_zero_point", torch.zeros(8, dtype=torch.int32), "input_zero_point"),
    "zero point of other type": ("input_zero_point", torch.zeros(1), "input_zero_point must be int32"),
    "kernel with one entry": ("kernel_size", [3], "kernel_size must have 2"),
    "kernel of zero": ("kernel_size", [0, 3], "kernel_size holds 0"),
    "stride of zero": ("stride", [1, 0], "stride holds 0"),
    "padding with two entries": ("padding", [1, 1], "padding must have 4"),
    "negative padding": ("padding", [1, 1, 1, -1], "padding holds -1"),
    "dilation too large": ("dilation", [9, 1], "smaller than the kernel"),
    "no groups": ("groups", 0, "groups holds 0"),
    "groups that do not divide": ("groups", 3, "do not divide"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_argument_is_an_error(what: str) -> None:
    name, value, message = WRONG[what]
    arguments = dict(zip(ARGUMENTS, ConvCase().arguments(), strict=True))
    arguments[name] = value
    with pytest.raises(RuntimeError, match=message):
        OPS.conv2d_int8(*arguments.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("zero_point", [None, 7])
@pytest.mark.parametrize("shape", ["square", "depthwise", "pointwise"])
def test_non_finite_value_is_named(
    shape: str, zero_point: int | None, per_channel: bool, value: float, tier: str
) -> None:
    case = replace(SHAPES[shape], zero_point=zero_point, per_channel=per_channel)
    x = case.x()
    x[1, 3, 2, 5] = value
    x[1, 4, 0, 0] = value
    with pytest.raises(RuntimeError, match=r"Non-finite value in x at \[1, 3, 2, 5\]"):
        OPS.conv2d_int8(*case.arguments(x))


def test_wrong_weights_do_not_pack() -> None:
    with pytest.raises(RuntimeError, match="does not fit"):
        OPS.conv2d_int8_pack(torch.zeros(4, 10, dtype=torch.int8), [3, 3], 1)
    with pytest.raises(RuntimeError, match="do not divide"):
        OPS.conv2d_int8_pack(torch.zeros(4, 9, dtype=torch.int8), [3, 3], 3)
    with pytest.raises(RuntimeError, match="must be int8"):
        OPS.conv2d_int8_pack(torch.zeros(4, 9), [3, 3], 1)
    with pytest.raises(RuntimeError, match="expected"):
        OPS.conv2d_int8_unpack(torch.zeros(10, dtype=torch.int8), 4, 1, [3, 3], 1)
