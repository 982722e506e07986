"""The input of a layer as its quantized module will round it, and the product with it, differentiable.

`product` keeps only the float input and the weight for its gradient: the rounded input is computed again in the
backward pass, so a step needs about the memory of the float layer. Gradients go straight through the rounding; outside
of a static range the gradient of the input is 0. The codes are those of the kernels' reference bodies, bit for bit.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import TensorWeakRef

from narrowcast.core import pieces
from narrowcast.kernels.reference import SMALLEST_RANGE
from narrowcast.nn.activation import Activation

Geometry = tuple[list[int], list[int], list[int], bool, list[int], int]
"""stride, padding, dilation, transposed, output_padding, groups: a convolution as torch's own op takes it."""


@dataclass(frozen=True)
class Rounding:
    """How an input is rounded.

    Args:
        mode: of the activation: "float", "cast", "dynamic", "asymmetric" or "static".
        channel_dim: dimension of the channels: 1 for images, -1 for rows.
        high: largest code of a static range.
        group: inputs of a row that share a range found at run time.
        dtype: of a cast.
        clips: whether the scale's gradient comes from clipped values alone (PACT).
    """

    mode: str
    channel_dim: int = -1
    high: int = 255
    group: int = 0
    dtype: torch.dtype = torch.float32
    clips: bool = False

    @classmethod
    def of(cls, activation: Activation, channel_dim: int, group: int, *, clips: bool = False) -> Rounding:
        """The rounding of a module's input."""
        spec = activation.spec
        high = 255 if spec is None or not spec.format.scaled else int(spec.format.high)
        dtype = spec.format.storage if spec is not None and activation.mode == "cast" else torch.float32
        return cls(activation.mode, channel_dim, high, group, dtype, clips)


@dataclass(frozen=True)
class StaticRange:
    """A static range as the rounding takes it; see `InputRange.range`."""

    largest: Tensor
    scale: Tensor
    zero: Tensor


def codes_of(x: Tensor, how: Rounding, static: StaticRange | None) -> Tensor:
    """The codes of an input, as float32: those that the quantized module computes."""
    if how.mode == "static":
        return unclamped_codes(x, how, static).clamp_(0, how.high)
    codes, _, zero = _dynamic(x.float(), how)
    return (codes if zero is None else codes.add_(zero)).view(x.shape)


def unclamped_codes(x: Tensor, how: Rounding, static: StaticRange | None) -> Tensor:
    """Codes of a static range before they are clamped, as float32."""
    assert static is not None
    inverse, zero = _along(1.0 / static.scale, x, how), _along(static.zero, x, how)
    return (x.float() * inverse).round_().add_(zero)


def rounded(x: Tensor, how: Rounding, static: StaticRange | None, values: Tensor | None = None) -> Tensor:
    """What the product multiplies, float32: (code - zero point) * scale; of a static range, the largest scale.

    Args:
        x: the input.
        how: how it is rounded.
        static: its range where that is static.
        values: like `x`, float32; filled and returned where given.
    """
    if how.mode == "cast":
        return x.to(how.dtype).float()
    if values is None:
        values = torch.empty_like(x, dtype=torch.float32, memory_format=_layout(x, how))
    if how.mode == "static":
        assert static is not None
        inverse, zero = _along(1.0 / static.scale, x, how), _along(static.zero, x, how)
        (low, high), largest = _bounds(zero, how), static.largest.view(())
        for part, target in zip(pieces(x), pieces(values), strict=True):
            _clamp_(target.copy_(part).mul_(inverse).round_(), low, high).mul_(largest)
        return values
    for part, target in zip(pieces(x), pieces(values), strict=True):  # every row or image has a range of its own
        codes, scale, _ = _dynamic(part.float(), how)
        torch.mul(codes, scale, out=target.view(codes.shape))
    return values


def _layout(x: Tensor, how: Rounding) -> torch.memory_format:
    """That of images is kept; rows are contiguous, so that their groups are views."""
    return torch.preserve_format if how.channel_dim == 1 else torch.contiguous_format


class _Room(threading.local):
    """Memory for rounded inputs, which live for one product: the pages of a fresh tensor cost more than the rounding.

    One per thread, as large as the largest input so far, at most 32 MiB. It remembers what it holds: the queries, keys
    and values of attention read one input, which is then rounded once instead of three times.
    """

    most = 1 << 23

    def __init__(self) -> None:
        self.values = torch.empty(0)
        self._holds: tuple[TensorWeakRef, int, Rounding, Tensor] | None = None

    def rounded(self, x: Tensor, how: Rounding, static: StaticRange | None) -> Tensor:
        """See `rounded`; valid until the next call."""
        held = self._holds
        if held is not None and static is None and held[0]() is x and held[1:3] == (x._version, how):
            return held[3]
        self._holds, room = None, self.like(x, how)
        values = rounded(x, how, static, room)
        if room is not None and static is None and not x.is_inference():  # ranges found at run time follow from x alone
            self._holds = (TensorWeakRef(x), x._version, how, values)
        return values

    def like(self, x: Tensor, how: Rounding) -> Tensor | None:
        """A float32 tensor in the layout of `x`, until the next call; None where a fresh one has to do."""
        images = x.dim() == 4 and how.channel_dim == 1 and x.is_contiguous(memory_format=torch.channels_last)
        dense = images or x.is_contiguous() or how.channel_dim != 1
        plain = type(x) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
        if not plain or x.device.type != "cpu" or x.numel() > self.most or not dense:
            return None
        if self.values.numel() < x.numel():
            with torch.inference_mode(False):  # or autograd could not use it later
                self.values = torch.empty(x.numel())
        flat = self.values[: x.numel()]
        if images:
            return flat.view(x.shape[0], *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
        return flat.view(x.shape)


_ROOM = _Room()


def _factors(x: Tensor, how: Rounding, static: StaticRange | None, dtype: torch.dtype) -> Tensor:
    """What the product multiplies, in its dtype; valid until the next product."""
    if how.mode in ("float", "cast"):
        return x.to(dtype)
    if torch.compiler.is_compiling():
        return rounded(x, how, static).to(dtype)
    return _ROOM.rounded(x, how, static).to(dtype)


def product(
    x: Tensor, weight: Tensor, bias: Tensor | None, how: Rounding, static: StaticRange | None, conv: Geometry | None
) -> Tensor:
    """The rounded input times a weight, plus bias, in the dtype of `x` or of autocast.

    Args:
        x: [..., in], or [batch, channels, height, width] with `conv`.
        weight: [out, in] or torch's weight of a convolution, float32: already rounded to its codes.
        bias: [out] float32 or None.
        how: how the input is rounded.
        static: its range where that is static.
        conv: the geometry of a convolution; None for a linear layer.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    if how.mode == "cast":
        dtype = how.dtype
    largest, scale, zero = (None, None, None) if static is None else (static.largest, static.scale, static.zero)
    y: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, largest, scale, zero, how, conv, dtype
    )
    return y.to(x.dtype) if how.mode == "cast" else y


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, largest: Tensor | None, scale: Tensor | None,
        zero: Tensor | None, how: Rounding, conv: Geometry | None, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        weight = weight.to(dtype)
        ctx.save_for_backward(x, weight, largest, scale, zero)
        ctx.how, ctx.conv, ctx.dtype, ctx.bias_dtype = how, conv, dtype, None if bias is None else bias.dtype
        static = None if largest is None or scale is None or zero is None else StaticRange(largest, scale, zero)
        values = _factors(x, how, static, dtype)
        bias = None if bias is None else bias.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            if conv is None:
                return torch.nn.functional.linear(values, weight, bias)
            return torch.convolution(values, weight, bias, *conv)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, largest, scale, zero = ctx.saved_tensors
        how, needs = ctx.how, ctx.needs_input_grad
        static = None if how.mode != "static" else StaticRange(largest, scale, zero)
        values = _factors(x, how, static, ctx.dtype)
        masks = [any(needs[index] for index in (0, 3, 5)), needs[1], needs[2] and ctx.bias_dtype is not None]
        of_x, of_weight, of_bias = _product_gradients(gradient.to(ctx.dtype), values, weight, ctx.conv, masks)
        del values
        of_weight = None if of_weight is None else of_weight.float()
        of_bias = None if of_bias is None else of_bias.to(ctx.bias_dtype)
        of_largest = of_zero = None
        if static is not None and of_x is not None:
            of_x = of_x.float()
            of_largest, of_zero = _clip_(of_x, x, how, static)
        of_x = of_x.to(x.dtype) if of_x is not None and needs[0] else None
        return of_x, of_weight, of_bias, of_largest, None, of_zero, None, None, None


def _clip_(gradient: Tensor, x: Tensor, how: Rounding, static: StaticRange) -> tuple[Tensor, Tensor]:
    """From the gradient of a rounded static input to that of the input, in place; returns those of scale and zero.

    Args:
        gradient: like `x`, float32; overwritten.
        x: the input.
        how: how it is rounded.
        static: its range.
    """
    inverse, zero = _along(1.0 / static.scale, x, how), _along(static.zero, x, how)
    low, high = _bounds(zero, how)
    total, clipped = gradient.new_zeros(()), gradient.new_zeros(())
    for part, values in zip(pieces(gradient), pieces(x), strict=True):
        scaled = values.float() * inverse
        nearest = scaled.round()
        steps = _clamp_(nearest.clone(), low, high)
        total += _dot(part, steps)
        clipped += part.sum()
        part.mul_(nearest.eq_(steps))
        total -= _dot(part, steps if how.clips else scaled)
        clipped -= part.sum()
    if static.scale.numel() > 1:
        gradient.mul_(_along(static.largest / static.scale, x, how))
    return total.view(1), -(clipped * static.largest).expand_as(static.zero)


def _bounds(zero: Tensor, how: Rounding) -> tuple[Any, Any]:
    """Smallest and largest code minus zero point; numbers where they are one and may be read, which clamp faster."""
    if zero.numel() > 1 or torch.compiler.is_compiling() or zero.device.type != "cpu":
        return -zero, how.high - zero
    return -float(zero), how.high - float(zero)


def _clamp_(values: Tensor, low: Any, high: Any) -> Tensor:
    """Clamped in place; by two operations where the bounds are one per channel, which torch's clamp is slow for."""
    if isinstance(low, Tensor):
        return torch.minimum(torch.maximum(values, low, out=values), high, out=values)
    return values.clamp_(low, high)


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """The sum of products, in the order in which both lie in memory where that is one."""
    if one.stride() == other.stride() and one.is_contiguous(memory_format=torch.channels_last) and one.dim() == 4:
        one, other = one.permute(0, 2, 3, 1), other.permute(0, 2, 3, 1)
    return torch.dot(one.reshape(-1), other.reshape(-1))


def _product_gradients(
    gradient: Tensor, values: Tensor, weight: Tensor, conv: Geometry | None, masks: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the rounded input, the weight and the bias, where asked for."""
    if conv is not None:
        outputs = weight.shape[1] * conv[5] if conv[3] else weight.shape[0]
        parts = torch.ops.aten.convolution_backward(gradient, values, weight, [outputs], *conv, masks)
        return parts[0], parts[1], parts[2]
    rows = gradient.reshape(-1, gradient.shape[-1])
    return (
        (gradient @ weight) if masks[0] else None,
        rows.t() @ values.reshape(rows.shape[0], -1) if masks[1] else None,
        rows.sum(0) if masks[2] else None,
    )


def _along(values: Tensor, x: Tensor, how: Rounding) -> Tensor:
    """One value, or one per channel, so that it broadcasts over the input."""
    if values.numel() == 1:
        return values.view(())
    return values.view(-1, *[1] * (x.dim() - 2)) if how.channel_dim == 1 else values


def _dynamic(x: Tensor, how: Rounding) -> tuple[Tensor, Tensor, Tensor | None]:
    """(code minus zero point, scale, zero point) with one range per image, row or group of a row.

    As `kernels.reference.quantize_rows`, `quantize_rows_asymmetric` and `reference_conv` have it.
    """
    if how.channel_dim == 1:
        dims: Any = tuple(range(1, x.dim()))
        rows = x
    else:
        group = how.group or x.shape[-1]
        dims = -1
        if group < x.shape[-1]:
            if x.shape[-1] % group:
                return _ragged(x, how, group)
            rows = x.reshape(*x.shape[:-1], -1, group)
        else:
            rows = x
    if how.mode == "dynamic":
        largest = rows.abs().amax(dims, keepdim=True)
        zero = largest < SMALLEST_RANGE
        inverse = torch.where(zero, 0.0, torch.full_like(largest, 127.0) / torch.where(zero, 1.0, largest))
        scale = torch.where(zero, 1.0, largest / torch.full_like(largest, 127.0))
        # no clamp: the largest product is 127 but for its last bit, and rounds to 127
        return (rows * inverse).round_(), scale, None
    low, high = rows.amin(dims, keepdim=True).clamp(max=0), rows.amax(dims, keepdim=True).clamp(min=0)
    zero = torch.maximum(-low, high) < SMALLEST_RANGE
    steps = torch.full_like(low, 255.0)
    scale = torch.where(zero, 1.0, high / steps - low / steps)
    inverse = torch.where(zero, 0.0, torch.ones_like(scale) / scale)
    zero_point = torch.round(-low * inverse).clamp(max=255)
    return _clamp_(rows * inverse, -zero_point, 255 - zero_point).round_(), scale, zero_point


def _ragged(x: Tensor, how: Rounding, group: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Groups of which the last is shorter: one after the other, scales spread over their values."""
    parts = [_dynamic(part, how) for part in x.split(group, -1)]
    codes = torch.cat([part[0] for part in parts], -1)
    scale = torch.cat([part[1].expand_as(part[0]) for part in parts], -1)
    zeros = [part[2].expand_as(part[0]) for part in parts if part[2] is not None]
    return codes, scale, torch.cat(zeros, -1) if zeros else None
