"""Fused activation functions: as exact as float32 allows, the same bits on every tier, in all linear ops."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.polynomial import Chebyshev, Polynomial
from scipy.special import ndtr
from tests.kernels.linear_cases import Tiers, assert_equal, int8_arguments, native, reference, static_arguments
from tests.kernels.lowbit_cases import lowbit_arguments
from torch import Tensor

from narrowcast.kernels.reference_linear import FUSED

EDGES = (0.0, -0.0, 1e-42, -1e-42, 1e-20, -1e-20, 87.0, -87.0, 88.5, -88.5, 104.0, -104.0, 1e4, -1e4, 1e38, -1e38)


def through_the_kernel(values: Tensor, fused: str) -> Tensor:
    """fused(values) in float32: the values are the bias of a layer whose weights are zero."""
    count = values.numel()
    weight, scale = torch.zeros(count, 4, dtype=torch.int8), torch.ones(count)
    zero = torch.zeros(count, dtype=torch.int32)
    return native("linear_int8_dynamic", torch.ones(1, 4), weight, scale, zero, values, True, fused)[0]


@pytest.mark.parametrize("fused", sorted(FUSED))
def test_every_range_is_accurate_and_the_same_on_every_tier(every_tier: Tiers, fused: str) -> None:
    positive = torch.logspace(-30, 38, 20_000)
    values = torch.cat([torch.linspace(-12, 12, 100_003), torch.linspace(-120, 120, 50_001), torch.tensor(EDGES)])
    values = torch.cat([values, positive, -positive])
    expected = FUSED[fused](values.double())
    first = None
    for tier in every_tier():
        got = through_the_kernel(values, fused)
        excess = (got.double() - expected).abs() - (2e-7 + 1e-6 * expected.abs())
        assert excess.max() <= 0, f"{tier}: {values[excess.argmax()]} is off by {excess.max()}"
        first = got if first is None else first
        assert_equal(got, first, tier)


@pytest.mark.parametrize("fused", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_linear_op_applies_it(every_tier: Tiers, fused: str, dtype: torch.dtype) -> None:
    for rows, columns in ((1, 33), (9, 70)):
        x, *int8 = int8_arguments(rows, columns, 100)
        static = static_arguments((x, *int8), 0.05, 7)
        lowbit = lowbit_arguments(rows, columns, 100, "int3", asymmetric=True, fused=fused)
        for name, arguments in (
            ("linear_int8_dynamic", (x.to(dtype), *int8, False, fused)),
            ("linear_int8_static", (x.to(dtype), *static[1:], fused)),
            ("linear_lowbit_dynamic", (lowbit[0].to(dtype), *lowbit[1:])),
        ):
            expected = reference(name, *arguments)
            step = {torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
            for _ in every_tier():
                # torch's own gelu in float32 is 8e-7 off where 1 + erf cancels
                torch.testing.assert_close(native(name, *arguments), expected, atol=1.5e-6, rtol=step)


def test_an_unknown_function_raises() -> None:
    arguments = int8_arguments(2, 6, 64)
    for body in (native, reference):
        with pytest.raises(RuntimeError, match="fused 'tanh' is not known"):
            body("linear_int8_dynamic", *arguments, True, "tanh")


def test_the_table_of_the_normal_tail_is_what_its_comment_says() -> None:
    text = (Path(__file__).parents[2] / "csrc" / "gelu_table.h").read_text()
    numbers = re.findall(r"-?\d\.\d+(?:e-\d+)?(?=f[,}])", text[text.index("kNormalTail[6]") :])
    table = np.array([float(number) for number in numbers], dtype=np.float32).reshape(6, 16)
    width = 6.0 / 16
    for piece in range(16):
        middle = width * (piece + 0.5)
        chebyshev = Chebyshev.interpolate(lambda u, m=middle: ndtr(-(m + width * u)), 5, [-0.5, 0.5])
        power = chebyshev.convert(kind=Polynomial, domain=[-1, 1]).coef
        np.testing.assert_allclose(table[:, piece], power, rtol=1e-5, atol=1e-11)
        u = np.linspace(-0.5, 0.5, 1001)
        a = middle + width * u
        assert np.abs(a * (np.polyval(table[::-1, piece].astype(np.float64), u) - ndtr(-a))).max() < 3e-8
