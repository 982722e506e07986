"""The range search in super-blocks: never worse than the full range, better than 16-bit scales at fewer bits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.core import QuantSpec, quantize, split_super_scale, to_blocks
from narrowcast.methods import Gptq, Rtn, Seen

SPECS = (
    "int4/group32/asym/scale:k6", "int3/group16/asym/scale:k6", "int2/group32/asym/scale:k6", "int4/group16/scale:k6",
    "nf4/group32/scale:k6",
)  # fmt: skip


def noise(seed: int, rows: int = 8, columns: int = 300) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) ** 3


def error(weight: Tensor, text: str, importance: Tensor | None = None) -> float:
    stored = Rtn().quantize(weight, QuantSpec.parse(text), Seen(importance=importance)).dequantize()
    return float(((stored - weight).square() * (1 if importance is None else importance)).sum())


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("weighted", [True, False])
@settings(max_examples=4, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000))
def test_no_super_block_is_worse_than_under_its_full_range(text: str, weighted: bool, seed: int) -> None:
    weight, spec = noise(seed), QuantSpec.parse(text)
    importance = torch.rand(300, generator=torch.Generator().manual_seed(seed)) + 0.01 if weighted else None
    plain, found = quantize(weight, spec), Rtn().quantize(weight, spec, Seen(importance=importance))
    factors = torch.ones(300) if importance is None else importance
    errors = [
        torch.stack([part.sum(1) for part in ((r.dequantize() - weight).square() * factors).split(256, 1)])
        for r in (plain, found)
    ]
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_6_bit_scales_and_zero_points_lose_less_than_float16_scales_with_whole_zero_points(bits: int) -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(bits))
    spec, plain = (QuantSpec.parse(f"int{bits}/group32/asym{end}") for end in ("/scale:k6", ""))
    assert spec.bits_per_value((64, 512)) < plain.bits_per_value((64, 512)) - 0.3
    assert error(weight, str(spec)) < 0.95 * error(weight, str(plain))


def test_the_search_is_weighted_by_the_importance_of_the_inputs() -> None:
    weight, importance = noise(1), torch.ones(300)
    importance[::16] = 300
    text = "int3/group32/asym/scale:k6"
    stored = Rtn().quantize(weight, QuantSpec.parse(text)).dequantize()
    assert error(weight, text, importance) < 0.8 * float(((stored - weight).square() * importance).sum())


def test_zeros_that_fill_up_the_last_group_do_not_move_its_zero_point() -> None:
    weight = torch.rand(16, 40, generator=torch.Generator().manual_seed(0)) + 3
    spec = QuantSpec.parse("int4/group32/asym/scale:k6")
    alone = Rtn().quantize(weight[:, 32:].contiguous(), spec).dequantize()
    together = Rtn().quantize(weight, spec).dequantize()[:, 32:]
    assert float((together - weight[:, 32:]).square().sum()) < 2 * float((alone - weight[:, 32:]).square().sum())


@pytest.mark.parametrize("text", ["int4/group32/scale:k6", "int4/group32/asym/scale:k6"])
@pytest.mark.parametrize("largest", [2.8e7, 1e-6])
def test_the_ends_of_float16_are_no_ends_of_the_search(text: str, largest: float) -> None:
    weight = torch.rand(4, 64, generator=torch.Generator().manual_seed(0)) - 0.5
    weight = weight / weight.abs().max() * largest
    found = Rtn().quantize(weight, QuantSpec.parse(text)).dequantize()
    assert float((found - weight).norm() / weight.norm()) < 0.1


@pytest.mark.parametrize("text", SPECS)
def test_gptq_keeps_scales_that_the_format_can_store(text: str) -> None:
    weight, spec = noise(2), QuantSpec.parse(text)
    inputs = torch.randn(500, 300, generator=torch.Generator().manual_seed(3)).cumsum(1)
    record = Gptq().quantize(weight, spec, Seen(hessian=inputs.t() @ inputs / 500, samples=500))
    assert record.scale is not None
    codes, outer = split_super_scale(record.scale, spec)
    spread = outer.repeat_interleave(spec.blocks_in_super, 1)[:, : codes.shape[1]]
    assert torch.equal(codes.float() * spread, record.scale)
    blocks = to_blocks(record.dequantize(), spec.granularity)
    assert blocks.shape[:2] == record.scale.shape
