"""How a quantized module treats its input: leave it float, quantize it as it comes, or by ranges fixed beforehand."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from narrowcast.core import PerChannel, PerTensor, PerToken, QuantSpec
from narrowcast.errors import FormatError


@dataclass(frozen=True, eq=False)
class Activation:
    """The treatment of one module's input.

    Args:
        spec: format of the input codes; None leaves the input in float.
        scale: [1] or [channels] float32, input units per code of a static range; None for any other mode. With one
            scale per channel the weight that goes with it holds `weight * scale / max(scale)`.
        zero_point: [1] or [channels] uint8, the codes of 0.0 of a static range; at most `code_high`.
        outliers: [outliers] int64, channels of a linear layer's input that stay float; None quantizes all.
    """

    spec: QuantSpec | None = None
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    outliers: Tensor | None = None

    @property
    def mode(self) -> str:
        """One of "float", "cast" (to a 16-bit float), "dynamic", "asymmetric" (dynamic with zero points), "static"."""
        return activation_mode(self.spec)

    @property
    def code_high(self) -> int:
        """The largest code of a static range; codes begin at 0."""
        return 255 if self.spec is None else int(self.spec.format.high)

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` takes them back, but for the numbers, which are stored as tensors."""
        channels = 0 if self.scale is None else self.scale.numel()
        return {"spec": None if self.spec is None else str(self.spec), "channels": channels}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Activation:
        """The activation that `to_dict` described, its tensors on the meta device."""
        spec = None if values["spec"] is None else QuantSpec.parse(values["spec"])
        channels = int(values["channels"])
        if not channels:
            return cls(spec)
        scale = torch.empty(channels, device="meta")
        return cls(spec, scale, torch.empty(channels, dtype=torch.uint8, device="meta"))

    def ratio(self) -> Tensor | None:
        """[channels] scale of each channel relative to the largest, taken in by the weight; None for one scale."""
        if self.scale is None or self.scale.numel() == 1:
            return None
        return self.scale / self.scale.max()

    def scaled(self, factor: float) -> Activation:
        """The same with a static scale multiplied by a factor; the codes of 0.0 and ratios of channels stay."""
        assert self.scale is not None
        return replace(self, scale=self.scale * torch.tensor(factor))


FLOAT = Activation()


def activation_mode(spec: QuantSpec | None) -> str:
    """See `Activation.mode`."""
    if spec is None:
        return "float"
    if not spec.format.scaled:
        return "cast"
    if not isinstance(spec.granularity, PerToken):
        return "static"
    return "dynamic" if spec.symmetric else "asymmetric"


INTEGER_MODES = ("dynamic", "asymmetric", "static")


def activation_spec(text: str) -> QuantSpec:
    """The specs that inputs may have.

    They are int8/token and uint8/token (a range per token or sample, found at run time, the second with a zero point of
    its own), uint8/tensor and uint8/channel (static, one range or one per input channel), the same in 4 bits, which run
    in the kernels of 8 (uint4/tensor, uint4/channel), bf16 and fp16 (a cast), fp32 (as it is).

    Raises:
        FormatError: any other format; the message lists these.
    """
    spec = QuantSpec.parse(text)
    name, granularity = spec.format.name, spec.granularity
    dynamic = isinstance(granularity, PerToken) and (name == "uint8" or (name == "int8" and spec.symmetric))
    static = name in ("uint8", "uint4") and isinstance(granularity, PerTensor | PerChannel)
    if dynamic or static or name in ("fp16", "bf16", "fp32"):
        return spec
    raise FormatError(
        f"input {text!r}: no kernel takes such activations; use 'uint8/token' or 'int8/token' (range found at run "
        "time), 'uint8/tensor static:<observer>' or 'uint8/channel static:minmax' (ranges from calibration), either "
        "with 'uint4' for 'uint8', 'bf16', 'fp16', or leave input out for float"
    )
