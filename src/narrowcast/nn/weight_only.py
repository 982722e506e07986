"""Linear layers whose input stays float: one op call that reads the weight as it is stored."""

from __future__ import annotations

import torch
from torch import Tensor

from narrowcast.errors import DataError
from narrowcast.kernels import kernel_name
from narrowcast.kernels.capability import missing_library
from narrowcast.nn.base import QuantizedModule, StoredWeight

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def weight_only_kernel(stored: StoredWeight) -> str | None:
    """What runs a weight on float inputs: the op and tier; None where torch multiplies with the dequantized weight."""
    return kernel_name("linear_weight_only") if stored.has_kernel() and not missing_library() else None


def weight_only_linear(module: QuantizedModule, x: Tensor) -> Tensor | None:
    """`x` times the stored weight plus bias, through the module's activation function, in the dtype of `x`.

    Args:
        module: one with a weight named "weight", a bias or None, and the name `fused` of its activation function.
        x: [..., in] float.

    Returns:
        [..., out]; None where torch does it: no native library, formats without scales or in blocks, other dtypes and
        devices, inputs that need a gradient (the op has none).

    Raises:
        DataError: the input has another number of features than the weight.
    """
    if x.device.type != "cpu" or x.dtype not in _FLOATS or (x.requires_grad and torch.is_grad_enabled()):
        return None
    if missing_library():  # torch multiplies bfloat16 as such; the op's reference body widens it first
        return None
    stored = module.stored("weight")
    arguments = stored.kernel_arguments(module)
    if arguments is None:
        return None
    if x.shape[-1] != stored.shape[1]:  # the packed rows of an odd width and the next look alike to the op
        raise DataError(f"linear layer: the input has {x.shape[-1]} features, expected {stored.shape[1]}")
    *tensors, bits, group = arguments
    return torch.ops.narrowcast.linear_weight_only(x, *tensors, module.bias, bits, group, module.fused)  # type: ignore[no-any-return]
