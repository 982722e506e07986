"""TrainedLinear: a linear layer in training whose weight and input are rounded as QuantizedLinear will hold them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from narrowcast.nn.linear import QuantizedLinear
from narrowcast.nn.settled_bias import settle_bias_
from narrowcast.nn.trained import AnyRange, TrainedModule
from narrowcast.nn.trained_inputs import codes_of, product
from narrowcast.nn.trained_ranges import InputRange
from narrowcast.nn.training import Training


class TrainedLinear(TrainedModule):
    """The twin of a QuantizedLinear.

    Args:
        path, quantized, training, ranges, input_range: see `TrainedModule`.
        weights: {"weight": [out_features, in_features]}; tied layers have the same parameter.
    """

    twin_of = QuantizedLinear
    bias: nn.Parameter | None

    def __init__(
        self, path: str, quantized: QuantizedLinear, training: Training, ranges: dict[str, AnyRange],
        input_range: InputRange | None, weights: dict[str, nn.Parameter],
    ) -> None:  # fmt: skip
        super().__init__(path, quantized, training, ranges, input_range)
        self.out_features, self.in_features = quantized.out_features, quantized.in_features
        self.weight = weights["weight"]
        self.bias = None if quantized.bias is None else nn.Parameter(quantized.bias.detach().clone())
        self._group = quantized.kernel_groups[2]
        self._rounding = self.rounding(-1, self._group if quantized.activation.mode == "dynamic" else 0)

    def matrix(self, name: str) -> Tensor:
        """See `TrainedModule`."""
        ratio = None if self.input_range is None else self.input_range.ratio()
        return self.weight.float() if ratio is None else self.weight.float() * ratio

    def build(self) -> QuantizedLinear:
        """See `TrainedModule`."""
        record = self.records()["weight"]
        bias = None if self.bias is None else self.bias.detach().float().clone()
        module = QuantizedLinear(record.spec, record.shape, self.activation(), record=record, bias=bias)
        settle_bias_(module)
        return module

    def trained_forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        weight, static = self.weight_range().quantized(self.matrix("weight")), self.static_range(x)
        self.look_(x, self._rounding, static)
        return product(x, weight, self.bias, self._rounding, static, None)

    @torch.no_grad()
    def input_codes(self, x: Tensor) -> Tensor:
        """The codes of an input as training sees them, float32; inputs that are not rounded to codes have none."""
        return codes_of(x, self._rounding, self.static_range(x))
