"""Stored weights of every format, as the weight-only ops take them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from narrowcast.core import QuantSpec, quantize
from narrowcast.nn.base import KernelArguments, StoredWeight

SPECS = (
    "int4/group32/asym/scale:k6", "int2/group16/asym/scale:k6", "int6/group16/scale:k6", "int5/group32/asym/scale:k6",
    "nf4/group32/scale:k6", "codebook4/channel", "codebook2/group16", "codebook3/channel",
    "int8", "int8/channel/asym", "int8/group32", "int8/tensor", "uint8", "int2/group16/asym", "int3/group32",
    "int3/group48/asym", "int4", "int4/group7/asym", "int4/group32", "int4/group32/asym", "int4/group128/asym",
    "int5/group64/asym", "int6/group16", "uint4/group32/asym", "nf4/group64", "fp4_e2m1/group32", "mxfp4", "mxfp8",
    "fp8_e4m3", "int4/group32/asym/scale:int8",
)  # fmt: skip


def stored_weight(spec: str, rows: int, columns: int) -> tuple[KernelArguments, Tensor]:
    """The op's arguments of a random weight in a format, and its dequantized values from `core`."""
    format_spec = QuantSpec.parse(spec)
    record = quantize(torch.randn(rows, columns), format_spec)
    stored, owner = StoredWeight("weight", format_spec, (rows, columns)), nn.Module()
    for suffix, tensor in stored.encode(record).items():
        owner.register_buffer(f"weight_{suffix}", tensor)
    arguments = stored.kernel_arguments(owner)
    assert arguments is not None
    return arguments, record.dequantize()
