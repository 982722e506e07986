"""What stands where a module stood that is now part of the layer before it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from narrowcast.nn.base import InstalledModule


class FoldedBatchNorm(InstalledModule):
    """Passes its input through; remembers the name of the convolution that took over its arithmetic."""

    kind = "FoldedBatchNorm"

    def __init__(self, convolution: str) -> None:
        super().__init__()
        self.convolution = convolution

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FoldedBatchNorm:
        """See `InstalledModule`."""
        return cls(config["convolution"])

    def config(self) -> dict[str, Any]:
        """See `InstalledModule`."""
        return {"convolution": self.convolution}

    def forward(self, x: Tensor) -> Tensor:
        """The input itself."""
        return x

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"into {self.convolution}"


class FusedActivation(InstalledModule):
    """Passes its input through; remembers the linear layer that applies the activation function now."""

    kind = "FusedActivation"

    def __init__(self, linear: str) -> None:
        super().__init__()
        self.linear = linear

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FusedActivation:
        """See `InstalledModule`."""
        return cls(config["linear"])

    def config(self) -> dict[str, Any]:
        """See `InstalledModule`."""
        return {"linear": self.linear}

    def forward(self, x: Tensor) -> Tensor:
        """The input itself."""
        return x

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in {self.linear}"
