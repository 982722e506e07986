"""TrainedConv: a convolution in training, with the BatchNorm behind it, rounded as QuantizedConv will hold it.

The weight is kept as it is before folding. What is rounded is what will be stored, W * gamma / sqrt(variance + eps)
with the running variance. While the BatchNorm's statistics are those of each batch, the rounded weight is divided by
that factor again and the BatchNorm does its work behind; once they are frozen, weight and bias are the folded ones.
Scales of rows follow the factor of their row: the variance that it is made of moves with the first quantized batches.

Source:
    Jacob et al. 2018, arXiv:1712.05877, section 3.2; Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.2 (corrected
    to running statistics from the start, frozen later). Differs: the factor is divided out of the weight, which costs
    no pass over the images; gradients do not pass through it before statistics are frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from narrowcast.core import spread_channels
from narrowcast.nn.conv import QuantizedConv
from narrowcast.nn.settled_bias import settle_bias_
from narrowcast.nn.trained import AnyRange, TrainedModule
from narrowcast.nn.trained_inputs import Geometry, codes_of, product
from narrowcast.nn.trained_ranges import InputRange
from narrowcast.nn.training import Training

# A gamma of zero silences its channel; the factor is kept this large so that it can be divided out again.
_SMALLEST_FACTOR = 1e-8


class TrainedConv(TrainedModule):
    """The twin of a QuantizedConv.

    Args:
        path, quantized, training, ranges, input_range: see `TrainedModule`.
        weights: {"weight": torch's own layout, before any folding}.
        bias: [out_channels] or None, before any folding.
        norm: the BatchNorm that was behind the convolution, with running statistics; None for none.
    """

    twin_of = QuantizedConv
    bias: nn.Parameter | None
    norm: Any
    start_factor: Tensor

    def __init__(
        self, path: str, quantized: QuantizedConv, training: Training, ranges: dict[str, AnyRange],
        input_range: InputRange | None, weights: dict[str, nn.Parameter], *, bias: Tensor | None = None,
        norm: nn.Module | None = None,
    ) -> None:  # fmt: skip
        super().__init__(path, quantized, training, ranges, input_range)
        self.shape, self.channels_last = quantized.shape, quantized.channels_last
        self.weight = weights["weight"]
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone().float())
        self.norm = norm
        self.norm_frozen = False
        factor = self._factor()
        self.register_buffer("start_factor", None if factor is None else factor.detach().clone())
        self._rounding = self.rounding(1)

    def matrix(self, name: str) -> Tensor:
        """See `TrainedModule`."""
        return self._folded(self._factor())

    def grown(self) -> Tensor | None:
        """See `TrainedModule`: how BatchNorm's factor has changed, which moves with every batch's variance."""
        factor = self._factor()
        if factor is None or not self.weight_range().by_rows:
            return None
        return (factor.detach() / self.start_factor).abs()

    def build(self) -> QuantizedConv:
        """See `TrainedModule`."""
        record, bias = self.records()["weight"], self._folded_bias()
        module = QuantizedConv(
            record.spec, self.shape, self.activation(), record=record,
            bias=None if bias is None else bias.detach().float().clone(), channels_last=self.channels_last,
        )  # fmt: skip
        settle_bias_(module)
        return module

    def train(self, mode: bool = True) -> TrainedConv:
        """As in torch; a frozen BatchNorm stays in evaluation mode."""
        super().train(mode)
        if self.norm is not None and self.norm_frozen:
            self.norm.eval()
        return self

    def freeze_norm_(self, frozen: bool = True) -> None:
        """Keep the BatchNorm's statistics as they are from now on, or let them follow the batches again."""
        self.norm_frozen = frozen
        self.train(self.training)

    def trained_forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[batch, in_channels, *spatial] -> [batch, out_channels, *spatial]; unbatched input too."""
        shape = self.shape
        unbatched = x.dim() == shape.dimensions + 1
        images = x.unsqueeze(0) if unbatched else x
        images = images.unsqueeze(-2) if shape.dimensions == 1 else images
        images, geometry = self._geometry(images, output_size)
        live = self.norm is not None and not self.norm_frozen
        factor = self._factor()
        factor = factor.detach() if live and factor is not None else factor
        weight = self.weight_range().quantized(self._folded(factor), self.grown())
        if live and factor is not None:
            weight = weight / factor
        bias = self.bias if live else self._folded_bias()
        static = self.static_range(images)
        self.look_(images, self._rounding, static)
        y = product(images, shape.from_matrix(weight), bias, self._rounding, static, geometry)
        y = y.squeeze(-2) if shape.dimensions == 1 else y
        y = y.squeeze(0) if unbatched else y
        return self.norm(y) if live else y

    @torch.no_grad()
    def input_codes(self, x: Tensor) -> Tensor:
        """The codes of a batch of images as training sees them, float32."""
        return codes_of(x, self._rounding, self.static_range(x))

    def _geometry(self, images: Tensor, output_size: list[int] | None) -> tuple[Tensor, Geometry]:
        """The images, padded where torch's op cannot do it, and what that op is given."""
        shape = self.shape
        top, left, bottom, right = shape.padding
        if shape.padding_mode != "zeros":
            images = functional.pad(images, (left, right, top, bottom), mode=shape.padding_mode)
            top = left = bottom = right = 0
        if (top, left) != (bottom, right):
            images, top, left = functional.pad(images, (left, right, top, bottom)), 0, 0
        outer = shape.extra_padding(images, output_size) if shape.transposed else (0, 0)
        stride, dilation = list(shape.stride), list(shape.dilation)
        return images, (stride, [top, left], dilation, shape.transposed, list(outer), shape.groups)

    def _factor(self) -> Tensor | None:
        """[out, 1] what BatchNorm multiplies each channel with; None without one."""
        if self.norm is None:
            return None
        factor = torch.rsqrt(self.norm.running_var.float() + self.norm.eps)
        if self.norm.weight is not None:
            factor = factor * self.norm.weight.float()
        small = factor.detach().abs() < _SMALLEST_FACTOR
        return torch.where(small, torch.full_like(factor, _SMALLEST_FACTOR), factor).view(-1, 1)

    def _folded(self, factor: Tensor | None) -> Tensor:
        matrix = self.shape.to_matrix(self.weight.float())
        if factor is not None:
            matrix = matrix * factor
        ratio = None if self.input_range is None else self.input_range.ratio()
        return matrix if ratio is None else matrix * spread_channels(ratio, self.shape.matrix, self.shape.groups)

    def _folded_bias(self) -> Tensor | None:
        factor = self._factor()
        if factor is None:
            return self.bias
        shift = -self.norm.running_mean.float() if self.bias is None else self.bias - self.norm.running_mean.float()
        bias = shift * factor.view(-1)
        return bias if self.norm.bias is None else bias + self.norm.bias.float()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "norm_frozen"] = torch.tensor([self.norm_frozen], dtype=torch.uint8)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        frozen = state.pop(prefix + "norm_frozen", None)
        super()._load_from_state_dict(state, prefix, *rest)
        if frozen is not None:
            self.freeze_norm_(bool(frozen[0]))
