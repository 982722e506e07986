"""Adapters inside of the integers, which merge without any loss; and the table of all adapters.

With A [rank, columns] and B [out, rank], both float,

    requantize    y = x W^T + (alpha / rank) dropout(x) A^T B^T                  merging rounds; see `nn.adapted`
    zero_points   W = scale * (code - round(zero - (alpha / rank) B A / scale))  one column of A per group
    codes         W = scale * (round(code + dither + (alpha / rank) B A) - zero)

Source:
    Zero points: QA-LoRA, Xu et al. 2023, arXiv:2309.14717. Differs: zero points are stored as integers, so training
    rounds them too, straight through. Codes: LR-QAT, Bondarenko et al. 2024, arXiv:2406.06385. Differs: the base is the
    codes alone, without the fractions that rounding took away; in their place stands a fixed dither, with which a small
    change of all weights flips as many codes as it is worth, and none at the start.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from narrowcast.core import PerChannel, PerGroup, QuantizedTensor, expand_to_matrix, through
from narrowcast.kernels.reference_linear import FUSED
from narrowcast.nn.adapted import AdaptedLinear
from narrowcast.nn.frozen import static_range
from narrowcast.nn.linear import QuantizedLinear
from narrowcast.nn.trained_inputs import Rounding, product

# Steps of the most even sequence of points known in the plane: the inverse of the plastic number, and its square.
_LATTICE = (0.7548776662466927, 0.5698402909980532)
# Of a cell; the rest keeps every code at the start what it is.
_WIDTH = 0.99


class _ExactAdapter(AdaptedLinear):
    """An adapter inside of the integers: in evaluation mode the layer is the one that merging installs, bit for bit."""

    exact = True

    def record(self) -> QuantizedTensor:
        """The merged weight."""
        raise AssertionError("a subclass has its own")

    def merged(self) -> QuantizedLinear:
        """The merged layer."""
        self.check_finite()
        with torch.no_grad():
            return self.with_record(self.record())

    def forward(self, x: Tensor) -> Tensor:
        """See `FrozenLinear`."""
        return FUSED[self.fused](self.trained_product(x)) if self.training else self._evaluated(x)

    def trained_product(self, x: Tensor) -> Tensor:
        """The product in training, differentiable."""
        raise AssertionError("a subclass has its own")

    @torch.compiler.disable
    def _evaluated(self, x: Tensor) -> Tensor:
        y: Tensor = self._built()(x)
        return y

    def _built(self) -> QuantizedLinear:
        """The merged layer as of now, built anew when a parameter has changed."""
        tensors = (self.lora_A, self.lora_B, self.base.weight_codes)
        # writes through .data count no version, so sums are looked at too
        state = tuple((t.data_ptr(), t._version, float(t.detach().double().sum())) for t in tensors)
        kept = self.__dict__.get("_kept")
        if kept is None or kept[0] != state:
            kept = self.__dict__["_kept"] = (state, self.merged())
        layer: QuantizedLinear = kept[1]
        return layer

    def train(self, mode: bool = True) -> _ExactAdapter:
        """As in torch; what evaluation built is dropped when training goes on."""
        if mode:
            self.__dict__.pop("_kept", None)
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_kept"}


class ZeroPointAdapter(_ExactAdapter):
    """An adapter that moves the zero points of groups ("zero_points")."""

    @classmethod
    def refusal(cls, base: QuantizedLinear) -> str:
        """See `AdaptedLinear`."""
        if why := super().refusal(base):
            return why
        spec = base.stored("weight").spec
        if spec.symmetric or not isinstance(spec.granularity, PerGroup | PerChannel):
            return (
                f"{spec} has no zero points of groups to move; quantize it to a format like 'int4/group32/asym', or "
                "use merge 'codes' or 'requantize'"
            )
        if base.input_ranges().ratio() is not None:
            return "its input has a range per channel, which zero points cannot follow; use merge 'codes'"
        return ""

    @classmethod
    def columns(cls, base: QuantizedLinear) -> int:
        """One per group of the weight."""
        return -(-base.in_features // base.stored("weight").group)

    def trained_product(self, x: Tensor) -> Tensor:
        """See `_ExactAdapter`: the base's product, and what the moved zero points add to it."""
        y = self.frozen_product(x)
        group, dtype = self.base.stored("weight").group, y.dtype
        missing = self.columns(self.base) * group - self.in_features
        pooled = functional.pad(self.clipped(x).float(), (0, missing)).unflatten(-1, (-1, group)).sum(-1)
        scale, zero = self._ranges()
        moved = scale * (zero - self._zero_points(scale, zero))
        return y + functional.linear(self.dropout(pooled), moved).to(dtype)

    def record(self) -> QuantizedTensor:
        """See `_ExactAdapter`."""
        record = self.base.quantized_weights()["weight"]
        assert record.scale is not None and record.zero_point is not None
        zero = self._zero_points(*self._ranges())
        return QuantizedTensor(record.codes, record.scale, zero.to(record.zero_point.dtype), record.spec)

    def _ranges(self) -> tuple[Tensor, Tensor]:
        stored = self.base.stored("weight")
        self.base.restore_layout_()
        scale, zero = stored.scale(self.base), stored.zero_point(self.base)
        assert scale is not None and zero is not None
        return scale, zero.float()

    def _zero_points(self, scale: Tensor, zero: Tensor) -> Tensor:
        """[out, groups] float32, rounded and clamped to what is stored; gradients pass inside of the bounds."""
        spec = self.base.stored("weight").spec
        return through((zero - self.delta() / scale).clamp(spec.code_low, spec.zero_high), spec, zero=True)


class CodeAdapter(_ExactAdapter):
    """An adapter that moves the codes themselves ("codes"), in steps of the format."""

    @classmethod
    def refusal(cls, base: QuantizedLinear) -> str:
        """See `AdaptedLinear`."""
        if why := super().refusal(base):
            return why
        spec = base.stored("weight").spec
        if spec.format.kind != "int":
            return f"{spec} has no equal steps that codes could move by; use an integer format or merge 'requantize'"
        return ""

    def trained_product(self, x: Tensor) -> Tensor:
        """See `_ExactAdapter`: the weight is made for the product and again for its gradient, never kept."""
        y: Tensor = checkpoint(
            self._product, x, self.lora_A, self.lora_B, use_reentrant=False, preserve_rng_state=False
        )
        return y

    def record(self) -> QuantizedTensor:
        """See `_ExactAdapter`."""
        record = self.base.quantized_weights()["weight"]
        codes = self._codes(record).to(record.codes.dtype)
        return QuantizedTensor(codes, record.scale, record.zero_point, record.spec)

    def _product(self, x: Tensor, *parameters: Tensor) -> Tensor:
        base = self.base
        record, ranges = base.quantized_weights()["weight"], base.input_ranges()
        assert record.scale is not None
        steps = self._codes(record)
        if record.zero_point is not None:
            steps = steps - expand_to_matrix(record.zero_point.float(), record.spec.granularity, record.shape)
        weight = steps * expand_to_matrix(record.scale, record.spec.granularity, record.shape)
        rounding = Rounding.of(ranges, -1, base.kernel_groups[2] if ranges.mode == "dynamic" else 0)
        return product(x, weight, base.bias, rounding, static_range(base), None)

    def _codes(self, record: QuantizedTensor) -> Tensor:
        """[out, in] float32 whole numbers; gradients pass inside of the format's codes."""
        moved = record.codes.float() + _dither(*record.shape, record.codes.device) + self.delta()
        nearest = moved + (moved.detach().round() - moved.detach())
        return nearest.clamp(record.spec.code_low, record.spec.code_high)


def _dither(rows: int, columns: int, device: torch.device) -> Tensor:
    """[rows, columns] float32 between -0.5 and 0.5, evenly spread: where in its cell every weight is taken to be."""
    down = torch.arange(rows, device=device, dtype=torch.float64)[:, None] * _LATTICE[0]
    across = torch.arange(columns, device=device, dtype=torch.float64) * _LATTICE[1]
    return (((down + across) % 1.0) * _WIDTH - _WIDTH / 2).float()


ADAPTERS: dict[str, type[AdaptedLinear]] = {
    "requantize": AdaptedLinear,
    "zero_points": ZeroPointAdapter,
    "codes": CodeAdapter,
}
"""Adapters by how they merge."""
