"""Tensors cut into parts that stay in the cache while several elementwise passes go over them."""

from __future__ import annotations

import torch
from torch import Tensor

# 128 Ki values are 512 KiB of float32. Whole tensors cost a trip to memory per pass, and fresh pages for each result.
_PIECE = 1 << 17


def pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Parts of a tensor along its first dimension, views; all of it for a compiler, which fuses passes itself.

    Args:
        x: [first, ...] of any dtype.
    """
    if torch.compiler.is_compiling() or x.numel() <= _PIECE or x.dim() < 2:
        return (x,)
    return torch.split(x, max(1, _PIECE * x.shape[0] // x.numel()))
