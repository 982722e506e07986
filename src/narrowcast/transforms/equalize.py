"""Cross-layer equalization: two layers in a row share the ranges of the channels between them.

With r1_c the largest weight that makes channel c and r2_c the largest weight that reads it,

    s_c = sqrt(r1_c / r2_c),    W1_c / s_c,    W2_c * s_c

makes both ranges sqrt(r1_c r2_c). Between the layers may be nothing or a ReLU: relu(z / s) = relu(z) / s. Chains
(expand, depthwise, project) are balanced pair by pair until nothing moves.

ReLU6 lets a factor through only below its ceiling: min(z / s, 6) = min(z, 6 s) / s. Here a channel behind a ReLU6 is
scaled only where calibration saw it stay below `6 / headroom`, and never so that the new ceiling 6 s comes within that
headroom of what was seen; channels that reach the ceiling keep scale 1.

Source:
    Nagel et al. 2019, arXiv:1906.04721, section 4.1, eq. 8 to 11. Differs: the paper replaces ReLU6 by ReLU, which
    changes the function; scales are limited to 1/256 .. 256, so dead channels do not blow up their biases; several
    consumers of one producer count as one by their largest weight.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from narrowcast.errors import RecipeError
from narrowcast.transforms.pairs import Pair, checked_pairs
from narrowcast.transforms.scaling import limited


@dataclass(frozen=True)
class Equalize:
    """Cross-layer equalization.

    Args:
        rounds: most sweeps over all pairs.
        headroom: how far a channel must stay from a ReLU6's ceiling, as a factor.
        pairs: (producer, consumer) glob patterns; empty takes every pair that keeps the function.
    """

    rounds: int = 20
    headroom: float = 1.25
    pairs: tuple[Pair, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise RecipeError(f"equalize: rounds is {self.rounds!r}; use a whole number >= 1")
        if isinstance(self.headroom, bool) or not isinstance(self.headroom, int | float) or self.headroom < 1:
            raise RecipeError(f"equalize: headroom is {self.headroom!r}; use a number >= 1")
        object.__setattr__(self, "pairs", checked_pairs("equalize", self.pairs))


def equalizing_scale(first: Tensor, second: Tensor) -> Tensor:
    """The scale that makes two ranges the same, per channel.

    Args:
        first: [channels] largest weight that makes each channel, >= 0.
        second: [channels] largest weight that reads it, >= 0.

    Returns:
        [channels] float64 > 0; 1 for a channel that is dead on one side.
    """
    first, second = first.double(), second.double()
    return limited((first / second).sqrt(), (first > 0) & (second > 0))


def lowest_scale(largest: Tensor, ceiling: Tensor, headroom: float) -> tuple[Tensor, Tensor]:
    """What a ceiling behind a channel allows.

    Args:
        largest: [channels] largest value seen before the ceiling.
        ceiling: [channels] the ceiling (6 for ReLU6), inf where there is none.
        headroom: factor >= 1 to stay below it.

    Returns:
        lowest: [channels] smallest scale allowed.
        movable: [channels] bool: whether the channel may be scaled at all.
    """
    used = largest.double().clamp(min=0) * headroom / ceiling.double()
    return used, used < 1
