"""Codes below 8 bits to bytes and back, in one bit order.

A row is a little-endian stream of bits. Element i owns bits [i * bits, (i + 1) * bits) of its row, least
significant bit first; bit b of the row is bit b % 8 of byte b // 8. A field holds `code - format.low`, an unsigned
number (offset binary): int4 code 0 is the nibble 8, and element 0 is the low nibble of byte 0. The unused bits
of the last byte of a row are 0. Formats of 8 bits and more are not packed: their codes are stored as they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from narrowcast.core.formats import NumberFormat
from narrowcast.errors import FormatError


def packed_width(columns: int, bits: int) -> int:
    """Bytes of one packed row."""
    return -(-columns * bits // 8)


def pack(codes: Tensor, number: NumberFormat) -> Tensor:
    """Codes of fewer than 8 bits as bytes.

    Args:
        codes: [rows, columns] in `number.storage`.
        number: the format; below 8 bits.

    Returns:
        packed: [rows, ceil(columns * bits / 8)] uint8.

    Raises:
        FormatError: the format has 8 bits or more, the codes are no matrix of its storage dtype, or a code is
            outside of it.
    """
    _check_packable(number)
    if codes.dim() != 2 or codes.dtype != number.storage:
        raise FormatError(
            f"{number.name}: pack takes a matrix of {number.storage}, got {codes.dtype} of shape {tuple(codes.shape)}"
        )
    offset = _field_offset(number)
    fields = codes.contiguous().view(torch.uint8) - offset % 256  # modulo 256, so a code below `low` is large
    if fields.numel() and int(fields.max()) >= 2**number.bits:
        raise FormatError(f"{number.name}: a code is outside {offset}..{offset + 2**number.bits - 1}")
    rows, columns = codes.shape
    period, chunk = _period(number.bits)
    groups = -(-columns // period)
    if groups * period != columns:
        fields = torch.nn.functional.pad(fields, (0, groups * period - columns))
    fields = fields.view(rows, groups, period)
    packed = fields.new_zeros(rows, groups, chunk)
    for element, byte, shift in _overlaps(number.bits):
        packed[:, :, byte] |= _shift(fields[:, :, element], shift)
    return packed.view(rows, groups * chunk)[:, : packed_width(columns, number.bits)].contiguous()


def unpack(packed: Tensor, number: NumberFormat, columns: int) -> Tensor:
    """The inverse of `pack`: codes [rows, columns] in `number.storage`.

    Args:
        packed: [rows, ceil(columns * bits / 8)] uint8.
        number: the format; below 8 bits.
        columns: codes in a row.

    Raises:
        FormatError: the format has 8 bits or more, or the width of `packed` does not belong to `columns` codes.
    """
    _check_packable(number)
    width = packed_width(columns, number.bits)
    if packed.dim() != 2 or packed.dtype != torch.uint8 or packed.shape[1] != width:
        raise FormatError(
            f"{number.name}: {columns} codes in a row pack into {width} bytes, got {packed.dtype} of shape "
            f"{tuple(packed.shape)}"
        )
    rows = packed.shape[0]
    period, chunk = _period(number.bits)
    groups = -(-columns // period)
    if groups * chunk != width:
        packed = torch.nn.functional.pad(packed, (0, groups * chunk - width))
    packed = packed.reshape(rows, groups, chunk)
    fields = packed.new_zeros(rows, groups, period)
    for element, byte, shift in _overlaps(number.bits):
        fields[:, :, element] |= _shift(packed[:, :, byte], -shift)
    codes = fields.bitwise_and_(2**number.bits - 1).add_(_field_offset(number) % 256)
    return codes.view(number.storage).view(rows, groups * period)[:, :columns].contiguous()


def _check_packable(number: NumberFormat) -> None:
    if number.bits >= 8:
        raise FormatError(f"{number.name} has {number.bits} bits and is stored as it is; only fewer than 8 are packed")


def _field_offset(number: NumberFormat) -> int:
    return int(number.low) if number.kind == "int" else 0


def _period(bits: int) -> tuple[int, int]:
    """Elements after which the pattern repeats on a byte boundary, and the bytes that they take."""
    period = 8 // math.gcd(8, bits)
    return period, period * bits // 8


def _overlaps(bits: int) -> list[tuple[int, int, int]]:
    """(element, byte, shift) of every field that has bits in a byte: field << shift, where < 0 means to the right."""
    period, chunk = _period(bits)
    shifts = [(element, byte, element * bits - byte * 8) for element in range(period) for byte in range(chunk)]
    return [(element, byte, shift) for element, byte, shift in shifts if -bits < shift < 8]


def _shift(values: Tensor, left: int) -> Tensor:
    """Bytes shifted to the left, or to the right where `left` is negative; bits shifted out are lost."""
    return values << left if left >= 0 else values >> -left
