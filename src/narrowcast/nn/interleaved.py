"""The second layout of a linear layer's weight: rows interleaved for the kernels, in place of the stored codes.

The first answer of a layer comes from the stored layout, which may be a mapped file. Before the second one the weight
is interleaved once, at the speed of memory, and the stored codes are let go; whoever asks for them gets them back, bit
for bit.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from narrowcast.core import pack
from narrowcast.kernels.interleave import (
    CHUNK,
    PANEL_ROWS,
    interleave,
    interleave_groups,
    is_interleaved,
    restore,
    restore_groups,
)
from narrowcast.kernels.ops import reads_interleaved
from narrowcast.kernels.reference_linear import block_of

if TYPE_CHECKING:
    from narrowcast.nn.linear import QuantizedLinear

CALLS_BEFORE = 2
"""The call of a layer that interleaves its weight first."""

CALLS_BETWEEN = 100
"""Calls before the next try where something else held the codes: another module, or another thread for a moment."""

_MOST_PADDING = 1.25


def calls_before(module: QuantizedLinear, op: str | None) -> int:
    """CALLS_BEFORE where the layer's kernel gains from interleaving, else 0: never."""
    rows, columns = module.out_features, module.in_features
    if op is None or not reads_interleaved(op) or rows * columns == 0:
        return 0
    _, group, input_group = module.kernel_groups
    if op == "linear_lowbit_dynamic" and group < columns and block_of(group, input_group, columns) % CHUNK != 0:
        return 0
    padded = -(-rows // PANEL_ROWS) * PANEL_ROWS * (-(-columns // CHUNK) * CHUNK)
    return CALLS_BEFORE if padded <= _MOST_PADDING * rows * columns else 0


def interleave_(module: QuantizedLinear, op: str) -> bool:
    """Interleave the weight of a layer, unless something else holds its codes: there would be two copies then.

    Args:
        module: a layer whose `calls_before` is not 0.
        op: the integer op that it runs.

    Returns:
        False where the codes are held elsewhere; True where there is nothing left to do.
    """
    buffers = dict(module._buffers)
    codes = buffers["weight_codes"]
    # references of an unshared tensor: both dictionaries, the variable, the argument of getrefcount, and once more in
    # both dictionaries where the kernel reads the stored codes themselves
    own = 4 + (2 if buffers.get("kernel_codes") is codes else 0)
    if codes is None or is_interleaved(codes) or codes.device.type != "cpu":
        return True
    if sys.getrefcount(codes) > own:
        return False
    if op == "linear_lowbit_dynamic":
        bits = module.stored("weight").spec.format.bits
        buffers["weight_codes"] = interleave(_fields(codes, bits, module.in_features), bits)
        for name in module.group_buffers:
            values = buffers.get(name)
            if values is not None:
                buffers[name] = interleave_groups(values)
    else:
        kernel_codes = buffers["kernel_codes"]
        assert kernel_codes is not None
        buffers["kernel_codes"], buffers["weight_codes"] = interleave(kernel_codes, 8), None
    module.__dict__["_buffers"] = buffers  # all at once: another thread may be in forward
    return True


def _fields(codes: Tensor, bits: int, columns: int) -> Tensor:
    if bits == 8:
        return codes
    fields: Tensor = torch.ops.narrowcast.unpack_codes(codes, bits, 0, columns, False)
    return fields


def restore_(module: QuantizedLinear) -> None:
    """The stored layout again, where `interleave_` changed it."""
    buffers = dict(module._buffers)
    rows, columns = module.out_features, module.in_features
    kernel_codes, codes = buffers.get("kernel_codes"), buffers["weight_codes"]
    number = module.stored("weight").spec.format
    if kernel_codes is not None and is_interleaved(kernel_codes):
        stored = restore(kernel_codes, rows, columns)
        buffers["kernel_codes"], buffers["weight_codes"] = stored, pack(stored, number) if number.bits < 8 else stored
    elif codes is not None and is_interleaved(codes):
        fields = restore(codes, rows, columns)
        if number.bits < 8:
            fields = torch.ops.narrowcast.pack_codes(fields, number.bits, 0)
        buffers["weight_codes"] = fields
        for name in module.group_buffers:
            values = buffers.get(name)
            if values is not None:
                buffers[name] = restore_groups(values, rows)
    else:
        return
    module.__dict__["_buffers"] = buffers
