"""FreezeSchedule: when BatchNorm statistics stop following batches, and when ranges stop being trained.

Source:
    Krishnamoorthi 2018, arXiv:1806.08342, section 3.2.2: after some time use running statistics, as inference does.
    Freezing ranges late: Nagel et al. 2022, arXiv:2203.11086, on oscillating weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from narrowcast.errors import RecipeError
from narrowcast.nn.trained_conv import TrainedConv
from narrowcast.qat.state import twins_of, unwrapped


@dataclass(frozen=True)
class FreezeSchedule:
    """What is frozen from when on, counted in whatever the loop counts: epochs or steps.

        schedule = FreezeSchedule(batchnorm=3, ranges=8)
        for epoch in range(10):
            schedule.apply(model, epoch)
            ...

    Args:
        batchnorm: from this count on, BatchNorms inside of convolutions keep their statistics; None never.
        ranges: from this count on, scales and zero points of weights and static inputs stay; None never. Scales of
            weights still follow BatchNorms that are not frozen, as the weights do.
    """

    batchnorm: int | None = None
    ranges: int | None = None

    def __post_init__(self) -> None:
        for name in ("batchnorm", "ranges"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
                raise RecipeError(f"FreezeSchedule: {name} is a count of epochs or steps from 0 on, got {value!r}")

    def apply(self, model: nn.Module, count: int) -> None:
        """Freeze what is due at `count`, and let go what is not; the same count always gives the same state.

        Raises:
            ModelError: the model was not prepared.
        """
        for _, twin in twins_of(unwrapped(model)):
            if isinstance(twin, TrainedConv):
                twin.freeze_norm_(self.batchnorm is not None and count >= self.batchnorm)
            twin.freeze_ranges_(self.ranges is not None and count >= self.ranges)
