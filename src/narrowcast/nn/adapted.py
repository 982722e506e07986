"""Linear layers with a frozen quantized weight and a low-rank adapter that trains; and the three ways they add up.

The weight stays as it is stored, in no other copy: the forward pass runs the module's own kernel, and the gradient of
the input goes through the weight dequantized for the moment. With A [rank, columns] and B [out, rank], both float,

    requantize    y = x W^T + (alpha / rank) dropout(x) A^T B^T                  LoRA over a quantized base
    zero_points   W = scale * (code - round(zero - (alpha / rank) B A / scale))  one column of A per group
    codes         W = scale * (round(code + (alpha / rank) B A) - zero)

Adapters of the last two change integers while they train, and merge without any loss.

Source:
    LoRA: Hu et al. 2021, arXiv:2106.09685. QLoRA: Dettmers et al. 2023, arXiv:2305.14314. Differs: any format, and the
    integer kernels in the forward pass. Zero points: QA-LoRA, Xu et al. 2023, arXiv:2309.14717. Differs: zero points
    are stored as integers, so training rounds them too, straight through. Codes: LR-QAT, Bondarenko et al. 2024,
    arXiv:2406.06385. Differs: the base is the codes alone, without the fractions that rounding took away.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from narrowcast.core import PerChannel, PerGroup, QuantizedTensor, expand_to_matrix, through
from narrowcast.errors import ModelError, RecipeError
from narrowcast.kernels.reference_linear import FUSED
from narrowcast.nn.activation import INTEGER_MODES
from narrowcast.nn.linear import QuantizedLinear
from narrowcast.nn.trained_inputs import Rounding, StaticRange, product, unclamped_codes

# Steps of the most even sequence of points known in the plane: the inverse of the plastic number, and its square.
_LATTICE = (0.7548776662466927, 0.5698402909980532)
# Of a cell; the rest keeps every code at the start what it is.
_WIDTH = 0.99


@dataclass(frozen=True)
class AdapterSettings:
    """What an adapter is.

    Args:
        rank: rows of A and columns of B.
        alpha: the adapter counts alpha / rank.
        dropout: share of inputs of the adapter, drawn anew in every pass, that count nothing in training.
        merge: how it adds up, a name in `ADAPTERS`.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    merge: str = "requantize"

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise RecipeError(f"adapters: rank is a whole number >= 1, got {self.rank!r}")
        if not isinstance(self.alpha, int | float) or not 0 < self.alpha < math.inf:
            raise RecipeError(f"adapters: alpha is a positive number, got {self.alpha!r}")
        if not isinstance(self.dropout, int | float) or not 0 <= self.dropout < 1:
            raise RecipeError(f"adapters: dropout is a share from 0 to below 1, got {self.dropout!r}")
        if self.merge not in ADAPTERS:
            raise RecipeError(f"adapters: merge is {self.merge!r}; use one of {', '.join(ADAPTERS)}")
        if self.merge == "codes" and self.dropout:
            raise RecipeError(
                "adapters: with merge 'codes' the adapter is in the weight, so there is no dropout; use 0"
            )


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


class AdaptedLinear(FrozenLinear):
    """Base of the layers with an adapter; this one adds to the output ("requantize").

    Args:
        path, base: see `FrozenLinear`.
        settings: of the adapter.

    Attributes:
        lora_A: [rank, columns] float32, at random at the start.
        lora_B: [out_features, rank] float32, 0 at the start: the layer starts as its base.

    Raises:
        ModelError: the rank is larger than the matrix, or the format cannot take such an adapter.
    """

    lora_A: nn.Parameter  # noqa: N815  the names that PEFT and everybody after it have
    lora_B: nn.Parameter  # noqa: N815
    settings: Tensor
    exact: ClassVar[bool] = False

    def __init__(self, path: str, base: QuantizedLinear, settings: AdapterSettings) -> None:
        self.check(path, base, settings)
        columns = self.columns(base)
        super().__init__(path, base)
        self.settings_ = settings
        self.factor = settings.alpha / settings.rank
        device = base.weight_codes.device
        self.lora_A = nn.Parameter(torch.empty(settings.rank, columns, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, settings.rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.dropout = nn.Dropout(settings.dropout)
        text = json.dumps({"alpha": settings.alpha, "merge": settings.merge, "rank": settings.rank}).encode()
        self.register_buffer("settings", torch.frombuffer(bytearray(text), dtype=torch.uint8).clone())

    @classmethod
    def refusal(cls, base: QuantizedLinear) -> str:
        """Why a layer cannot have this adapter, with the remedy; "" when it can."""
        if type(base) is not QuantizedLinear:
            return f"a {base.kind} cannot have an adapter: some of its columns are float; leave the layer out"
        return ""

    @classmethod
    def check(cls, path: str, base: QuantizedLinear, settings: AdapterSettings) -> None:
        """Raise ModelError where a layer cannot have this adapter."""
        if why := cls.refusal(base):
            raise ModelError(f"layer {path!r}: {why}")
        sides = base.out_features, cls.columns(base)
        if settings.rank > min(sides):
            raise ModelError(
                f"layer {path!r}: rank {settings.rank} is more than its adapter can have, which is "
                f"{sides[0]}x{sides[1]}; use at most {min(sides)}, or leave the layer out"
            )

    @classmethod
    def columns(cls, base: QuantizedLinear) -> int:
        """Columns of A."""
        return base.in_features

    def delta(self) -> Tensor:
        """(alpha / rank) B A, float32."""
        return self.factor * (self.lora_B.float() @ self.lora_A.float())

    def forward(self, x: Tensor) -> Tensor:
        """See `FrozenLinear`."""
        y = self.frozen_product(x)
        dtype = y.dtype
        low = functional.linear(self.dropout(self.clipped(x).to(dtype)), self.lora_A.to(dtype))
        return FUSED[self.fused](y + self.factor * functional.linear(low, self.lora_B.to(dtype)))

    def clipped(self, x: Tensor) -> Tensor:
        """The input as far as a static range goes: the merged layer reads no more of it."""
        ranges = self.base.input_ranges()
        if ranges.scale is None or ranges.zero_point is None:
            return x
        zero = ranges.zero_point.float()
        return torch.minimum(torch.maximum(x, -zero * ranges.scale), (ranges.code_high - zero) * ranges.scale)

    def merged_weight(self) -> Tensor:
        """[out, in] float32: what is to be quantized; input scales taken in as the base has them."""
        delta, ratio = self.delta().detach(), self.base.input_ranges().ratio()
        self.base.restore_layout_()
        weight = self.base.stored("weight").dequantize(self.base)
        return weight + (delta if ratio is None else delta * ratio)

    def check_finite(self) -> None:
        """Raise ModelError where training has left no numbers."""
        if not all(bool(torch.isfinite(part).all()) for part in (self.lora_A, self.lora_B)):
            raise ModelError(
                f"layer {self.path!r}: its trained adapter is not finite; the loss was probably NaN or infinite: lower "
                "the learning rate, clip gradients, and go on from the last good state_dict"
            )

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        given = state.get(prefix + "settings")
        if given is not None and not torch.equal(given.cpu(), self.settings.cpu()):
            raise RecipeError(
                f"layer {self.path!r}: the state_dict has another adapter: {bytes(given.cpu().tolist()).decode()}, "
                f"this one is {bytes(self.settings.cpu().tolist()).decode()}; attach adapters "
                "with the same settings"
            )
        super()._load_from_state_dict(state, prefix, *rest)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"rank={self.settings_.rank}, alpha={self.settings_.alpha:g}, merge={self.settings_.merge}"


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
        return product(x, weight, base.bias, rounding, _static_range(base), None)

    def _codes(self, record: QuantizedTensor) -> Tensor:
        """[out, in] float32 whole numbers; gradients pass inside of the format's codes."""
        moved = record.codes.float() + _dither(*record.shape, record.codes.device) + self.delta()
        nearest = moved + (moved.detach().round() - moved.detach())
        return nearest.clamp(record.spec.code_low, record.spec.code_high)


ADAPTERS: dict[str, type[AdaptedLinear]] = {
    "requantize": AdaptedLinear,
    "zero_points": ZeroPointAdapter,
    "codes": CodeAdapter,
}
"""Adapters by how they merge."""


def _dither(rows: int, columns: int, device: torch.device) -> Tensor:
    """[rows, columns] float32 between -0.5 and 0.5, evenly spread: where in its cell every weight is taken to be."""
    down = torch.arange(rows, device=device, dtype=torch.float64)[:, None] * _LATTICE[0]
    across = torch.arange(columns, device=device, dtype=torch.float64) * _LATTICE[1]
    return (((down + across) % 1.0) * _WIDTH - _WIDTH / 2).float()


def _static_range(base: QuantizedLinear) -> StaticRange | None:
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
            assert ranges.mode in INTEGER_MODES
            codes = unclamped_codes(x, Rounding.of(ranges, -1, 0), _static_range(ctx.base))
            of_x = of_x * ((codes >= 0) & (codes <= ranges.code_high))
        return of_x, None
