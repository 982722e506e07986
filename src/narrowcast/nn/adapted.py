"""A linear layer with a frozen quantized weight and a low-rank adapter that adds to its output.

With A [rank, in] and B [out, rank], both float, y = x W^T + (alpha / rank) dropout(x) A^T B^T.

Source:
    LoRA: Hu et al. 2021, arXiv:2106.09685. QLoRA: Dettmers et al. 2023, arXiv:2305.14314. Differs: any format, and the
    integer kernels in the forward pass.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from narrowcast.errors import ModelError, RecipeError
from narrowcast.kernels.reference_linear import FUSED
from narrowcast.nn.frozen import FrozenLinear
from narrowcast.nn.linear import QuantizedLinear

MERGES = ("requantize", "zero_points", "codes")
"""The ways in which adapters add up and merge; see `nn.adapters`."""


@dataclass(frozen=True)
class AdapterSettings:
    """What an adapter is.

    Args:
        rank: rows of A and columns of B.
        alpha: the adapter counts alpha / rank.
        dropout: share of inputs of the adapter, drawn anew in every pass, that count nothing in training.
        merge: how it adds up, a name in `MERGES`.
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
        if self.merge not in MERGES:
            raise RecipeError(f"adapters: merge is {self.merge!r}; use one of {', '.join(MERGES)}")
        if self.merge == "codes" and self.dropout:
            raise RecipeError(
                "adapters: with merge 'codes' the adapter is in the weight, so there is no dropout; use 0"
            )


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
