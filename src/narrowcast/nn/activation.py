"""How a quantized module treats its input: leave it float, quantize it as it comes, or by a range fixed beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from narrowcast.core import PerTensor, PerToken, QuantSpec
from narrowcast.errors import FormatError


@dataclass(frozen=True)
class Activation:
    """The treatment of one module's input.

    Args:
        spec: format of the input codes; None leaves the input in float.
        scale: input units per code of a static range; None for a range found at run time.
        zero_point: code of 0.0 of a static range.
    """

    spec: QuantSpec | None = None
    scale: float | None = None
    zero_point: int = 0

    @property
    def mode(self) -> str:
        """One of "float", "cast" (to a 16-bit float), "dynamic", "static"."""
        if self.spec is None:
            return "float"
        if not self.spec.format.scaled:
            return "cast"
        return "dynamic" if isinstance(self.spec.granularity, PerToken) else "static"

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` takes them back."""
        return {"spec": None if self.spec is None else str(self.spec), "scale": self.scale, "zero_point": self.zero_point}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Activation:
        """The activation that `to_dict` described."""
        spec = None if values["spec"] is None else QuantSpec.parse(values["spec"])
        scale = None if values["scale"] is None else float(values["scale"])
        return cls(spec, scale, int(values["zero_point"]))


FLOAT = Activation()


def activation_spec(text: str) -> QuantSpec:
    """The specs that inputs may have: int8/token (dynamic), uint8/tensor (static), fp16 and bf16 (a cast).

    Raises:
        FormatError: any other format; the message lists these.
    """
    spec = QuantSpec.parse(text)
    name, granularity = spec.format.name, spec.granularity
    dynamic = name == "int8" and isinstance(granularity, PerToken) and spec.symmetric
    static = name == "uint8" and isinstance(granularity, PerTensor)
    if dynamic or static or name in ("fp16", "bf16", "fp32"):
        return spec
    raise FormatError(
        f"input {text!r}: no kernel takes such activations; use 'int8/token' (range found at run time), "
        "'uint8/tensor static:<observer>' (range from calibration), 'bf16', 'fp16', or leave input out for float"
    )
