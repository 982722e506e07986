"""`narrowcast show`: one number in every number format."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from narrowcast.cli.console import JsonOption, Output, QuietOption, table
from narrowcast.errors import FormatError

if TYPE_CHECKING:
    from narrowcast.core import NumberFormat

SCALED_AS = {"uint8": "uint8/tensor/asym", "uint4": "uint4/tensor/asym"}


@dataclass(frozen=True)
class ShownNumber:
    """The number in one format.

    Args:
        format: name of the format or specification.
        code: the integer that is stored; for floats the bits read as an unsigned integer.
        bits: the same in binary; floats as sign|exponent|mantissa, signed integers in two's complement.
        value: what the code stands for.
        absolute_error: |value - number|.
        relative_error: that divided by |number|; NaN for 0.
        scale: weight units per step; None for formats without scale.
        zero_point: the code of 0.0; None when symmetric or without scale.
        note: "" or what happened besides rounding.
    """

    format: str
    code: int
    bits: str
    value: float
    absolute_error: float
    relative_error: float
    scale: float | None
    zero_point: int | None
    note: str


class RangeCommand(TyperCommand):
    """A command whose `--range` takes one number or two, and whose numbers may start with a minus sign."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Join the one or two numbers behind `--range` into one value before the parser sees them."""
        return super().parse_args(ctx, _join_range(args))


def _join_range(args: Sequence[str]) -> list[str]:
    joined = list(args)
    if "--range" not in joined:
        return joined
    at = joined.index("--range")
    numbers = joined[at + 1 : at + 3]
    count = next((i for i, text in enumerate(numbers) if not _is_number(text)), len(numbers))
    has_number_elsewhere = any(_is_number(text) for text in joined[:at] + joined[at + 3 :])
    if count == 2 and not has_number_elsewhere:
        count = 1  # `show --range 1 0.5`: the last one is NUMBER
    if count == 2:
        joined[at + 1 : at + 3] = [":".join(numbers)]
    return joined


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def show(
    number: Annotated[str, typer.Argument(metavar="NUMBER", help="The number, for example 0.87654321 or -1.5e-3.")],
    weight_range: Annotated[
        str,
        typer.Option(
            "--range",
            metavar="LOW HIGH",
            help="Weight range of the integer formats; one number A means -A A.",
            show_default="-1 1",
        ),
    ] = "-1:1",
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show one number in every number format: its code, bits, stored value and error.

    Integer formats map the weight range (by default -1 to 1) onto their codes: the signed ones symmetrically, the
    unsigned ones with a zero point. Float formats store the number itself; mxfp4 and mxfp8 share a power-of-two scale
    in a block whose largest weight is the end of the range.

    Examples:
        narrowcast show 0.87654321
        narrowcast show -0.3 --range 0.5
        narrowcast show 3.14 --range -1 6 --json
    """
    value = _parse_number(number)
    low, high = _parse_range(weight_range)
    rows = in_every_format(value, low, high)
    output = Output(as_json=as_json, quiet=quiet)
    output.json({"number": value, "range": [low, high], "formats": [asdict(row) for row in rows]})
    output.heading(f"{value!r} in every format (weight range {low:g} to {high:g})")
    output.show(_render(rows))
    if not low <= value <= high:
        output.note(f"{value:g} lies outside the weight range, so integer formats clip it; widen it with --range")


def in_every_format(number: float, low: float, high: float) -> list[ShownNumber]:
    """The number in every row of FORMATS and in the microscaling specifications.

    Formats with learned levels are left out: what they make of a number depends on all others beside it.

    Args:
        number: finite, within float32's range.
        low: smallest weight of the tensor that the number is imagined in.
        high: largest weight; low <= high, one of them not 0.

    Raises:
        FormatError: the number or the range is beyond float32.
    """
    from narrowcast.core import FORMATS
    from narrowcast.core.spec import ALIASES

    if abs(number) > FORMATS["fp32"].high:
        raise FormatError(f"{number:g} is beyond float32, whose largest number is {FORMATS['fp32'].high:.4g}")
    rows = [
        _plain_row(number, row) if _fields(row) is not None else _scaled_row(number, row.name, low, high)
        for row in FORMATS.values()
        if not row.learned and (row.kind != "exponent" or number > 0)
    ]
    return rows + [_scaled_row(number, name, low, high) for name in ALIASES]


def _fields(number_format: NumberFormat) -> tuple[int, int, int] | None:
    """Bits of sign, exponent and mantissa; None for integers and codebooks, which have no such fields."""
    import torch

    if match := re.search(r"e(\d)m(\d)$", number_format.name):
        exponent, mantissa = int(match[1]), int(match[2])
        return number_format.bits - exponent - mantissa, exponent, mantissa
    if number_format.kind != "float":
        return None
    mantissa = -round(math.log2(torch.finfo(number_format.storage).eps))
    return 1, number_format.bits - 1 - mantissa, mantissa


def _plain_row(number: float, number_format: NumberFormat) -> ShownNumber:
    """A float format without scale."""
    import torch

    codes = number_format.encode(torch.tensor([number], dtype=torch.float32))
    stored = float(number_format.decode(codes)[0])
    beyond = not number_format.low <= number <= number_format.high
    note = f"beyond the format, saturates at {stored:.5g}" if beyond else ""
    if number_format.kind == "exponent":
        note = "powers of two only: a format for scales"
    raw = int.from_bytes(bytes(codes.view(torch.uint8).tolist()), "little")
    return _row(number, number_format.name, number_format, raw, stored, note=note)


def _scaled_row(number: float, name: str, low: float, high: float) -> ShownNumber:
    """An integer, codebook or microscaling format with the scale of the weight range."""
    import torch

    from narrowcast.core import QuantSpec, choose_scale, quantize

    spec = QuantSpec.parse(SCALED_AS.get(name, name))
    scale, zero_point = choose_scale(torch.tensor([[low]]), torch.tensor([[high]]), spec)
    stored = quantize(torch.tensor([[number]], dtype=torch.float32), spec, scale, zero_point)
    code = stored.codes.view(torch.uint8) if spec.format.kind == "float" else stored.codes
    value = float(stored.dequantize())
    clipped = not low <= number <= high and abs(value - number) > float(scale) / 2
    return _row(
        number,
        name,
        spec.format,
        int(code),
        value,
        scale=float(scale),
        zero_point=None if zero_point is None else int(zero_point),
        note="outside the range, clipped" if clipped else "",
    )


def _row(
    number: float,
    name: str,
    number_format: NumberFormat,
    code: int,
    value: float,
    *,
    scale: float | None = None,
    zero_point: int | None = None,
    note: str = "",
) -> ShownNumber:
    error = abs(value - number)
    relative = error / abs(number) if number else math.nan if error else 0.0
    return ShownNumber(name, code, _bits(code, number_format), value, error, relative, scale, zero_point, note)


def _bits(code: int, number_format: NumberFormat) -> str:
    """Binary digits; "0|10000110|0111..." for floats, two's complement for signed integers."""
    digits = format(code & ((1 << number_format.bits) - 1), f"0{number_format.bits}b")
    fields = _fields(number_format)
    if fields is None:
        return digits
    sign, exponent, _ = fields
    return "|".join(part for part in (digits[:sign], digits[sign : sign + exponent], digits[sign + exponent :]) if part)


def _parse_number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        raise FormatError(f"{text!r} is not a number; write one like 0.87654321 or -1.5e-3") from None
    if not math.isfinite(number):
        raise FormatError(f"{text!r} is not finite; quantized formats here hold finite numbers only")
    return number


def _parse_range(text: str) -> tuple[float, float]:
    parts = text.replace(",", ":").split(":")
    try:
        bounds = [float(part) for part in parts]
    except ValueError:
        bounds = []
    if len(bounds) == 1:
        bounds = [-abs(bounds[0]), abs(bounds[0])]
    if len(bounds) != 2 or not all(math.isfinite(bound) and abs(bound) <= 3e38 for bound in bounds):
        raise FormatError(f"--range {text!r} is not a range; write --range 1 (for -1 to 1) or --range -0.5 2")
    low, high = bounds
    if low >= high:
        raise FormatError(f"--range {low:g} {high:g} is empty; the first number is the smaller one")
    return low, high


def _render(rows: Sequence[ShownNumber]) -> Any:
    numeric = ("code", "value", "error", "relative")
    made = table("format", "code", "bits", "value", "error", "relative", "scale", "note", right=numeric)
    for row in rows:
        scale = "" if row.scale is None else f"{row.scale:.6g}"
        if row.zero_point is not None:
            scale += f", zero point {row.zero_point}"
        relative = "-" if math.isnan(row.relative_error) else f"{row.relative_error:.2%}"
        if 0 < row.relative_error < 1e-4:
            relative = f"{row.relative_error:.1e}"
        cells = (row.format, str(row.code), row.bits, f"{row.value:.9g}", f"{row.absolute_error:.3g}", relative)
        made.add_row(*cells, scale, row.note)
    return made
