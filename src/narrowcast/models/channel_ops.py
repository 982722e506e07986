"""What operations on tensors do to the channels in them: a table from the operation's name to its effect.

Every tensor that carries channels of a producer has a `map`, an integer tensor of its shape that says which channel
each element is a positive multiple of (-1: something else; -2: zero). Operations that only move elements are applied
to the map as well; the others are named here by what a factor on a channel does: goes through (linear), goes through
while positive (bends), or stops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

OTHER, ZERO = -1, -2

# These give every element a place and no new value.
MOVES = frozenset({
    "T", "cat", "chunk", "concat", "concatenate", "expand", "expand_as", "flatten", "getitem", "__getitem__", "mT",
    "movedim", "narrow", "permute", "repeat", "repeat_interleave", "reshape", "select", "split", "squeeze", "stack",
    "swapaxes", "swapdims", "t", "tensor_split", "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as",
})  # fmt: skip
# These give the same values, in another dtype or memory at most.
KEEPS = frozenset({
    "alias", "bfloat16", "clone", "contiguous", "cpu", "cuda", "data", "detach", "double", "dropout", "dropout1d",
    "dropout2d", "feature_dropout", "float", "half", "identity", "requires_grad_", "to", "type", "type_as",
})  # fmt: skip
# f(s x) = s f(x) for s > 0.
BENDS = frozenset({"abs", "leaky_relu", "leaky_relu_", "relu", "relu_"})
PRODUCTS = frozenset({"__imul__", "__mul__", "__rmul__", "imul", "mul", "mul_", "multiply"})
QUOTIENTS = frozenset({"__itruediv__", "__truediv__", "div", "div_", "divide", "true_divide"})
MATRIX_PRODUCTS = frozenset({"__matmul__", "bmm", "matmul"})
# Averages and maxima over the positions of an image, whose channels are at dimension -3.
POOLS = frozenset({
    "adaptive_avg_pool2d", "adaptive_max_pool2d", "avg_pool2d", "interpolate", "max_pool2d", "upsample",
})  # fmt: skip
REDUCES = frozenset({"amax", "mean", "sum"})
# Asking a tensor for its shape does not use its values.
QUERIES = frozenset({
    "__len__", "device", "dim", "dtype", "element_size", "grad", "grad_fn", "is_complex", "is_contiguous", "is_cpu",
    "is_cuda", "is_floating_point", "is_leaf", "is_meta", "is_mkldnn", "is_nested", "is_quantized", "is_sparse",
    "layout", "ndim", "ndimension", "nelement", "numel", "requires_grad", "retains_grad", "shape", "size", "stride",
    "storage_offset", "is_nonzero", "data_ptr", "is_inference", "itemsize", "nbytes", "get_device", "is_xpu", "is_mps",
    "is_vulkan", "is_xla", "is_maia", "is_mtia", "is_ipu", "output_nr", "_version", "names", "__hash__", "__repr__",
})  # fmt: skip


def compact(channels: Tensor) -> Tensor:
    """The map with every dimension that only repeats narrowed to 1: a map that nothing has mixed costs no memory."""
    for dim in range(channels.dim()):
        if channels.stride(dim) == 0 and channels.shape[dim] > 1:
            channels = channels.narrow(dim, 0, 1)
    return channels


def constant_over(channels: Tensor, dims: tuple[int, ...]) -> Tensor | None:
    """The map with `dims` reduced to size 1 where it does not vary over them; zeros go with anything. Else None."""
    reduced = compact(channels)
    dims = tuple(dim % channels.dim() for dim in dims)
    if not dims:
        return reduced
    if any(channels.shape[dim] == 0 for dim in range(channels.dim())):
        return None
    highest = reduced.amax(dims, keepdim=True)
    wild = reduced == ZERO
    same = (reduced == highest) | wild
    return highest if bool(same.all()) else None


def moved(function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The map(s) after an operation that moves elements; `args` hold maps in place of the tensors that have one."""
    if name in ("view", "view_as", "reshape", "flatten", "unflatten"):
        shape = args[1:]
        if name in ("view", "reshape"):
            if any(isinstance(part, torch.dtype) for part in (*shape, *kwargs.values())):
                return None
            return args[0].reshape(*shape, **kwargs)
        if name == "view_as":
            return args[0].reshape(shape[0].shape)
    return function(*args, **kwargs)


def reduced_dims(args: tuple[Any, ...], kwargs: dict[str, Any], dimensions: int) -> tuple[tuple[int, ...], bool]:
    """The dimensions that mean, sum or amax goes over, and whether they stay with size 1."""
    dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if dims is None or (isinstance(dims, list | tuple) and not dims):
        dims = tuple(range(dimensions))
    dims = (dims,) if isinstance(dims, int) else tuple(dims)
    keep = kwargs.get("keepdim", args[2] if len(args) > 2 else False)
    return tuple(dim % dimensions for dim in dims), bool(keep)


def ceiling_of(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The upper bound of a clip to [0, bound]; None for other operations and other clips."""
    if name in ("relu6", "relu6_"):
        return 6.0
    if name not in ("hardtanh", "hardtanh_", "clamp", "clamp_", "clip", "clip_"):
        return None
    hard = name.startswith("hardtanh")
    keys = ("min_val", "max_val") if hard else ("min", "max")
    bounds = [kwargs.get(key, args[1 + i] if len(args) > 1 + i else None) for i, key in enumerate(keys)]
    low, high = [(-1.0, 1.0)[i] if bound is None and hard else bound for i, bound in enumerate(bounds)]
    if not isinstance(low, int | float) or low != 0:
        return None
    if high is None:
        return float("inf")
    return float(high) if isinstance(high, int | float) and high > 0 else None
