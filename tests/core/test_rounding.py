"""Rounding that gradients pass: the codes of `quantize`, and the gradients of the papers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from narrowcast.core import (
    QuantSpec,
    block_range,
    choose_scale,
    fake_quantize,
    nearest_scale,
    quantize,
    round_scale,
    through,
    to_blocks,
)

SPECS = (
    "int8/channel", "int4/channel/asym", "int4/group8/asym", "int3/group8", "int2/tensor", "uint4/tensor",
    "int4/block4x4", "nf4/group8", "fp4_e2m1/channel", "fp8_e4m3/channel", "int4/group8/scale:int8",
    "int4/group32/asym/scale:k6",
)  # fmt: skip


def _problem(text: str, seed: int) -> tuple[QuantSpec, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """A matrix with a range that clips some of its values."""
    spec = QuantSpec.parse(text)
    matrix = torch.randn(6, 20, generator=torch.Generator().manual_seed(seed))
    low, high = block_range(to_blocks(matrix, spec.granularity))
    scale, zero = choose_scale(low * 0.7, high * 0.7, spec)
    return spec, matrix, scale, zero


@pytest.mark.parametrize("text", SPECS)
@given(seed=st.integers(0, 1000))
def test_the_codes_are_those_of_quantize_bit_for_bit(text: str, seed: int) -> None:
    spec, matrix, scale, zero = _problem(text, seed)
    values = fake_quantize(matrix, scale, None if zero is None else zero.float(), spec)
    assert torch.equal(values, quantize(matrix, spec, scale, zero).dequantize())


@pytest.mark.parametrize("text", ["int4/channel", "int8/channel", "int2/channel"])
@given(seed=st.integers(0, 1000))
def test_gradients_are_those_of_torchs_learnable_fake_quantization(text: str, seed: int) -> None:
    spec, matrix, scale, _ = _problem(text, seed)
    weight, learned = matrix.clone().requires_grad_(), scale.clone().requires_grad_()
    upstream = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(seed + 1))
    fake_quantize(weight, learned, None, spec).backward(upstream)
    theirs, their_scale = matrix.clone().requires_grad_(), scale.flatten().clone().requires_grad_()
    zeros = torch.zeros_like(their_scale, requires_grad=True)
    out = torch._fake_quantize_learnable_per_channel_affine(
        theirs, their_scale, zeros, 0, spec.code_low, spec.code_high, 1.0
    )
    out.backward(upstream)
    torch.testing.assert_close(weight.grad, theirs.grad)
    torch.testing.assert_close(learned.grad.flatten(), their_scale.grad, rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 1000))
def test_zero_points_get_a_gradient_from_clipped_values_alone(seed: int) -> None:
    spec, matrix, scale, zero = _problem("int4/channel/asym", seed)
    assert zero is not None
    shift = zero.float().requires_grad_()
    fake_quantize(matrix, scale, shift, spec).sum().backward()
    record = quantize(matrix, spec, scale, zero)
    unclamped = (matrix / scale).round() + zero
    clipped = (unclamped != record.codes).float().sum(1, keepdim=True)
    torch.testing.assert_close(shift.grad, -clipped * scale)


def test_scales_round_to_their_format_and_gradients_pass() -> None:
    spec = QuantSpec.parse("int4/group8")  # scales in float16
    scale = torch.tensor([[0.1, 3e-6], [1.0, 7.7]], requires_grad=True)
    rounded = through(scale, spec)
    assert torch.equal(rounded, round_scale(scale.detach(), spec))
    rounded.sum().backward()
    assert torch.equal(scale.grad, torch.ones(2, 2))


def test_an_unchecked_scale_that_does_not_fit_stays_visible() -> None:
    spec = QuantSpec.parse("int4/group8")
    scale = nearest_scale(torch.tensor([[1e6, float("nan")]]), spec)
    assert torch.isinf(scale[0, 0]) and torch.isnan(scale[0, 1])


@pytest.mark.parametrize("text", ["int8/channel", "int4/group32", "int4/group32/asym", "int4/block4x4", "nf4/group8"])
def test_a_weight_of_many_pieces_is_rounded_as_its_rows_are(text: str) -> None:
    spec, generator = QuantSpec.parse(text), torch.Generator().manual_seed(0)
    matrix = torch.randn(1024, 320, generator=generator).requires_grad_()  # 2.5 pieces
    scale, zero = choose_scale(*block_range(to_blocks(matrix.detach(), spec.granularity)), spec)
    scale = (0.7 * scale).requires_grad_()
    zero = None if zero is None else zero.float()
    upstream = torch.randn(1024, 320, generator=generator)
    whole = fake_quantize(matrix, scale, zero, spec)
    found = torch.autograd.grad((whole * upstream).sum(), (matrix, scale))
    per_row = scale.shape[0] // 128  # block rows in 8 rows of the matrix
    rows, taken = [slice(start, start + 8) for start in range(0, 1024, 8)], []
    for index, part in enumerate(rows):
        blocks = slice(index * per_row, (index + 1) * per_row)
        some, its_scale = matrix[part].detach().requires_grad_(), scale[blocks].detach().requires_grad_()
        values = fake_quantize(some, its_scale, None if zero is None else zero[blocks], spec)
        assert torch.equal(values, whole[part])
        taken.append(torch.autograd.grad((values * upstream[part]).sum(), (some, its_scale)))
    assert torch.equal(found[0], torch.cat([part[0] for part in taken]))
    torch.testing.assert_close(found[1], torch.cat([part[1] for part in taken]), rtol=1e-5, atol=1e-5)
