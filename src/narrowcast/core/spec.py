"""QuantSpec: a format, its granularity, symmetric or not, and the format of its scales, as one short text."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from narrowcast.core.formats import NumberFormat, number_format
from narrowcast.core.granularity import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    block_shape,
    parse_granularity,
)
from narrowcast.errors import FormatError

SCALE_FORMATS = ("fp32", "fp16", "e8m0", "int8", "k6")
SUPER_BLOCK = 256
"""Columns under one float16 scale in the scale format "k6"."""
SUPER_BITS = 6
"""Bits of a scale, and of a zero point, in it."""
# OCP Microscaling formats 1.0: blocks of 32 with a power-of-two scale.
ALIASES = {"mxfp4": "fp4_e2m1/group32/scale:e8m0", "mxfp8": "fp8_e4m3/group32/scale:e8m0"}

_UNSCALED = {"granularity": PerTensor(), "symmetric": True, "scale_format": "fp32"}


@dataclass(frozen=True)
class QuantSpec:
    """How a matrix of numbers is stored.

    `QuantSpec.parse("int4/group32/asym")` and `str(spec)` are inverse. The text is
    `format[/granularity][/sym|/asym][/scale:format]`; what is left out is per channel for signed formats and
    per tensor for `uint8`, symmetric unless the format is unsigned, scales in float16 for groups and float32 otherwise.
    Formats with learned levels ("codebook4/channel") have neither scales nor zero points: float16 levels per block.

    Args:
        format: a row of FORMATS.
        granularity: which values share a scale.
        symmetric: whether 0.0 is always code 0 and there is no zero point.
        scale_format: "fp32", "fp16", "e8m0" (powers of two), "int8" (8-bit scales under one float scale per row) or
            "k6" (6-bit scales, and 6-bit zero points, under one float16 scale per 256 columns of a row).
    """

    format: NumberFormat
    granularity: Granularity
    symmetric: bool
    scale_format: str

    def __post_init__(self) -> None:
        if self.scale_format not in SCALE_FORMATS:
            raise FormatError(f"scale format {self.scale_format!r} is not known; use one of {', '.join(SCALE_FORMATS)}")
        if self.format.kind == "exponent":
            raise FormatError(f"{self.format.name} holds scales, not weights or activations; choose another format")
        if not self.symmetric and self.format.kind != "int":
            raise FormatError(f"{self.format.name} has no zero point; leave out 'asym' or use an integer format")
        if not isinstance(self.granularity, Granularity):
            raise FormatError(f"a granularity is PerTensor(), PerChannel(), PerGroup(32) ..., got {self.granularity!r}")
        if self.format.learned and self.scale_format != default_scale_format(self.granularity):
            raise FormatError(f"{self.format.name} has float16 levels and no scales; leave out 'scale:'")
        if self.scale_format == "k6":
            _check_super_blocks(self)
        if self.format.is_cast and vars(self) | _UNSCALED != vars(self):
            raise FormatError(f"{self.format.name} carries no scales; write {self.format.name!r} alone")
        if self.symmetric and self.format.low == 0:
            raise FormatError(f"{self.format.name} is unsigned and cannot be symmetric; write '/asym' or a signed one")

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """The spec written as `text`.

        Raises:
            FormatError: a part of the text is unknown, stands twice, or does not fit the format; the message has
                the text as typed and what is accepted.
        """
        if not isinstance(text, str):
            raise FormatError(f"a format specification is a text like 'int4/group32/asym', got {type(text).__name__}")
        head, *rest = ALIASES.get(text.strip(), text.strip()).split("/")
        try:
            number = number_format(head)
            given = _parse_parts(rest)
            granularity = given.granularity
            if granularity is None:
                granularity = PerTensor() if number.low == 0 or number.is_cast else PerChannel()
            symmetric = number.low != 0 if given.symmetric is None else given.symmetric
            return cls(number, granularity, symmetric, given.scale_format or default_scale_format(granularity))
        except FormatError as error:
            raise FormatError(f"specification {text!r}: {error}") from None

    def __str__(self) -> str:
        if self.format.is_cast:
            return self.format.name
        parts = [self.format.name, str(self.granularity)]
        if not self.symmetric and self.format.low != 0:
            parts.append("asym")
        if self.scale_format != default_scale_format(self.granularity):
            parts.append(f"scale:{self.scale_format}")
        return "/".join(parts)

    @property
    def code_low(self) -> int:
        """Smallest code in use; symmetric integer formats are narrow (int8: -127), so that -x is always a code."""
        return int(-self.format.high if self.symmetric else self.format.low)

    @property
    def code_high(self) -> int:
        """Largest code in use."""
        return int(self.format.high)

    @property
    def zero_step(self) -> float:
        """What zero points are multiples of, in code steps: 1, or in super-blocks the 64th part of the codes."""
        return math.ldexp(1.0, self.format.bits - SUPER_BITS) if self.scale_format == "k6" else 1.0

    @property
    def zero_high(self) -> float:
        """The largest zero point; the smallest is `code_low`."""
        steps = 2**SUPER_BITS - 1
        return self.code_low + steps * self.zero_step if self.scale_format == "k6" else self.code_high

    @property
    def blocks_in_super(self) -> int:
        """Blocks under one float16 scale in the scale format "k6"."""
        assert isinstance(self.granularity, PerGroup)
        return SUPER_BLOCK // self.granularity.size

    def bits_per_value(self, shape: tuple[int, int]) -> float:
        """Stored bits per value of a matrix of `shape`, scales and zero points counted.

        A zero point takes 8 bits; an "int8" scale format adds one bfloat16 scale per row of blocks. Scales and zero
        points of "k6" take 6 bits, the rows of each end on a byte, and a float16 scale per 256 columns comes on top.
        Learned levels take 16 bits each.
        """
        if self.format.is_cast or not shape[0] * shape[1]:
            return float(self.format.bits)
        tall, wide = block_shape(self.granularity, shape)
        blocks_down, blocks_across = -(-shape[0] // tall), -(-shape[1] // wide)
        if self.format.learned:
            overhead = blocks_down * blocks_across * (16 << self.format.bits)
        elif self.scale_format == "k6":
            parts = -(-blocks_across * SUPER_BITS // 8) * 8 * (1 if self.symmetric else 2)
            overhead = blocks_down * (parts + -(-shape[1] // SUPER_BLOCK) * 16)
        else:
            scale_bits = {"fp32": 32, "fp16": 16, "e8m0": 8, "int8": 8}[self.scale_format]
            overhead = blocks_down * blocks_across * (scale_bits + (0 if self.symmetric else 8))
        if self.scale_format == "int8":
            overhead += blocks_down * 16
        row_bits = -(-shape[1] * self.format.bits // 8) * 8  # packed rows end on a byte
        return (shape[0] * row_bits + overhead) / (shape[0] * shape[1])


def _check_super_blocks(spec: QuantSpec) -> None:
    group = spec.granularity.size if isinstance(spec.granularity, PerGroup) else 0
    if group == 0 or SUPER_BLOCK % group:
        raise FormatError(
            f"scale:k6 is for groups of which a whole number makes {SUPER_BLOCK} columns, got {spec.granularity}; use "
            "group16 or group32"
        )
    if not spec.symmetric and spec.format.bits > SUPER_BITS:
        raise FormatError(
            f"scale:k6 has zero points of {SUPER_BITS} bits, too few for {spec.format.name}; leave out 'asym'"
        )


def default_scale_format(granularity: Granularity) -> str:
    """The scale format where a spec names none: float16 for groups, of which there are many, else float32."""
    return "fp16" if isinstance(granularity, PerGroup) else "fp32"


@dataclass(frozen=True)
class _Parts:
    """What a text says after the format; None where it says nothing."""

    granularity: Granularity | None = None
    symmetric: bool | None = None
    scale_format: str | None = None


def _parse_parts(parts: list[str]) -> _Parts:
    given = _Parts()
    for part in parts:
        if part in ("sym", "asym"):
            found = _Parts(symmetric=part == "sym")
        elif part.startswith("scale:"):
            found = _Parts(scale_format=part.removeprefix("scale:"))
        else:
            found = _Parts(granularity=_parse_granularity_part(part))
        said = {key: value for key, value in vars(found).items() if value is not None}
        for key in said:
            if getattr(given, key) is not None:
                raise FormatError(f"{part!r} gives the {key.replace('_', ' ')} a second time; keep one")
        given = replace(given, **said)
    return given


def _parse_granularity_part(part: str) -> Granularity:
    try:
        return parse_granularity(part)
    except FormatError as error:
        raise FormatError(
            f"part {part!r}: {error}; after the granularity come sym or asym and scale:{'|'.join(SCALE_FORMATS)}"
        ) from None
