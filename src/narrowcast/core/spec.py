"""QuantSpec: a format, its granularity, symmetric or not, and the format of its scales, as one short text."""

from __future__ import annotations

from dataclasses import dataclass

from narrowcast.core.formats import NumberFormat, number_format
from narrowcast.core.granularity import (
    Granularity,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    block_shape,
    parse_granularity,
)
from narrowcast.errors import FormatError

SCALE_FORMATS = ("fp32", "fp16", "e8m0", "int8")
# OCP Microscaling formats 1.0: blocks of 32 with a power-of-two scale.
ALIASES = {"mxfp4": "fp4_e2m1/group32/scale:e8m0", "mxfp8": "fp8_e4m3/group32/scale:e8m0"}


@dataclass(frozen=True)
class QuantSpec:
    """How a matrix of numbers is stored.

    `QuantSpec.parse("int4/group32/asym")` and `str(spec)` are inverse. The text is
    `format[/granularity][/sym|/asym][/scale:format]`; what is left out is per channel for signed formats and
    per tensor for `uint8`, symmetric unless the format is unsigned, scales in float16 for groups and float32 otherwise.

    Args:
        format: a row of FORMATS.
        granularity: which values share a scale.
        symmetric: whether 0.0 is always code 0 and there is no zero point.
        scale_format: "fp32", "fp16", "e8m0" (powers of two) or "int8" (8-bit scales under one float scale per row).
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
        if self.symmetric and self.format.low == 0:
            raise FormatError(f"{self.format.name} is unsigned, so it cannot be symmetric; write '/asym' or use a signed one")

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """The spec written as `text`.

        Raises:
            FormatError: a part of the text is unknown, stands twice, or does not fit the format; the message has
                the text as typed and what is accepted.
        """
        if not isinstance(text, str):
            raise FormatError(f"a format specification is a text like 'int4/group32/asym', got {type(text).__name__}")
        parts = ALIASES.get(text.strip(), text.strip()).split("/")
        number = number_format(parts[0])
        given: dict[str, object] = {}
        for part in parts[1:]:
            key, value = _parse_part(part, text)
            if key in given:
                raise FormatError(f"specification {text!r}: {key} is given twice; keep one")
            given[key] = value
        default = PerTensor() if number.low == 0 or not number.scaled else PerChannel()
        granularity = given.get("granularity", default)
        assert isinstance(granularity, PerTensor | PerChannel | PerToken | PerGroup) or granularity is not None
        symmetric = bool(given.get("symmetric", number.low != 0))
        scale = str(given.get("scale", "fp16" if isinstance(granularity, PerGroup) else "fp32"))
        try:
            return cls(number, granularity, symmetric, scale)  # type: ignore[arg-type]
        except FormatError as error:
            raise FormatError(f"specification {text!r}: {error}") from None

    def __str__(self) -> str:
        if not self.format.scaled:
            return self.format.name
        parts = [self.format.name, str(self.granularity)]
        if not self.symmetric and self.format.low != 0:
            parts.append("asym")
        if self.scale_format != ("fp16" if isinstance(self.granularity, PerGroup) else "fp32"):
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

    def bits_per_value(self, shape: tuple[int, int]) -> float:
        """Stored bits per value of a matrix of `shape`, scales and zero points counted.

        A zero point takes 8 bits; an "int8" scale format adds one bfloat16 scale per row of blocks.
        """
        if not self.format.scaled or not shape[0] * shape[1]:
            return float(self.format.bits)
        tall, wide = block_shape(self.granularity, shape)
        blocks_down, blocks_across = -(-shape[0] // tall), -(-shape[1] // wide)
        scale_bits = {"fp32": 32, "fp16": 16, "e8m0": 8, "int8": 8}[self.scale_format]
        overhead = blocks_down * blocks_across * (scale_bits + (0 if self.symmetric else 8))
        if self.scale_format == "int8":
            overhead += blocks_down * 16
        row_bits = -(-shape[1] * self.format.bits // 8) * 8  # packed rows end on a byte
        return (shape[0] * row_bits + overhead) / (shape[0] * shape[1])


def _parse_part(part: str, text: str) -> tuple[str, object]:
    if part in ("sym", "asym"):
        return "symmetric", part == "sym"
    if part.startswith("scale:"):
        return "scale", part.removeprefix("scale:")
    try:
        return "granularity", parse_granularity(part)
    except FormatError:
        raise FormatError(
            f"specification {text!r}: part {part!r} is not known; after the format come tensor, channel, token, "
            "group<size> or block<r>x<c>, then sym or asym, then scale:fp32|fp16|e8m0|int8"
        ) from None
