"""Ranges in training: those of a weight's blocks, and the one of a static input.

A learned scale is `stored(start * factor)` with a factor that starts at 1 and is the parameter. Its gradient is LSQ's,
d loss / d factor / sqrt(elements * code_high), divided by unit^2. With unit = start, which it is for one scale per
tensor, a step of SGD moves the scale as if the scale itself were the parameter; Adam, whose steps do not depend on the
size of gradients, moves every scale by the same share. Where a tensor has many scales, unit is at least their root mean
square, and the larger of what it is before and after BatchNorm and input scales are taken in: with unit = start a
channel with small weights or a small gamma changes its scale tenfold in one step in which its weights hardly move.

Source:
    LSQ: Esser et al. 2019, arXiv:1902.08153, section 2.2 (gradient scale). Differs: the factor is the parameter; the
    scale starts where post-training quantization has put it, not at 2 mean|w| / sqrt(code_high); and it is rounded to
    its stored format. LSQ+ (Bhalgat et al. 2020): zero points move in the same way and are rounded to integers. PACT
    (Choi et al. 2018, arXiv:1805.06085): the upper end of the range is what steps of SGD move.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.core import (
    PerChannel,
    PerGroup,
    QuantizedTensor,
    QuantSpec,
    fake_quantize,
    from_blocks,
    nearest_scale,
    quantize_blocks,
    round_scale,
    round_zero_point,
    through,
    to_blocks,
)
from narrowcast.errors import FormatError, ModelError
from narrowcast.nn.activation import Activation
from narrowcast.nn.training import Training

# A range may shrink or grow this far from where it started; a factor beyond has lost its block.
SMALLEST_FACTOR, LARGEST_FACTOR = 1 / 64, 64.0
# No gradient of a factor is larger: typical ones are 0.01 to 0.3, and one clipped weight of an 8-bit channel gives 40,
# upon which SGD throws the scale to and fro by its own size.
_STEEPEST = 1.0


class Range(nn.Module):
    """What both kinds of ranges share: a factor and a shift that are parameters, and freezing.

    Args:
        scale: starting scales, float32.
        zero: starting zero points, float32; None when symmetric.
        learns: whether the scale is a parameter.
        shifts: whether the zero point is one, too.
        shared: shape of the parameters: that of `scale`, or [1] where all move together.
    """

    start_scale: Tensor
    start_zero: Tensor | None
    factor: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(
        self, scale: Tensor, zero: Tensor | None, *, learns: bool, shifts: bool, shared: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.register_buffer("start_scale", scale.detach().clone())
        self.register_buffer("start_zero", None if zero is None else zero.detach().to(torch.float32).clone())
        self.factor = nn.Parameter(torch.ones(shared)) if learns else None
        self.shift = nn.Parameter(torch.zeros(shared)) if shifts and zero is not None else None
        self.frozen = False
        self.reduce: Callable[[Tensor], Tensor] | None = None  # what is done to the factor's gradient before it is cut
        self._held: dict[str, Tensor] = {}

    def freeze_(self, frozen: bool = True) -> None:
        """Hold the range where it is, whatever an optimizer does to its parameters; or let it go on from there.

        The parameters keep taking part in the graph with a gradient of zero, so that data-parallel wrappers, which
        wait for every gradient, go on.
        """
        if frozen == self.frozen:
            return
        self._restore_()
        self.frozen = frozen
        self._hold_()

    def parameter(self, name: str) -> Tensor | None:
        """The factor or shift that counts, without gradient scaling."""
        value = getattr(self, name)
        if value is None or not self.frozen:
            return value  # type: ignore[no-any-return]
        held: Tensor = _Held.apply(value, self._held[name])  # type: ignore[no-untyped-call]
        return held

    def health(self) -> str:
        """What is wrong with the parameters; "" where nothing is."""
        for name in ("factor", "shift"):
            value = self.parameter(name)
            if value is not None and not bool(torch.isfinite(value).all()):
                return f"its {name} of the range is not finite"
        return ""

    def at_bound(self) -> int:
        """Blocks whose scale wants to leave the bounds that it has."""
        if self.factor is None:
            return 0
        return int(((self.factor <= SMALLEST_FACTOR) | (self.factor >= LARGEST_FACTOR)).sum())

    def _restore_(self) -> None:
        with torch.no_grad():
            for name, value in self._held.items():
                _write_(getattr(self, name), value)

    def _hold_(self) -> None:
        pairs = ((name, getattr(self, name)) for name in ("factor", "shift"))
        self._held = {name: _whole(p).clone() for name, p in pairs if p is not None} if self.frozen else {}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._restore_()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "frozen"] = torch.tensor([self.frozen], dtype=torch.uint8)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        frozen = state.pop(prefix + "frozen", None)
        super()._load_from_state_dict(state, prefix, *rest)
        if frozen is not None:
            self.frozen = bool(frozen[0])
        self._hold_()

    def _apply(self, fn: Any, recurse: bool = True) -> Range:
        # ranges stay float32 when a model is cast to half precision
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keep_dtype, recurse)
        self._held = {name: keep_dtype(value) for name, value in self._held.items()}
        return self


class WeightRange(Range):
    """Scales and zero points of the blocks of one weight.

    Args:
        start: the weight as post-training quantization left it, in a format with scales.
        weight: [rows, columns] float32, the weight at the start.
        training: how it is trained.
        before: [rows, columns] what the weight is made of by factors of rows and columns; None for itself.
    """

    start_span: Tensor | None

    unit: Tensor

    def __init__(
        self, start: QuantizedTensor, weight: Tensor, training: Training, before: Tensor | None = None
    ) -> None:
        assert start.scale is not None
        learns, shape = training.weights == "learned", tuple(start.scale.shape)
        super().__init__(start.scale, start.zero_point, learns=learns, shifts=training.offsets and learns, shared=shape)
        self.spec, self.shape = start.spec, start.shape
        self.register_buffer("start_span", None if learns else _span(weight, start.spec))
        elements = to_blocks(weight[:1, :1].expand(self.shape), start.spec.granularity).shape[-1]
        self.gradient_scale = 1 / math.sqrt(elements * max(start.spec.code_high, 1))
        self._followed: Tensor | None = None
        made = 1.0 if before is None else _size(before, start.spec) / _size(weight, start.spec)
        unit = torch.maximum(start.scale, start.scale * made)
        self.register_buffer("unit", torch.maximum(unit, unit.square().mean().sqrt()))

    @property
    def by_rows(self) -> bool:
        """Whether every row has scales of its own, which may follow a factor of that row."""
        return isinstance(self.spec.granularity, PerChannel | PerGroup)

    def quantized(self, weight: Tensor, grown: Tensor | None = None) -> Tensor:
        """The values that the codes of a weight [rows, columns] stand for, float32, differentiable.

        Args:
            weight: [rows, columns] float32.
            grown: [rows, 1] what has multiplied every row of the weight since the start besides training, so that its
                scales grow with it; None for 1.
        """
        return fake_quantize(weight, *self._range(weight, grown), self.spec)

    def record(self, weight: Tensor, grown: Tensor | None = None) -> QuantizedTensor:
        """The codes and ranges whose values `quantized` gives, bit for bit.

        Raises:
            FormatError: a scale does not fit its format.
        """
        with torch.no_grad():
            scale, zero = self._range(weight, grown)
            round_scale(scale, self.spec)
            zero_point = None if zero is None else round_zero_point(zero, self.spec)
            codes = quantize_blocks(to_blocks(weight, self.spec.granularity), self.spec, scale, zero_point)
        return QuantizedTensor(from_blocks(codes, self.spec.granularity, self.shape), scale, zero_point, self.spec)

    def rows(self, weight: Tensor, index: Tensor, padding: int | None) -> Tensor:
        """The quantized values of some rows; every row has scales of its own.

        Args:
            weight: [rows, columns] float32.
            index: [chosen] int64.
            padding: the row that gets no gradient, or None.
        """
        scale, zero = self._range(weight)
        chosen, its_scale = (nn.functional.embedding(index, part, padding) for part in (weight, scale))
        its_zero = None if zero is None else nn.functional.embedding(index, zero, padding)
        return fake_quantize(chosen, its_scale, its_zero, self.spec)

    def _range(self, weight: Tensor, grown: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        if self.start_span is not None:
            return self._follow(weight, grown), self.start_zero
        factor = self.parameter("factor")
        assert factor is not None
        scale: Tensor = _Scaled.apply(  # type: ignore[no-untyped-call]
            factor,
            self.start_scale if grown is None else self.start_scale * grown,
            self.unit,
            self.spec,
            self.gradient_scale,
            self.reduce,
        )
        return scale, _shifted(self, self.unit, self.spec, self.spec.code_low, self.spec.zero_high, self.gradient_scale)

    def _follow(self, weight: Tensor, grown: Tensor | None) -> Tensor:
        """Scales that follow the largest weight of each block; frozen ones follow what the rows have grown by alone."""
        assert self.start_span is not None
        part = 1.0 if grown is None else grown
        if self.frozen and self._followed is not None:
            share = self._followed
        else:
            span = _span(weight.detach(), self.spec) / (self.start_span * part)
            share = span.clamp(SMALLEST_FACTOR, LARGEST_FACTOR)
        if self.frozen:
            self._followed = share
        return nearest_scale(self.start_scale * share * part, self.spec)

    def _hold_(self) -> None:
        super()._hold_()
        self._followed = None


class InputRange(Range):
    """The range of a static input, one for all channels or one each; in training all channels move together.

    Args:
        activation: where it starts.
        training: how it is trained.
    """

    def __init__(self, activation: Activation, training: Training) -> None:
        assert activation.scale is not None and activation.zero_point is not None and activation.spec is not None
        learns = training.inputs != "fixed"
        shifts = training.offsets and learns and activation.scale.numel() == 1
        super().__init__(activation.scale, activation.zero_point, learns=learns, shifts=shifts, shared=(1,))
        self.spec: QuantSpec = activation.spec
        self.clips = training.inputs == "clipped"
        high = int(activation.spec.format.high)
        reach = max(float((high - activation.zero_point.float()).max()), 1.0)
        # by its upper end alone: PACT's parameter is reach * scale
        self.gradient_scale = 1 / reach**2 if self.clips else 1 / math.sqrt(high)

    def ratio(self) -> Tensor | None:
        """[channels] scale of each channel relative to the largest, which the weight takes in; None for one scale."""
        return None if self.start_scale.numel() == 1 else self.start_scale / self.start_scale.max()

    def range(self, features: int) -> tuple[Tensor, Tensor, Tensor]:
        """(largest scale [1], differentiable; scale [1] or [channels]; zero point [1] or [channels], differentiable).

        Args:
            features: elements of the input per sample, for the gradient's size.
        """
        assert self.start_zero is not None
        high = int(self.spec.format.high)
        size = self.gradient_scale if self.clips else self.gradient_scale / math.sqrt(max(features, 1))
        factor = self.parameter("factor")
        if factor is None:
            return self.start_scale.max().view(1), self.start_scale, self.start_zero
        scale = self.start_scale * factor.detach().clamp(SMALLEST_FACTOR, LARGEST_FACTOR)
        top = self.start_scale.max().view(1)
        largest: Tensor = _Scaled.apply(factor, top, None, None, size, self.reduce)  # type: ignore[no-untyped-call]
        zero = _shifted(self, top, self.spec, 0, high, size)
        assert zero is not None
        return largest, scale, zero

    def activation(self) -> Activation:
        """The treatment of the input as a quantized module takes it."""
        with torch.no_grad():
            _, scale, zero = self.range(1)
            return Activation(self.spec, scale.clone(), zero.to(torch.uint8))


def finite_range(part: Range, where: str) -> None:
    """Raise ModelError where training has left a range that is no number."""
    if problem := part.health():
        raise ModelError(
            f"{where}: {problem}; the loss was probably NaN or infinite: lower the learning rate, clip gradients, and "
            "go on from the last good state_dict"
        )


def scale_error(where: str, error: FormatError) -> ModelError:
    """A scale that outgrew its format, as an error that names the layer."""
    return ModelError(f"{where}: training made its range too large ({error}); lower the learning rate of the ranges")


def _whole(parameter: Tensor) -> Tensor:
    """A parameter without its graph; one that is sharded over processes (FSDP) is gathered."""
    value = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[no-any-return]


def _write_(parameter: Any, value: Tensor) -> None:
    """Write a whole value into a parameter that may be sharded."""
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
    parameter.copy_(value)


def _span(weight: Tensor, spec: QuantSpec) -> Tensor:
    """[block_rows, block_columns] largest magnitude of every block; 1 where it is all zero."""
    span = to_blocks(weight, spec.granularity).abs().amax(-1)
    return torch.where(span > 0, span, 1.0)


def _size(weight: Tensor, spec: QuantSpec) -> Tensor:
    """[block_rows, block_columns] norm of every block; 1 where it is all zero."""
    size = to_blocks(weight, spec.granularity).norm(dim=-1)
    return torch.where(size > 0, size, 1.0)


def _shifted(part: Range, unit: Tensor, spec: QuantSpec, low: float, high: float, size: float) -> Tensor | None:
    """The zero points in use, as the format holds them."""
    shift = part.parameter("shift")
    if shift is None or part.start_zero is None:
        return part.start_zero
    step: Tensor = _Sized.apply(shift, unit, size)  # type: ignore[no-untyped-call]
    return through((part.start_zero + step).clamp(low, high), spec, zero=True)


class _Scaled(torch.autograd.Function):
    """start * factor in its stored format; the gradient is sized as the module's docstring says."""

    @staticmethod
    def forward(
        ctx: Any, factor: Tensor, start: Tensor, unit: Tensor | None, spec: QuantSpec | None, size: float,
        reduce: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(start, unit)
        ctx.size, ctx.reduce = size, reduce
        scale = start * factor.clamp(SMALLEST_FACTOR, LARGEST_FACTOR)
        return scale if spec is None else nearest_scale(scale, spec)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        start, unit = ctx.saved_tensors
        unit = start if unit is None else unit
        balanced = gradients[0] * ctx.size * (start / unit) / unit
        balanced = balanced if ctx.reduce is None else ctx.reduce(balanced)
        return balanced.clamp(-_STEEPEST, _STEEPEST), None, None, None, None, None


class _Sized(torch.autograd.Function):
    """The shift itself; its gradient is sized so that a step of SGD moves scale * zero point as LSQ+ moves it."""

    @staticmethod
    def forward(ctx: Any, shift: Tensor, unit: Tensor, size: float) -> Tensor:
        ctx.save_for_backward(unit)
        ctx.size = size
        return shift.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (unit,) = ctx.saved_tensors
        return gradients[0] * ctx.size / unit / unit, None, None


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, held: Tensor) -> Tensor:
        return held.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return torch.zeros_like(gradients[0]), None
