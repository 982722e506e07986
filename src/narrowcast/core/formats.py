"""The one table of number formats.

Owns what a code of each format means on its own: its bits, its range, its storage type, and the exact
encode and decode. It knows nothing of scales, zero points, tensors' shapes or models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from narrowcast.errors import FormatError

Kind = Literal["float", "int", "codebook", "exponent"]


@dataclass(frozen=True)
class NumberFormat:
    """One row of `FORMATS`: everything that is true of a format, whatever tensor uses it.

    Args:
        name: the name used in recipes, reports and files.
        kind: "float" (IEEE-like), "int" (codes are integers), "codebook" (codes index levels: those of the format, or
            learned ones of every block), "exponent" (codes are biased powers of two, used for scales only).
        bits: bits of one code.
        low: smallest value that a code stands for.
        high: largest value that a code stands for.
        storage: torch dtype that holds one unpacked code.
        levels: the value of every code, in code order; None where the storage dtype is the format itself or every
            block of a tensor has levels of its own.
    """

    name: str
    kind: Kind
    bits: int
    low: float
    high: float
    storage: torch.dtype
    levels: tuple[float, ...] | None = None

    @property
    def scaled(self) -> bool:
        """Whether tensors in this format carry scales (the 16- and 32-bit floats do not)."""
        return not self.learned and (self.kind != "float" or self.bits <= 8)

    @property
    def learned(self) -> bool:
        """Whether every block of a tensor has a table of levels of its own, in the place of a scale."""
        return self.kind == "codebook" and self.levels is None

    @property
    def is_cast(self) -> bool:
        """Whether a code alone is its value: neither scales nor learned levels."""
        return not self.scaled and not self.learned

    def encode(self, values: Tensor) -> Tensor:
        """Codes of the representable numbers nearest to `values`, ties to even.

        Args:
            values: [...] float32, any shape; finite.

        Returns:
            codes: [...] in `storage`; values beyond [low, high] become the nearest bound.

        Raises:
            FormatError: a value is not finite; the message names the first one. Or the levels are learned: what a
                code means is known with a tensor only, see `core.codebook`.

        Source:
            IEEE 754-2019 section 4.3.1 (round half to even); OCP 8-bit floating point, 2023 (FP8, saturating);
            OCP Microscaling formats 1.0 (FP4 E2M1, E8M0). Differs: all formats saturate, none produces infinity;
            zero has one code, so -0.0 is encoded as 0.0 in a codebook.
        """
        self._check_fixed()
        check_finite(values, self.name)
        values = values.to(torch.float32)
        if self.kind == "int":
            return values.round().clamp(self.low, self.high).to(self.storage)
        if self.kind == "exponent":
            return _nearest_power_of_two(values.clamp(self.low, self.high))
        if self.levels is not None:
            return _nearest_level(values, self.levels)
        return values.clamp(self.low, self.high).to(self.storage)

    def decode(self, codes: Tensor) -> Tensor:
        """The exact value of every code.

        Args:
            codes: [...] in `storage`.

        Returns:
            values: [...] float32; NaN for the codes that mean NaN in FP8 and E8M0, which `encode` never gives.

        Raises:
            FormatError: the levels are learned.
        """
        self._check_fixed()
        if self.kind == "exponent":
            return codes.contiguous().view(torch.float8_e8m0fnu).to(torch.float32)
        if self.levels is not None:
            table = torch.tensor(self.levels, dtype=torch.float32, device=codes.device)
            return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)
        return codes.to(torch.float32)

    def _check_fixed(self) -> None:
        if self.learned:
            raise FormatError(
                f"{self.name}: its levels are learned from a weight, so a number alone has no code; quantize a matrix"
            )


def check_finite(values: Tensor, what: str) -> None:
    """Raise where a value is NaN or infinite.

    Args:
        values: [...] any shape.
        what: the name that the message begins with.

    Raises:
        FormatError: naming the first bad element and how many there are.
    """
    if all_finite(values):
        return
    bad = ~torch.isfinite(values)
    where = first_index(bad)
    raise FormatError(
        f"{what}: element {where} is {float(values[where])}; {int(bad.sum())} of {values.numel()} values are not "
        "finite; remove NaN and infinity first"
    )


def all_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite, in one pass: the smallest and the largest are finite only if all are."""
    # NaN spreads into both bounds
    return values.numel() == 0 or all(math.isfinite(float(bound)) for bound in torch.aminmax(values))


def first_index(bad: Tensor) -> tuple[int, ...]:
    """The index of the first true element, for messages."""
    return tuple(int(index) for index in bad.nonzero()[0])


def _nearest_power_of_two(values: Tensor) -> Tensor:
    """Biased exponents of the nearest powers of two; a tie (1.5 times a power) goes up, as in the casts of torch.

    Those casts are not used: below 2^-126 they round up from 1.25 times a power on.
    """
    mantissa, exponent = torch.frexp(values)  # mantissa in [0.5, 1)
    return (exponent + 126 + (mantissa >= 0.75).to(torch.int32)).to(torch.uint8)


def _nearest_level(values: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Index of the level nearest to each value; a tie goes to the even index, which is the even mantissa in E2M1."""
    thresholds, codes = _thresholds(levels)
    position = torch.bucketize(values.contiguous(), thresholds.to(values.device), out_int32=True, right=True)
    return codes.to(values.device).index_select(0, position.reshape(-1)).view(values.shape)


@lru_cache
def _thresholds(levels: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """The float32 numbers at which the nearest level changes, and the code of each interval between them.

    A threshold is the smallest float32 that is nearer to the upper of two levels, or as near and its code is even:
    a comparison in float32 then decides exactly. Of two codes for one value (0.0 and -0.0) the first is used.
    """
    order = sorted({levels[index]: index for index in reversed(range(len(levels)))}.items())
    exact = torch.tensor([level for level, _ in order], dtype=torch.float32).to(torch.float64)
    codes = torch.tensor([index for _, index in order], dtype=torch.uint8)
    middle = (exact[:-1] + exact[1:]) / 2
    nearest = middle.to(torch.float32)
    too_low = (nearest < middle) | ((nearest == middle) & (codes[1:] % 2 == 1))
    return torch.where(too_low, torch.nextafter(nearest, torch.full_like(nearest, torch.inf)), nearest), codes


# Dettmers et al. 2023, QLoRA, arXiv:2305.14314, appendix E: quantiles of N(0, 1), normalised to [-1, 1].
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# OCP Microscaling formats 1.0, table 5: sign, 2 exponent bits, 1 mantissa bit.
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def _float_row(name: str, dtype: torch.dtype) -> NumberFormat:
    info = torch.finfo(dtype)
    return NumberFormat(name, "float", info.bits, info.min, info.max, dtype)


def _signed_row(bits: int) -> NumberFormat:
    return NumberFormat(f"int{bits}", "int", bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1, torch.int8)


FORMATS: dict[str, NumberFormat] = {
    row.name: row
    for row in (
        _float_row("fp32", torch.float32),
        _float_row("fp16", torch.float16),
        _float_row("bf16", torch.bfloat16),
        _float_row("fp8_e4m3", torch.float8_e4m3fn),
        _float_row("fp8_e5m2", torch.float8_e5m2),
        _signed_row(8),
        NumberFormat("uint8", "int", 8, 0, 255, torch.uint8),
        *(_signed_row(bits) for bits in (6, 5, 4, 3, 2)),
        NumberFormat("uint4", "int", 4, 0, 15, torch.uint8),
        NumberFormat("nf4", "codebook", 4, -1.0, 1.0, torch.uint8, _NF4),
        NumberFormat("fp4_e2m1", "codebook", 4, -6.0, 6.0, torch.uint8, _E2M1),
        *(NumberFormat(f"codebook{bits}", "codebook", bits, -65504.0, 65504.0, torch.uint8) for bits in (4, 3, 2)),
        NumberFormat("e8m0", "exponent", 8, 2.0**-127, 2.0**127, torch.uint8),
    )
}


def number_format(name: str) -> NumberFormat:
    """The row of `FORMATS` called `name`.

    Raises:
        FormatError: there is no such format; the message lists those that there are.
    """
    if name not in FORMATS:
        raise FormatError(f"number format {name!r} is not known; use one of {', '.join(FORMATS)}")
    return FORMATS[name]
