"""dequantize_weight: every format on every tier gives the bits of `core`."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tests.kernels.stored_cases import SPECS, stored_weight

from narrowcast.kernels.reference_weight_only import dequantize_weight

Tiers = Callable[[], Iterator[str]]
OPS = torch.ops.narrowcast


@pytest.mark.parametrize("spec", SPECS)
def test_every_size_gives_the_bits_of_core(every_tier: Tiers, spec: str) -> None:
    for rows, columns in ((1, 1), (3, 7), (5, 32), (4, 129), (2, 600), (300, 301)):
        arguments, table = stored_weight(spec, rows, columns)
        assert torch.equal(dequantize_weight(*arguments, columns), table)
        for tier in every_tier():
            assert torch.equal(OPS.dequantize_weight(*arguments, columns), table), (tier, columns)


def test_empty_and_strided_weights(every_tier: Tiers) -> None:
    (codes, scale, zero_point, _, bits, group), table = stored_weight("int4/group32/asym", 6, 64)
    assert zero_point is not None
    for _ in every_tier():
        assert OPS.dequantize_weight(codes[:0], scale[:0], zero_point[:0], None, bits, group, 64).shape == (0, 64)
        assert OPS.dequantize_weight(codes[:, :0], scale[:, :0], zero_point[:, :0], None, bits, group, 0).numel() == 0
        every_second = OPS.dequantize_weight(codes[::2], scale[::2], zero_point[::2], None, bits, group, 64)
        assert torch.equal(every_second, table[::2])


def test_subnormal_and_extreme_scales_are_exact(every_tier: Tiers) -> None:
    halves = torch.tensor([[6e-8], [3e-6], [65504.0]], dtype=torch.float16)
    powers = torch.tensor([[0], [1], [254]], dtype=torch.uint8)
    codes = torch.randint(0, 256, (3, 16), dtype=torch.uint8)
    for scale in (halves, powers):
        expected = dequantize_weight(codes, scale, None, None, 4, 32, 32)
        for tier in every_tier():
            assert torch.equal(OPS.dequantize_weight(codes, scale, None, None, 4, 32, 32), expected), tier


def test_wrong_arguments_raise() -> None:
    (codes, scale, zero_point, levels, bits, group), _ = stored_weight("nf4/group32", 6, 64)
    assert levels is not None
    op = OPS.dequantize_weight
    with pytest.raises(RuntimeError, match="rows of 32 bytes cannot hold 60 codes"):
        op(codes, scale, zero_point, levels, bits, group, 60)
    with pytest.raises(RuntimeError, match=r"scale must have shape \[6, 4\]"):
        op(codes, scale, zero_point, levels, bits, 16, 64)
    with pytest.raises(RuntimeError, match="group must be positive"):
        op(codes, scale, zero_point, levels, bits, 0, 64)
    with pytest.raises(RuntimeError, match=r"bits must be 2\.\.6 or 8"):
        op(codes, scale, zero_point, levels, 7, group, 64)
    with pytest.raises(RuntimeError, match="codes must be uint8"):
        op(codes.view(torch.int8), scale, zero_point, levels, bits, group, 64)
    with pytest.raises(RuntimeError, match="scale must be float32, float16 or uint8"):
        op(codes, scale.double(), zero_point, levels, bits, group, 64)
    with pytest.raises(RuntimeError, match="levels must have shape"):
        op(codes, scale, zero_point, levels[:8], bits, group, 64)
    with pytest.raises(RuntimeError, match="levels have no zero points"):
        op(codes, scale, torch.zeros(6, 2, dtype=torch.uint8), levels, bits, group, 64)


def test_opcheck_passes() -> None:
    for spec in ("int8", "int4/group32/asym", "nf4/group64"):
        arguments, _ = stored_weight(spec, 6, 72)
        torch.library.opcheck(OPS.dequantize_weight.default, (*arguments, 72))
