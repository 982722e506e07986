"""The layout of weights in memory that vector kernels read best, and the way there and back; csrc/interleaved.h.

A matrix of [rows, columns] codes of `bits` bits becomes [panels, chunks, bits, 64] bytes: a panel is 16 rows, a chunk
32 codes of each, and a chunk takes one 64-byte unit per bit. A unit holds four bytes of every row. The bits of a field
are split into planes (6 bits into 4 and 2, 5 into 4 and 1, 3 into 2 and 1); unit u of a plane of w bits holds the quads
u * 8 / w + i of four codes, the i-th shifted to the left by w * i bits in its bytes. It takes as much memory as the
stored layout, and takes its place: there are never two copies.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PANEL_ROWS = 16
CHUNK = 32

_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def is_interleaved(weight: Tensor) -> bool:
    """Whether a weight argument of a linear op is in this layout rather than in the stored one."""
    return weight.dim() == 4


def interleave(fields: Tensor, bits: int) -> Tensor:
    """Fields in rows to the interleaved layout.

    Args:
        fields: [rows, columns] of one byte each, values below 2**bits (any byte for 8 bits).
        bits: bits of a field: 2, 3, 4, 5, 6 or 8.

    Returns:
        [ceil(rows / 16), ceil(columns / 32), bits, 64] of the same dtype.
    """
    rows, columns = fields.shape
    panels, chunks = -(-rows // PANEL_ROWS), -(-columns // CHUNK)
    out = torch.empty(panels, chunks, bits, PANEL_ROWS, 4, dtype=torch.uint8)
    if fields.numel() == 0:
        return out.view(panels, chunks, bits, 4 * PANEL_ROWS).view(fields.dtype)
    # a panel at a time would be slow in Python, the whole matrix at once a second copy of it
    for begin in range(0, panels, _STRIP):
        end = min(begin + _STRIP, panels)
        strip = fields[begin * PANEL_ROWS : end * PANEL_ROWS].view(torch.uint8)
        missing = (end - begin) * PANEL_ROWS - strip.shape[0]
        if missing or chunks * CHUNK != columns:
            strip = functional.pad(strip, (0, chunks * CHUNK - columns, 0, missing))
        words = strip.contiguous().view(torch.int32).view(end - begin, PANEL_ROWS, chunks, CHUNK // 4)
        units = _to_units(words.permute(0, 2, 3, 1), bits)
        out[begin:end].view(torch.int32).squeeze(-1).copy_(units)
    return out.view(panels, chunks, bits, 4 * PANEL_ROWS).view(fields.dtype)


_STRIP = 64


def _to_units(quads: Tensor, bits: int) -> Tensor:
    """int32 words of four fields [..., 8 quads, rows] to words [..., bits units, rows]."""
    units, shift = [], 0
    for width in _PLANES[bits]:
        plane = quads
        if width < 8:
            plane = (quads >> shift) & (((1 << width) - 1) * 0x01010101)
        per_unit = 8 // width
        plane = plane.unflatten(-2, (width, per_unit))
        unit = plane[..., 0, :]
        for index in range(1, per_unit):
            unit = unit | plane[..., index, :] << (width * index)
        units.append(unit)
        shift += width
    return units[0] if len(units) == 1 else torch.cat(units, -2)


def restore(interleaved: Tensor, rows: int, columns: int) -> Tensor:
    """The inverse of `interleave`: fields [rows, columns], one byte each."""
    panels, chunks, bits, _ = interleaved.shape
    units = interleaved.view(torch.int32).view(panels, chunks, bits, PANEL_ROWS)
    quads = torch.zeros(panels, chunks, 8, PANEL_ROWS, dtype=torch.int32, device=interleaved.device)
    first, shift = 0, 0
    for width in _PLANES[bits]:
        mask = ((1 << width) - 1) * 0x01010101 if width < 8 else -1
        for quad in range(8):
            unit = units[:, :, first + quad * width // 8]
            quads[:, :, quad] |= ((unit >> quad % (8 // width) * width) & mask) << shift
        first, shift = first + width, shift + width
    words = quads.permute(0, 3, 1, 2).contiguous().view(panels * PANEL_ROWS, chunks * 8)
    return words.view(interleaved.dtype)[:rows, :columns].contiguous()


def interleave_groups(values: Tensor) -> Tensor:
    """Scales or zero points [rows, groups] to [ceil(rows / 16), groups, 16]; rows that do not exist are 0."""
    rows, groups = values.shape
    panels = -(-rows // PANEL_ROWS)
    padded = functional.pad(values, (0, 0, 0, panels * PANEL_ROWS - rows))
    return padded.view(panels, PANEL_ROWS, groups).transpose(1, 2).contiguous()


def restore_groups(values: Tensor, rows: int) -> Tensor:
    """The inverse of `interleave_groups`: [rows, groups]."""
    return values.transpose(1, 2).flatten(0, 1)[:rows].contiguous()
