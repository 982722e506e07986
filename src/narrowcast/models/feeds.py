"""Feeds: whose output channels are read by which input channels, and may be scaled on the way. Plain data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Reader:
    """A layer that reads a producer's channels.

    Args:
        path: of the module.
        columns: [in] int64, the producer's channel that each input channel reads; -1 where it reads something else.
    """

    path: str
    columns: Tensor


@dataclass(frozen=True)
class Feed:
    """One producer and all that reads its output.

    Args:
        producer: path of a layer or a normalization.
        readers: the layers that read channels of it, in order.
        free: [channels] bool: a positive factor on this channel goes through to the readers and nowhere else.
        ceiling: [channels] float: 6 where a ReLU6 lies on the way, else inf.
        shifts: [channels] bool: a constant goes through too (nothing but a ReLU and reshaping lies on the way).
        why: [channels] reason for each channel that is not free, "" for those that are.
        evidence: "a forward pass" or the name of the pattern.
    """

    producer: str
    readers: tuple[Reader, ...]
    free: Tensor
    ceiling: Tensor
    shifts: Tensor
    why: tuple[str, ...] = ()
    evidence: str = "a forward pass"

    @property
    def channels(self) -> int:
        """Output channels of the producer."""
        return self.free.numel()

    @property
    def reason(self) -> str:
        """Why most of the channels that are not free are not; "" when all are."""
        reasons = Counter(reason for reason in self.why if reason)
        return reasons.most_common(1)[0][0] if reasons else ""


@dataclass
class Feeds:
    """What was found in a model.

    Args:
        feeds: by path of the producer, those without a free channel included.
        notes: what the user should know of how they were found.
    """

    feeds: dict[str, Feed] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def usable(self) -> list[Feed]:
        """The feeds with at least one free channel that is read."""
        return [feed for feed in self.feeds.values() if feed.readers and bool(feed.free.any())]
