"""SmoothQuant: what is hard to quantize in an activation moves into the weights that read it.

    s_j = max|X_j|^a / max|W_j|^(1 - a),    X_j / s_j,    W_j * s_j

The strength a = 0.5 shares the trouble evenly, 1 gives all of it to the weights. "search" tries strengths on a grid and
keeps, for every producer by itself, the one with the least error of its quantized consumers (weights and inputs as the
recipe has them) on a sample of their inputs; no scaling at all is one of the candidates.

Source:
    Xiao et al. 2023, arXiv:2211.10438, eq. 4. Differs: not only from a normalization into its linear layers, but along
    every pair that lets a factor through (values into the output projection, up into down, ReLU networks); the search.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from narrowcast.errors import RecipeError
from narrowcast.transforms.pairs import Pair, checked_pairs
from narrowcast.transforms.scaling import limited


@dataclass(frozen=True)
class SmoothQuant:
    """SmoothQuant.

    Args:
        strength: 0 to 1, or "search".
        grid: steps between 0 and 1 of the search.
        pairs: (producer, consumer) glob patterns; empty takes every pair that keeps the function.
    """

    strength: float | Literal["search"] = 0.5
    grid: int = 20
    pairs: tuple[Pair, ...] = ()

    def __post_init__(self) -> None:
        number = isinstance(self.strength, int | float) and not isinstance(self.strength, bool)
        if self.strength != "search" and not (number and 0 <= float(self.strength) <= 1):
            raise RecipeError(f"smoothquant: strength is {self.strength!r}; use a number from 0 to 1, or 'search'")
        if isinstance(self.grid, bool) or not isinstance(self.grid, int) or self.grid < 1:
            raise RecipeError(f"smoothquant: grid is {self.grid!r}; use a whole number >= 1")
        object.__setattr__(self, "pairs", checked_pairs("smoothquant", self.pairs))

    def strengths(self) -> tuple[float, ...]:
        """The strengths to try, in order."""
        if self.strength == "search":
            return tuple(step / self.grid for step in range(self.grid + 1))
        return (float(self.strength),)


def smoothing_scale(inputs: Tensor, weights: Tensor, strength: float) -> Tensor:
    """The scale of every channel.

    Args:
        inputs: [channels] largest absolute value of each channel, >= 0.
        weights: [channels] largest absolute weight that reads it, >= 0.
        strength: 0 to 1.

    Returns:
        [channels] float64 > 0; 1 for a channel that is dead on one side.
    """
    inputs, weights = inputs.double(), weights.double()
    return limited(inputs**strength / weights ** (1 - strength), (inputs > 0) & (weights > 0))
