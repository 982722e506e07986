"""What the static input of a layer looks like while it trains: codes of a few samples, taken in some of its passes."""

from __future__ import annotations

import torch
from torch import Tensor

# One pass in so many is looked at, and about so many values of it: some microseconds per step on average.
_EVERY = 16
_VALUES = 4096


class InputWatch:
    """Counts codes of a static input.

    Attributes:
        passes: since the last look.
        clipped: values that lay outside of the range.
        seen: values that were looked at.
        counts: [codes] int64, how often each code was seen; None before the first.
    """

    def __init__(self) -> None:
        self.reset_()

    def reset_(self) -> None:
        """Forget what was seen; the next pass is looked at."""
        self.passes, self.clipped, self.seen = 0, 0, 0
        self.counts: Tensor | None = None

    def due(self) -> bool:
        """Whether this pass is one to look at."""
        self.passes += 1
        return self.passes % _EVERY == 1

    def see_(self, unclamped: Tensor, high: int) -> None:
        """Take in codes as they are before they are clamped to 0..high, as float."""
        codes = unclamped.clamp(0, high)
        self.clipped += int((codes != unclamped).sum())
        self.seen += codes.numel()
        counts = torch.bincount(codes.flatten().to(torch.int64).cpu(), minlength=high + 1)
        self.counts = counts if self.counts is None else self.counts + counts


def first_samples(x: Tensor) -> Tensor:
    """The first samples of a batch, some thousand values."""
    return x[: max(1, _VALUES * x.shape[0] // max(x.numel(), 1))].detach()
