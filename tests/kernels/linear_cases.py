"""Random arguments of the linear ops, shared by the linear tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from narrowcast import kernels

Tiers = Callable[[], Iterator[str]]
"""The fixture every_tier: switches through the instruction-set tiers."""

ROWS = (0, 1, 2, 3, 5, 17)
COLUMNS = (1, 3, 15, 17, 64, 100)
DEPTHS = (1, 2, 31, 32, 33, 64, 100, 172, 384, 385)


def generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(value * 1009**index for index, value in enumerate(seed)))


def int8_arguments(rows: int, columns: int, depth: int, *, bias: bool = True) -> tuple[Tensor | None, ...]:
    """(x, weight, scale, weight_sum, bias) with a wide spread of row magnitudes."""
    random = generator(rows, columns, depth)
    x = torch.randn(rows, depth, generator=random) * torch.logspace(-3, 3, max(rows, 1))[:rows, None]
    weight = torch.randint(-127, 128, (columns, depth), dtype=torch.int8, generator=random)
    scale = torch.rand(columns, generator=random) + 0.01
    weight_sum = weight.sum(dim=1, dtype=torch.int32)
    return x, weight, scale, weight_sum, torch.randn(columns, generator=random) if bias else None


def static_arguments(
    arguments: tuple[Tensor | None, ...], step: float, zero_point: int, *, per_channel: bool = False
) -> tuple[Tensor | None, ...]:
    """What linear_int8_static wants in place of int8_arguments; per channel, steps and zero points vary."""
    x, weight, scale, _, bias = arguments
    count = weight.shape[1] if per_channel else 1
    random = generator(count, zero_point)
    inverse = 1.0 / (step * torch.logspace(-1, 1, count, base=4.0) if per_channel else torch.tensor([step]))
    zeros = torch.full((count,), zero_point, dtype=torch.int32)
    if per_channel:
        zeros = torch.randint(0, 256, (count,), dtype=torch.int32, generator=random)
        zeros[:2] = torch.tensor([0, 255])[:count]
    zero_sum = (zeros * weight.to(torch.int32)).sum(dim=1, dtype=torch.int32)
    return x, weight, scale * step, zero_sum, bias, inverse, zeros


def native(name: str, *arguments: object) -> Tensor:
    return getattr(torch.ops.narrowcast, name)(*arguments)


def reference(name: str, *arguments: object) -> Tensor:
    return kernels.OPS[name].reference(*arguments)


def assert_equal(got: Tensor, expected: Tensor, tier: str) -> None:
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert torch.equal(got, expected), f"{tier}: off by {(got.float() - expected.float()).abs().max()}"


def assert_same(tiers: Tiers, name: str, *arguments: object) -> None:
    """The native body of every tier gives the reference's bits, shape and dtype."""
    expected = reference(name, *arguments)
    for tier in tiers():
        assert_equal(native(name, *arguments), expected, tier)
