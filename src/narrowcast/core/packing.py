"""Codes below 8 bits to bytes and back, in one bit order.

A row is a little-endian stream of bits. Element i owns bits [i * bits, (i + 1) * bits) of its row, least
significant bit first; bit b of the row is bit b % 8 of byte b // 8. A field holds `code - format.low`, an unsigned
number (offset binary): int4 code 0 is the nibble 8, and element 0 is the low nibble of byte 0. The unused bits
of the last byte of a row are 0. Formats of 8 bits and more are not packed: their codes are stored as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.core.formats import NumberFormat
from narrowcast.errors import FormatError


def packed_width(columns: int, bits: int) -> int:
    """Bytes of one packed row."""
    return -(-columns * bits // 8)


def _field_offset(number: NumberFormat) -> int:
    return int(number.low) if number.kind == "int" else 0


def pack(codes: Tensor, number: NumberFormat) -> Tensor:
    """Codes of fewer than 8 bits as bytes.

    Args:
        codes: [rows, columns] in `number.storage`.
        number: the format; below 8 bits.

    Returns:
        packed: [rows, ceil(columns * bits / 8)] uint8.

    Raises:
        FormatError: the format has 8 bits or more, or a code is outside of it.
    """
    if number.bits >= 8:
        raise FormatError(f"{number.name} has {number.bits} bits and is stored as it is; only formats below 8 bits are packed")
    offset, bits = _field_offset(number), number.bits
    fields = codes.to(torch.int16) - offset
    if fields.numel() and (int(fields.min()) < 0 or int(fields.max()) >= 2**bits):
        raise FormatError(f"{number.name}: a code is outside {offset}..{offset + 2**bits - 1}")
    rows, columns = codes.shape
    period = 8 // _gcd(8, bits)  # elements after which the pattern of bits repeats on a byte boundary
    groups = -(-columns // period)
    padded = fields.new_zeros(rows, groups * period)
    padded[:, :columns] = fields
    words = torch.zeros(rows, groups, dtype=torch.int64)
    view = padded.view(rows, groups, period)
    for index in range(period):
        words |= view[:, :, index].to(torch.int64) << (index * bits)
    chunk = period * bits // 8
    packed = torch.stack([(words >> (8 * byte)) & 0xFF for byte in range(chunk)], dim=-1).to(torch.uint8)
    return packed.reshape(rows, groups * chunk)[:, : packed_width(columns, bits)].contiguous()


def unpack(packed: Tensor, number: NumberFormat, columns: int) -> Tensor:
    """The inverse of `pack`: codes [rows, columns] in `number.storage`.

    Args:
        packed: [rows, ceil(columns * bits / 8)] uint8.
        number: the format; below 8 bits.
        columns: codes in a row.

    Raises:
        FormatError: the width of `packed` does not belong to `columns` codes of this format.
    """
    bits = number.bits
    if packed.dim() != 2 or packed.dtype != torch.uint8 or packed.shape[1] != packed_width(columns, bits):
        raise FormatError(
            f"{number.name}: {columns} codes in a row pack into {packed_width(columns, bits)} bytes, got "
            f"{packed.dtype} of shape {tuple(packed.shape)}"
        )
    rows = packed.shape[0]
    period = 8 // _gcd(8, bits)
    chunk = period * bits // 8
    groups = -(-columns // period)
    padded = packed.new_zeros(rows, groups * chunk)
    padded[:, : packed.shape[1]] = packed
    view = padded.view(rows, groups, chunk).to(torch.int64)
    words = torch.zeros(rows, groups, dtype=torch.int64)
    for byte in range(chunk):
        words |= view[:, :, byte] << (8 * byte)
    fields = torch.stack([(words >> (index * bits)) & (2**bits - 1) for index in range(period)], dim=-1)
    codes = fields.reshape(rows, groups * period)[:, :columns].to(torch.int16) + _field_offset(number)
    return codes.to(number.storage).contiguous()


def _gcd(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a
