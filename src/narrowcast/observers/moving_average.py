"""MovingAverage: the range of a typical sample, from exponentially weighted means of the samples' own ranges.

    low <- momentum * low + (1 - momentum) * min(sample),   high likewise; the first sample starts both.

Source:
    Jacob et al. 2018, arXiv:1712.05877, section 3.1 (exponential moving averages of activation ranges). Differs: one
    step per sample (first dimension) and not per batch, so the batch size does not change the answer. The order of
    the samples does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.errors import RecipeError
from narrowcast.observers.base import Observer


class MovingAverage(Observer):
    """Exponentially weighted mean of every sample's minimum and maximum.

    Args:
        momentum: weight of the past, 0 <= momentum < 1.

    Raises:
        RecipeError: momentum is outside of that.
    """

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0.0 <= momentum < 1.0:
            raise RecipeError(f"moving_average({momentum:g}): momentum must be at least 0 and below 1, like 0.9")
        self.momentum = momentum
        self._bounds: tuple[float, float] | None = None

    def _take(self, values: Tensor) -> None:
        samples = values.reshape(1, 1) if values.dim() == 0 else values.reshape(values.shape[0], -1)
        for low, high in torch.stack(samples.aminmax(dim=1), dim=1).tolist():
            if self._bounds is None:
                self._bounds = (low, high)
                continue
            past, new = self.momentum, 1.0 - self.momentum
            self._bounds = (past * self._bounds[0] + new * low, past * self._bounds[1] + new * high)

    def _range(self) -> tuple[float, float]:
        assert self._bounds is not None
        return self._bounds
