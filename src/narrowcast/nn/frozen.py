"""A quantized linear layer that gradients pass: it runs its own kernel, and keeps no float copy of its weight.

The gradient of the input goes through the weight dequantized for the moment, and straight through the rounding of the
input; outside of a static range it is 0.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from narrowcast.core import QuantizedTensor
from narrowcast.kernels.reference_linear import FUSED
from narrowcast.nn.linear import QuantizedLinear
from narrowcast.nn.trained_inputs import Rounding, StaticRange, unclamped_codes


class FrozenLinear(nn.Module):
    """A quantized linear layer that gradients pass: it computes what the layer computes, and nothing in it trains.

    Args:
        path: name of the layer in its model, for errors.
        base: the quantized layer; it becomes a part of this one, and its activation function is applied here.
    """

    base: QuantizedLinear

    def __init__(self, path: str, base: QuantizedLinear) -> None:
        super().__init__()
        self.path, self.fused = path, base.fused
        base.fused = "none"
        self.base = base
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> Tensor:
        """The frozen float32 weight [out_features, in_features], computed at every access."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in the dtype of `x` or of autocast."""
        return FUSED[self.fused](self.frozen_product(x))

    def frozen_product(self, x: Tensor) -> Tensor:
        """What the base gives, differentiable in `x`."""
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        if not (torch.is_grad_enabled() and x.requires_grad):
            with torch.no_grad():
                y: Tensor = self.base(x)
            return y
        return _frozen_product(x, self.base)

    def quantized(self) -> QuantizedLinear:
        """The layer without the adapter, its activation function back in it; it shares the base's tensors."""
        base = self.base
        if type(base) is not QuantizedLinear:
            base.fused = self.fused
            return base
        return self.with_record(base.quantized_weights()["weight"])

    def with_record(self, record: QuantizedTensor) -> QuantizedLinear:
        """The layer with another weight."""
        base = self.base
        made = QuantizedLinear(
            record.spec, record.shape, base.input_ranges(), record=record, bias=base.bias, fused=self.fused
        )
        return made.eval()


def static_range(base: QuantizedLinear) -> StaticRange | None:
    """The range of a static input as rounding takes it; None where it is not static."""
    ranges = base.input_ranges()
    if ranges.scale is None or ranges.zero_point is None:
        return None
    return StaticRange(ranges.scale.max().view(1), ranges.scale, ranges.zero_point.float())


@torch.compiler.disable
def _frozen_product(x: Tensor, base: QuantizedLinear) -> Tensor:
    y: Tensor = _FrozenProduct.apply(x, base)  # type: ignore[no-untyped-call]
    return y


class _FrozenProduct(torch.autograd.Function):
    """Keeps nothing but a static input, whose gradient is 0 where it was clipped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: QuantizedLinear) -> Tensor:
        ctx.base, ctx.dtype = base, x.dtype
        ctx.save_for_backward(x if base.activation.mode == "static" else None)
        y: Tensor = base(x)
        return y

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        of_x = (gradient @ ctx.base.weight.to(gradient.dtype)).to(ctx.dtype)
        if x is not None:
            ranges = ctx.base.input_ranges()
            codes = unclamped_codes(x, Rounding.of(ranges, -1, 0), static_range(ctx.base))
            of_x = of_x * ((codes >= 0) & (codes <= ranges.code_high))
        return of_x, None
