"""Which images of a region travel as 8-bit codes, with which scales and zero points, and which as floats.

A convolution wants its input in the codes that calibration gave it. The wish travels back through pools and
concatenations to the operation that makes the image. What is added or averaged stays float32, as it is between modules:
rounding the residual stream of ResNet-20 to codes at every block costs 2 dB.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.nn.conv import QuantizedConv
from narrowcast.nn.regions import Region


class ConflictError(Exception):
    """A node of the region cannot be part of the network."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(f"{node}: {reason}")
        self.node, self.reason = node, reason


@dataclass(frozen=True, eq=False)
class Code:
    """What the codes of an image mean: value = (code - zero) * scale.

    Args:
        scale: [channels] float64.
        zero: [channels] float64, whole numbers 0 to `high`.
        high: the largest code; the smallest is 0.
    """

    scale: Tensor
    zero: Tensor
    high: int = 255

    @classmethod
    def of(cls, convolution: QuantizedConv) -> Code:
        """The codes that a convolution wants."""
        assert convolution.input_scale is not None and convolution.input_zero_point is not None
        channels = convolution.shape.in_channels
        return cls(
            convolution.input_scale.double().expand(channels), convolution.input_zero_point.double().expand(channels),
            convolution.activation.code_high,
        )  # fmt: skip

    def same(self, other: Code) -> bool:
        """Whether the codes mean the same."""
        alike = torch.equal(self.scale, other.scale) and torch.equal(self.zero, other.zero)
        return alike and self.high == other.high

    def part(self, start: int, count: int) -> Code:
        """The codes of some of the channels."""
        return Code(self.scale[start : start + count], self.zero[start : start + count], self.high)


def channel_counts(region: Region, convolutions: Mapping[str, QuantizedConv]) -> dict[str, int]:
    """Channels of every image of a region, inputs included.

    Raises:
        ConflictError: they do not follow from the convolutions.
    """
    counts: dict[str, int] = {}
    for name, op in region.ops.items():
        if op.kind == "conv":
            counts[op.sources[0]] = convolutions[name].shape.in_channels
            counts[name] = convolutions[name].shape.out_channels
            continue
        unknown = [source for source in op.sources if source not in counts]
        if unknown:
            raise ConflictError(name, f"it reads {unknown[0]}, which comes from outside and has no range")
        known = [counts[source] for source in op.sources]
        counts[name] = sum(known) if op.kind == "cat" else known[0] + sum(op.pad)
    return counts


@dataclass(frozen=True, eq=False)
class Wants:
    """In which form every image of a region is needed; one may be needed in both.

    Args:
        codes: name -> codes, for the images that a convolution reads.
        floats: the images that are added, averaged or leave the region: these keep full precision.
    """

    codes: dict[str, Code]
    floats: frozenset[str]


_PASSING = ("max_pool", "identity", "cat", "channel_pad")


def find_wants(region: Region, convolutions: Mapping[str, QuantizedConv], counts: Mapping[str, int]) -> Wants:
    """What the readers of every image want, followed back to where the image is made.

    Args:
        region: without identities.
        convolutions: name -> module.
        counts: channels of every image.

    Raises:
        ConflictError: two readers want different codes of one image, or an image cannot be had as its reader wants it.
    """
    codes: dict[str, Code] = {}
    floats = set(region.outputs)

    def want(image: str, code: Code, reader: str) -> None:
        if not codes.setdefault(image, code).same(code):
            raise ConflictError(reader, f"it reads {image} with another range than the other readers")

    for name, op in reversed(region.ops.items()):
        if op.kind == "conv":
            want(op.sources[0], Code.of(convolutions[name]), name)
            continue
        if op.kind not in _PASSING or name in floats:
            floats.update(op.sources)
        if op.kind in _PASSING and name in codes:
            if op.kind == "channel_pad":
                raise ConflictError(name, "a convolution reads padded channels")
            start = 0
            for source in op.sources:
                want(source, codes[name].part(start, counts[source]), name)
                start += counts[source] if op.kind == "cat" else 0
    for name, op in region.ops.items():
        missing = [source for source in op.sources if source not in region.ops and source not in codes]
        if missing:
            raise ConflictError(name, f"it reads {missing[0]}, which comes from outside and has no range")
        narrow = [s for s in op.sources if s not in region.ops and s in floats and codes[s].high < 255]
        if narrow:
            raise ConflictError(name, f"{narrow[0]} comes from outside and is read in fewer than 8 bits and as floats")
    return Wants(codes, frozenset(floats))
