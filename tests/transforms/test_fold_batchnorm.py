"""Folding a BatchNorm changes no output beyond one rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from narrowcast.transforms import BatchNormStatistics, fold_batchnorm


def norm(channels: int, *, affine: bool = True) -> nn.BatchNorm2d:
    torch.manual_seed(0)
    module = nn.BatchNorm2d(channels, affine=affine, eps=1e-3).eval()
    module.running_mean.copy_(torch.randn(channels))
    module.running_var.copy_(torch.rand(channels) * 4 + 1e-4)
    if affine:
        with torch.no_grad():
            module.weight.copy_(torch.randn(channels))
            module.bias.copy_(torch.randn(channels))
    return module.requires_grad_(False)


def statistics(module: nn.BatchNorm2d) -> BatchNormStatistics:
    return BatchNormStatistics(module.running_mean, module.running_var, module.weight, module.bias, module.eps)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_folded_convolution_is_the_pair(bias: bool, affine: bool) -> None:
    after = norm(6, affine=affine)
    layer = nn.Conv2d(4, 6, 3, bias=bias).requires_grad_(False)
    x = torch.randn(2, 4, 8, 8)
    expected = after.double()(layer.double()(x.double()))
    after, layer = after.float(), layer.float()
    weight, offset = fold_batchnorm(layer.weight, layer.bias, statistics(after))
    got = torch.nn.functional.conv2d(x, weight, offset)
    torch.testing.assert_close(got, expected.float(), atol=1e-5, rtol=1e-5)
    assert weight.dtype == offset.dtype == torch.float32 and offset.shape == (6,)


def test_arguments_are_not_changed() -> None:
    after = norm(6)
    weight, bias = torch.randn(6, 4), torch.randn(6)
    copies = weight.clone(), bias.clone(), after.running_mean.clone()
    fold_batchnorm(weight, bias, statistics(after))
    assert (
        torch.equal(weight, copies[0]) and torch.equal(bias, copies[1]) and torch.equal(after.running_mean, copies[2])
    )


def test_rounding_happens_once() -> None:
    after = norm(6)
    weight = torch.randn(6, 4)
    folded, _ = fold_batchnorm(weight, None, statistics(after))
    factor = after.weight.double() / (after.running_var.double() + after.eps).sqrt()
    assert torch.equal(folded, (weight.double() * factor[:, None]).float())


def test_half_precision_stays_half_precision() -> None:
    weight, bias = fold_batchnorm(torch.randn(6, 4).bfloat16(), None, statistics(norm(6)))
    assert weight.dtype == bias.dtype == torch.bfloat16
