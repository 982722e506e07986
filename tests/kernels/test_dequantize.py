"""dequantize_int8 and dequantize_int4: every tier gives the reference's bits."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.linear_cases import COLUMNS, DEPTHS, Tiers, assert_same, int4_arguments, int8_arguments, native


@pytest.mark.parametrize("depth", DEPTHS)
def test_every_size_gives_the_reference_bits(every_tier: Tiers, depth: int) -> None:
    for columns in COLUMNS:
        _, weight, scale, _, _ = int8_arguments(1, columns, depth)
        assert_same(every_tier, "dequantize_int8", weight, scale)
        for group in (32, 64, depth):
            for asymmetric in (False, True):
                _, packed, scales, zeros, _, _ = int4_arguments(1, columns, depth, group=group, asymmetric=asymmetric)
                assert_same(every_tier, "dequantize_int4", packed, scales, zeros, group, depth)


def test_threaded_and_empty_sizes(every_tier: Tiers) -> None:
    _, weight, scale, _, _ = int8_arguments(1, 1000, 300)
    assert_same(every_tier, "dequantize_int8", weight, scale)
    assert_same(every_tier, "dequantize_int8", weight[:0], scale[:0])
    assert_same(every_tier, "dequantize_int8", weight[:, :0], scale)
    _, packed, scales, zeros, _, _ = int4_arguments(1, 1000, 301, asymmetric=True)
    assert_same(every_tier, "dequantize_int4", packed, scales, zeros, 32, 301)
    assert_same(every_tier, "dequantize_int4", packed[:0], scales[:0], zeros[:0], 32, 301)


def test_subnormal_scales_are_exact(every_tier: Tiers) -> None:
    scale = torch.tensor([[6e-8], [3e-6], [65504.0]], dtype=torch.float16)
    packed = torch.randint(0, 256, (3, 16), dtype=torch.uint8)
    assert_same(every_tier, "dequantize_int4", packed, scale, None, 32, 32)


def test_wrong_arguments_raise() -> None:
    _, weight, scale, _, _ = int8_arguments(1, 6, 8)
    with pytest.raises(RuntimeError, match=r"scale must have shape \[6\], got \[5\]"):
        native("dequantize_int8", weight, scale[:5])
    _, packed, scales, _, _, _ = int4_arguments(1, 6, 64)
    with pytest.raises(RuntimeError, match="rows of 32 bytes cannot hold 60 columns"):
        native("dequantize_int4", packed, scales, None, 32, 60)
    with pytest.raises(RuntimeError, match="group must be even"):
        native("dequantize_int4", packed, scales, None, 33, 64)
    with pytest.raises(RuntimeError, match="scale must have shape"):
        native("dequantize_int4", packed, scales[:, :1], None, 32, 64)


def test_opcheck_passes() -> None:
    _, weight, scale, _, _ = int8_arguments(1, 6, 8)
    torch.library.opcheck(torch.ops.narrowcast.dequantize_int8.default, (weight, scale))
    _, packed, scales, zeros, _, _ = int4_arguments(1, 6, 40, asymmetric=True)
    torch.library.opcheck(torch.ops.narrowcast.dequantize_int4.default, (packed, scales, zeros, 32, 40))
