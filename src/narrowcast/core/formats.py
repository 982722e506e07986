"""The one table of number formats.

Owns what a code of each format means on its own: its bits, its range, its storage type, and the exact
encode and decode. It knows nothing of scales, zero points, tensors' shapes or models.
"""

from __future__ import annotations

from dataclasses import dataclass
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
        kind: "float" (IEEE-like), "int" (codes are integers), "codebook" (codes index `levels`),
            "exponent" (codes are biased powers of two, used for scales only).
        bits: bits of one code.
        low: smallest value that a code stands for.
        high: largest value that a code stands for.
        storage: torch dtype that holds one unpacked code.
        levels: the value of every code, in code order; None where the storage dtype is the format itself.
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
        return self.kind != "float" or self.bits <= 8

    def encode(self, values: Tensor) -> Tensor:
        """Codes of the representable numbers nearest to `values`, ties to even.

        Args:
            values: [...] float32, any shape; finite.

        Returns:
            codes: [...] in `storage`; values beyond [low, high] become the nearest bound.

        Raises:
            FormatError: a value is not finite.

        Source:
            IEEE 754-2019 section 4.3.1 (round half to even); OCP 8-bit floating point, 2023 (FP8, saturating);
            OCP Microscaling formats 1.0 (FP4 E2M1, E8M0). Differs: all formats saturate, none produces infinity.
        """
        if not bool(torch.isfinite(values).all()):
            raise FormatError(f"{self.name}: cannot encode a value that is not finite; remove NaN and infinity first")
        values = values.to(torch.float32)
        if self.kind == "int":
            return values.round().clamp(self.low, self.high).to(self.storage)
        if self.kind == "exponent":
            return _encode_power_of_two(values)
        if self.levels is not None:
            return _nearest_level(values, self.levels)
        return values.clamp(self.low, self.high).to(self.storage)

    def decode(self, codes: Tensor) -> Tensor:
        """The exact value of every code.

        Args:
            codes: [...] in `storage`.

        Returns:
            values: [...] float32.
        """
        if self.kind == "exponent":
            return torch.ldexp(torch.ones_like(codes, dtype=torch.float32), codes.to(torch.int32) - 127)
        if self.levels is not None:
            return torch.tensor(self.levels, dtype=torch.float32, device=codes.device)[codes.long()]
        return codes.to(torch.float32)


def _nearest_level(values: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Index of the level nearest to each value; a tie goes to the even index, which is the even mantissa in E2M1.

    Of two codes for one value (0.0 and -0.0) the first is used, so that zero has one code.
    """
    order = sorted({levels[index]: index for index in reversed(range(len(levels)))}.items())
    ordered = torch.tensor([level for level, _ in order], dtype=torch.float64, device=values.device)
    codes = torch.tensor([index for _, index in order], dtype=torch.uint8, device=values.device)
    exact = values.to(torch.float64).contiguous()
    upper = torch.searchsorted(ordered, exact).clamp(1, len(order) - 1)
    lower = upper - 1
    to_lower, to_upper = exact - ordered[lower], ordered[upper] - exact
    tie = (to_lower == to_upper) & (codes[lower] % 2 == 0)
    return torch.where((to_lower < to_upper) | tie, codes[lower], codes[upper])


def _encode_power_of_two(values: Tensor) -> Tensor:
    """Biased exponents of the powers of two nearest in ratio to positive values; 2^-127 .. 2^127."""
    exponent = torch.log2(values.clamp(min=2.0**-126).to(torch.float64)).round()
    return (exponent.clamp(-127, 127) + 127).to(torch.uint8)


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
