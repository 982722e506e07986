"""AWQ: weights that multiply large activations get finer steps, by a scale that is searched.

    s_j = mean|X_j|^r / sqrt(max s * min s),    Q(W_j * s_j),    X_j / s_j

The ratio r is chosen on a grid by the error of the quantized consumers' outputs on a sample of their inputs; r = 0,
which changes nothing, is one of the candidates, so on that sample no layer gets worse.

Source:
    Lin et al. 2023, arXiv:2306.00978, section 3.2, eq. 4 and 5. Differs: the error is that of the linear outputs
    instead of the whole attention or feed-forward block; the clipping search of the paper is what round-to-nearest
    does by itself (`Rtn(range="mse")`), and the search here already sees it; any pair that lets a factor through.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.errors import RecipeError
from narrowcast.transforms.pairs import Pair, checked_pairs
from narrowcast.transforms.scaling import limited


@dataclass(frozen=True)
class Awq:
    """AWQ.

    Args:
        grid: steps of the ratio between 0 and 1.
        pairs: (producer, consumer) glob patterns; empty takes every pair that keeps the function.
    """

    grid: int = 20
    pairs: tuple[Pair, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.grid, bool) or not isinstance(self.grid, int) or self.grid < 1:
            raise RecipeError(f"awq: grid is {self.grid!r}; use a whole number >= 1")
        object.__setattr__(self, "pairs", checked_pairs("awq", self.pairs))

    def ratios(self) -> tuple[float, ...]:
        """The ratios to try, in order."""
        return tuple(step / self.grid for step in range(self.grid + 1))


def awq_scale(magnitude: Tensor, ratio: float) -> Tensor:
    """The scale of every channel for one ratio.

    Args:
        magnitude: [channels] mean absolute value of each channel, >= 0.
        ratio: 0 (no scaling) to 1.

    Returns:
        [channels] float64 > 0; 1 for a silent channel.
    """
    magnitude = magnitude.double()
    alive = magnitude > 0
    if not bool(alive.any()):
        return torch.ones_like(magnitude)
    scale = magnitude.clamp(min=float(magnitude[alive].min())) ** ratio
    return limited(scale / (scale.max() * scale.min()).sqrt(), alive)
