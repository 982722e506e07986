"""Rounded inputs in training: piece by piece, in memory that the next product uses again."""

from __future__ import annotations

import pytest
import torch

from narrowcast.kernels.reference import quantize_rows, quantize_rows_asymmetric
from narrowcast.nn.trained_inputs import Rounding, product, rounded


def test_many_pieces_of_rows_have_the_codes_of_the_reference_bit_for_bit() -> None:
    x = torch.randn(900, 512, generator=torch.Generator().manual_seed(0))
    x[3], x[4, 7] = 0.0, 1e30
    codes, scale = quantize_rows(x)
    values = rounded(x, Rounding("dynamic"), None)
    assert torch.equal(values, codes.float() * scale.view(-1, 1))
    codes, scale, zero = quantize_rows_asymmetric(x)
    values = rounded(x, Rounding("asymmetric"), None)
    assert torch.equal(values, (codes.float() - zero.view(-1, 1).float()) * scale.view(-1, 1))


def test_no_product_of_a_row_with_its_own_range_leaves_the_codes() -> None:
    largest = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)) * 10 + 1e-3
    codes, _ = quantize_rows(largest.view(-1, 1))
    values = rounded(largest.view(-1, 1), Rounding("dynamic"), None)
    assert int(codes.max()) == 127
    assert torch.equal(values, codes.float() * (largest.view(-1, 1) / 127.0))


@pytest.mark.parametrize("mode", ["dynamic", "asymmetric"])
def test_gradients_of_two_products_before_one_backward_pass_do_not_mix(mode: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(64, 48, generator=generator).requires_grad_() for _ in range(2)]
    weights = [torch.randn(16, 48, generator=generator).requires_grad_() for _ in range(2)]
    how = Rounding(mode)
    loss = sum(product(x, w, None, how, None, None).sum() for x, w in zip(inputs, weights, strict=True))
    torch.autograd.backward(loss)
    for x, w in zip(inputs, weights, strict=True):
        assert w.grad is not None
        torch.testing.assert_close(w.grad, rounded(x.detach(), how, None).sum(0).expand(16, -1))


def test_training_goes_on_after_a_pass_in_inference_mode() -> None:
    x, weight = torch.randn(8, 4096), torch.randn(4, 4096).requires_grad_()
    with torch.inference_mode():
        product(torch.randn(8, 5000), torch.randn(4, 5000), None, Rounding("dynamic"), None, None)
    product(x, weight, None, Rounding("dynamic"), None, None).sum().backward()
    assert weight.grad is not None
