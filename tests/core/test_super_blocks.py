"""Super-blocks: 6-bit scales and zero points under one float16 number, exact in both directions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.core import (
    QuantizedTensor,
    QuantSpec,
    choose_scale,
    expand_to_matrix,
    quantize,
    round_scale,
    round_zero_point,
    split_super_scale,
    spread_super_scale,
)
from narrowcast.errors import FormatError

SPEC = QuantSpec.parse("int4/group32/asym/scale:k6")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 1000), st.integers(1, 40), st.sampled_from([16, 32, 64, 128]), st.integers(-20, 10))
def test_multiples_of_a_float16_number_come_back_bit_for_bit(seed: int, blocks: int, size: int, power: int) -> None:
    spec = QuantSpec.parse(f"int4/group{size}/scale:k6")
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1, 64, (3, blocks), generator=generator).float()
    outer = (torch.rand(3, -(-blocks // spec.blocks_in_super), generator=generator) + 0.1) * 2.0**power
    scale = codes * spread_super_scale(outer.half().float(), spec, blocks)
    found, shared = split_super_scale(scale, spec)
    assert torch.equal(found.float() * spread_super_scale(shared, spec, blocks), scale)
    assert torch.equal(shared.half().float(), shared)
    assert torch.equal(round_scale(scale, spec), scale)


def test_other_scales_are_the_nearest_multiples_and_the_largest_of_256_columns_has_code_63() -> None:
    spec = QuantSpec.parse("int4/group16/scale:k6")
    scale = torch.rand(5, 40, generator=torch.Generator().manual_seed(0)) + 0.01
    codes, outer = split_super_scale(round_scale(scale, spec), spec)
    assert codes.dtype == torch.uint8
    assert outer.shape == (5, 3)
    assert [part.amax(1).tolist() for part in codes.split(16, 1)] == [[63] * 5] * 3
    spread = spread_super_scale(outer, spec, 40)
    assert bool(((round_scale(scale, spec) - scale).abs() <= 0.51 * spread + scale * 2.0**-11).all())


def test_zero_points_are_a_64th_of_the_codes_apart_and_never_minus_zero() -> None:
    for bits, step in ((2, 1 / 16), (3, 1 / 8), (4, 1 / 4), (5, 1 / 2), (6, 1)):
        spec = QuantSpec.parse(f"int{bits}/group32/asym/scale:k6")
        assert spec.zero_step == step
        zeros = round_zero_point(torch.linspace(-40, 40, 4001), spec).float()
        assert float(zeros.min()) == spec.code_low
        assert float(zeros.max()) == spec.zero_high == spec.code_low + 63 * step
        assert len(zeros.unique()) == 64
        assert not bool((zeros.eq(0) & zeros.signbit()).any())


@given(st.integers(0, 1000), st.sampled_from([2, 3, 4, 5, 6]), st.integers(1, 300))
def test_what_is_stored_is_exact_in_float32(seed: int, bits: int, columns: int) -> None:
    record = quantize(noise(3, columns, seed=seed), QuantSpec.parse(f"int{bits}/group32/asym/scale:k6"))
    assert record.scale is not None
    assert record.zero_point is not None
    shape = record.shape
    scale, zero = (
        expand_to_matrix(p, record.spec.granularity, shape).double() for p in (record.scale, record.zero_point)
    )
    assert torch.equal(record.dequantize().double(), scale * (record.codes.double() - zero))
    assert quantize(record.dequantize(), record.spec, record.scale, record.zero_point) == record


@given(st.integers(0, 1000))
def test_a_zero_point_between_codes_brings_both_ends_of_a_block_within_a_step(seed: int) -> None:
    weight = noise(4, 64, seed=seed) + 0.3
    record = quantize(weight, SPEC)
    assert record.scale is not None
    step = expand_to_matrix(record.scale, SPEC.granularity, record.shape)
    assert bool(((record.dequantize() - weight).abs() <= 1.2 * step).all())


def test_a_block_of_zeros_is_exact_and_takes_no_bits_from_its_neighbours() -> None:
    weight = noise(2, 256)
    alone = quantize(weight, SPEC).dequantize()
    weight[:, 64:96] = 0
    record = quantize(weight, SPEC).dequantize()
    assert not bool(record[:, 64:96].any())
    assert float((record - weight).abs().max()) <= float((alone[:, 96:] - weight[:, 96:]).abs().max()) * 1.5


def test_a_scale_or_a_zero_point_that_cannot_be_stored_is_refused() -> None:
    weight = noise(1, 64)
    scale, zero = choose_scale(torch.tensor([[-1.0, -2.0]]), torch.tensor([[1.0, 2.0]]), SPEC)
    assert zero is not None
    quantize(weight, SPEC, scale, zero)
    with pytest.raises(FormatError, match=r"is not a positive k6 number; pass it through round_scale"):
        quantize(weight, SPEC, torch.tensor([[0.1, 0.2]]), zero)
    with pytest.raises(FormatError, match=r"a zero point is no multiple of 0\.25; use round_zero_point"):
        quantize(weight, SPEC, scale, zero + 0.1)
    with pytest.raises(FormatError, match=r"a zero point is outside the codes -8\.\.7\.75"):
        quantize(weight, SPEC, scale, torch.full_like(zero, 8.0))
    with pytest.raises(FormatError, match=r"has torch\.float32 zero points of shape"):
        QuantizedTensor(quantize(weight, SPEC).codes, scale, zero.to(torch.int32), SPEC)


def oracle() -> Any:
    return pytest.importorskip("gguf", reason="gguf is not installed; it is the oracle of super-blocks")


def test_symmetric_6_bit_groups_of_16_are_the_numbers_of_q6_k() -> None:
    gguf = oracle()
    record = quantize(noise(4, 512) ** 3, QuantSpec.parse("int6/group16/scale:k6"))
    assert record.scale is not None
    codes, outer = (part.numpy() for part in split_super_scale(record.scale, record.spec))
    fields = (record.codes.numpy().astype(np.int16) + 32).astype(np.uint8).reshape(4, 2, 2, 4, 32)
    low, high = fields & 15, fields >> 4
    nibbles = np.stack([low[..., 0, :] | low[..., 2, :] << 4, low[..., 1, :] | low[..., 3, :] << 4], -2)
    upper = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    parts = [nibbles.reshape(4, 2, 128), upper.reshape(4, 2, 64), codes.reshape(4, 2, 16)]
    blocks = np.concatenate([*parts, outer.astype(np.float16)[..., None].view(np.uint8)], -1)
    decoded = gguf.quants.dequantize(blocks.reshape(4, 2 * 210), gguf.GGMLQuantizationType.Q6_K)
    assert np.array_equal(decoded, record.dequantize().numpy())


def test_4_bit_groups_of_32_are_the_numbers_of_q4_k_where_its_minimum_is_a_zero_point() -> None:
    gguf = oracle()
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(1, 64, (4, 8), generator=generator)
    units = torch.tensor([[30], [7], [0], [63]])  # quarters of a code, the same in a whole super-block
    outer = torch.tensor([[0.25], [0.5], [2.0**-9], [8.0]])  # so that the minimum's float16 scale is exact
    values = torch.randint(-8, 8, (4, 256), generator=generator, dtype=torch.int8)
    zero = (units / 4 - 8).expand(4, 8).contiguous()
    record = QuantizedTensor(values, codes * outer, zero, SPEC)
    fields = (values + 8).to(torch.uint8).numpy().reshape(4, 4, 2, 32)
    packed = (fields[:, :, 0] | fields[:, :, 1] << 4).reshape(4, 128)
    s = codes.numpy().astype(np.uint8)  # scales and minimums share their codes
    first = s[:, :4] | s[:, 4:] >> 4 << 6
    scales = np.concatenate([first, first, s[:, 4:] & 15 | (s[:, 4:] & 15) << 4], 1)
    halves = torch.cat([outer, outer * units / 4], 1).numpy().astype(np.float16).view(np.uint8)
    blocks = np.concatenate([halves, scales, packed], 1)
    decoded = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_K)
    assert np.array_equal(decoded, record.dequantize().numpy())
