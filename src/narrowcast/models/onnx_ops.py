"""The operators of ONNX as functions of torch: one row per operator, from its attributes to a function of its inputs.

Channels are followed through these functions and gradients pass them, so a row uses the torch function whose name
`channel_ops` knows. A row that gives None, or no row at all, leaves the node to ONNX Runtime (`onnx_node.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Attributes = Mapping[str, Any]
Function = Callable[..., Any]
Row = Callable[[Attributes], Function | None]

# ONNX's numbers for data types.
DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip


def _same(function: Function) -> Row:
    return lambda a: function


def _ints(value: Tensor | None) -> list[int] | None:
    return None if value is None else [int(entry) for entry in value.reshape(-1).tolist()]


def _number(value: Tensor | None) -> float | None:
    return None if value is None else float(value.reshape(-1)[0])


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _clip(a: Attributes) -> Function:
    def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        bounds = _number(low), _number(high)
        if bounds == (None, None):
            return x
        return x.clamp(*bounds) if x.is_floating_point() else x.clamp(*(None if b is None else int(b) for b in bounds))

    return clip


def _cast(a: Attributes) -> Function | None:
    dtype = DTYPES.get(int(a["to"]))
    return None if dtype is None else lambda x: x.to(dtype)


def _reduce(name: str) -> Row:
    def row(a: Attributes) -> Function:
        keep = bool(a.get("keepdims", 1))

        def reduce(x: Tensor, axes: Tensor | None = None) -> Tensor:
            dims = _ints(axes) or a.get("axes")
            if not dims and a.get("noop_with_empty_axes", 0):
                return x
            dims = list(dims) if dims else list(range(x.dim()))
            made: Tensor = getattr(x, name)(dim=dims, keepdim=keep)
            return made

        return reduce

    return row


def _reshape(a: Attributes) -> Function:
    def reshape(x: Tensor, shape: Tensor) -> Tensor:
        sides = _ints(shape) or []
        if not a.get("allowzero", 0):
            sides = [x.shape[i] if side == 0 else side for i, side in enumerate(sides)]
        return x.reshape(sides)

    return reshape


def _flatten(a: Attributes) -> Function:
    axis = int(a.get("axis", 1))

    def flatten(x: Tensor) -> Tensor:
        first = axis % x.dim() if axis < 0 else axis
        return x.reshape(1, -1) if first == 0 else x.reshape(int(torch.Size(x.shape[:first]).numel()), -1)

    return flatten


def _transpose(a: Attributes) -> Function:
    return lambda x: x.permute(a.get("perm") or list(reversed(range(x.dim()))))


def _squeeze(a: Attributes) -> Function:
    def squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
        dims = _ints(axes) or a.get("axes") or [dim for dim in range(x.dim()) if x.shape[dim] == 1]
        for dim in sorted((int(dim) % x.dim() for dim in dims), reverse=True):
            x = x.squeeze(dim)
        return x

    return squeeze


def _unsqueeze(a: Attributes) -> Function:
    def unsqueeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
        dims = _ints(axes) or list(a.get("axes", ()))
        for dim in sorted(int(dim) % (x.dim() + len(dims)) for dim in dims):
            x = x.unsqueeze(dim)
        return x

    return unsqueeze


def _slice(a: Attributes) -> Function:
    def cut(x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None) -> Tensor:
        first, last = _ints(starts) or [], _ints(ends) or []
        places: list[Any] = [slice(None)] * x.dim()
        strides = _ints(steps) or [1] * len(first)
        for axis, low, high, step in zip(_ints(axes) or range(len(first)), first, last, strides, strict=True):
            if step < 0:  # torch has no negative steps: the elements are taken by their number
                numbers = list(range(x.shape[axis]))[_backwards(low, high, step, x.shape[axis])]
                x = x.index_select(axis, torch.tensor(numbers, dtype=torch.int64))
                continue
            side = x.shape[axis]  # ends beyond any side mean "to the end"
            places[axis] = slice(min(max(low, -side), side), min(max(high, -side - 1), side), step)
        return x[tuple(places)]

    return cut


def _backwards(low: int, high: int, step: int, side: int) -> slice:
    return slice(low, None if high < -side else high, step)


def _split(a: Attributes) -> Function:
    def split(x: Tensor, sizes: Tensor | None = None) -> Any:
        axis = int(a.get("axis", 0))
        lengths = _ints(sizes) or a.get("split")
        if lengths:
            return x.split(list(lengths), axis)
        return x.chunk(int(a["num_outputs"]), axis)

    return split


def _gather(a: Attributes) -> Function:
    axis = int(a.get("axis", 0))

    def gather(x: Tensor, index: Tensor) -> Tensor:
        index = torch.where(index < 0, index + x.shape[axis], index).long()
        taken = x.index_select(axis, index.reshape(-1))
        place = axis % x.dim()
        return taken.reshape(*x.shape[:place], *index.shape, *x.shape[place + 1 :])

    return gather


def _expand(x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(_ints(shape) or ())))


def _pooled(function: str) -> Row:
    def row(a: Attributes) -> Function | None:
        kernel, pads = list(a["kernel_shape"]), list(a.get("pads") or [0, 0, 0, 0])
        even = len(kernel) == 2 and pads[:2] == pads[2:] and all(2 * pads[i] <= kernel[i] for i in (0, 1))
        if not even or a.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or a.get("storage_order", 0):
            return None
        stride, ceil = list(a.get("strides") or [1, 1]), bool(a.get("ceil_mode", 0))
        dilation = list(a.get("dilations") or [1, 1])
        if function == "max":
            return lambda x: functional.max_pool2d(x, kernel, stride, pads[:2], dilation, ceil)
        if dilation != [1, 1]:
            return None
        count = bool(a.get("count_include_pad", 0))
        return lambda x: functional.avg_pool2d(x, kernel, stride, pads[:2], ceil, count)

    return row


def _pad(a: Attributes) -> Function | None:
    def pad(x: Tensor, pads: Tensor, fill: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
        sides = _ints(pads) or []
        half = len(sides) // 2
        both = {axis % x.dim(): i for i, axis in enumerate(_ints(axes) or range(half))}
        order: list[int] = []
        for dim in reversed(range(x.dim())):
            order += [sides[both[dim]], sides[both[dim] + half]] if dim in both else [0, 0]
        value = 0 if fill is None else fill.reshape(-1)[0].item()
        return functional.pad(x, order, "constant", value)

    return pad if a.get("mode", "constant") == "constant" else None


def _gelu(a: Attributes) -> Function:
    approximate = "tanh" if a.get("approximate", "none") == "tanh" else "none"
    return lambda x: functional.gelu(x, approximate=approximate)


def _batch_norm(a: Attributes) -> Function | None:
    if a.get("training_mode", 0):
        return None
    epsilon = float(a.get("epsilon", 1e-5))
    return lambda x, gamma, beta, mean, variance: functional.batch_norm(
        x, mean, variance, gamma, beta, False, 0.0, epsilon
    )


def _layer_norm(a: Attributes) -> Function | None:
    if int(a.get("axis", -1)) != -1:
        return None
    epsilon = float(a.get("epsilon", 1e-5))
    return lambda x, gamma, beta=None: functional.layer_norm(x, x.shape[-1:], gamma, beta, epsilon)


def _gemm(a: Attributes) -> Function:
    alpha, beta = float(a.get("alpha", 1.0)), float(a.get("beta", 1.0))

    def gemm(x: Tensor, y: Tensor, z: Tensor | None = None) -> Tensor:
        product = alpha * ((x.t() if a.get("transA", 0) else x) @ (y.t() if a.get("transB", 0) else y))
        return product if z is None else product + beta * z

    return gemm


def _constant_of_shape(a: Attributes) -> Function:
    fill = a.get("value")
    value = torch.zeros(1) if fill is None else torch.from_numpy(fill.numpy().copy()).reshape(-1)
    return lambda shape: torch.full(tuple(_ints(shape) or ()), value[0].item(), dtype=value.dtype)


def _softmax(a: Attributes) -> Function:
    return lambda x: torch.softmax(x, int(a.get("axis", -1)))


OPS: dict[str, Row] = {
    "Abs": _same(torch.abs),
    "Add": _same(torch.add),
    "And": _same(torch.logical_and),
    "AveragePool": _pooled("average"),
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "Ceil": _same(torch.ceil),
    "Clip": _clip,
    "Concat": lambda a: lambda *parts: torch.cat(parts, int(a["axis"])),
    "ConstantOfShape": _constant_of_shape,
    "Cos": _same(torch.cos),
    "Div": _same(_divide),
    "Dropout": lambda a: lambda x, *rest: x,
    "Elu": lambda a: lambda x: functional.elu(x, float(a.get("alpha", 1.0))),
    "Equal": _same(torch.eq),
    "Erf": _same(torch.erf),
    "Exp": _same(torch.exp),
    "Expand": _same(_expand),
    "Flatten": _flatten,
    "Floor": _same(torch.floor),
    "Gather": _gather,
    "GatherElements": lambda a: lambda x, i: torch.gather(x, int(a.get("axis", 0)), i % x.shape[a.get("axis", 0)]),
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": lambda a: lambda x: x.mean(dim=list(range(2, x.dim())), keepdim=True),
    "GlobalMaxPool": lambda a: lambda x: x.amax(dim=list(range(2, x.dim())), keepdim=True),
    "Greater": _same(torch.gt),
    "GreaterOrEqual": _same(torch.ge),
    "HardSigmoid": lambda a: lambda x: (float(a.get("alpha", 0.2)) * x + float(a.get("beta", 0.5))).clamp(0, 1),
    "HardSwish": _same(functional.hardswish),
    "Identity": _same(lambda x: x),
    "IsNaN": _same(torch.isnan),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda a: lambda x: functional.leaky_relu(x, float(a.get("alpha", 0.01))),
    "Less": _same(torch.lt),
    "LessOrEqual": _same(torch.le),
    "Log": _same(torch.log),
    "MatMul": _same(torch.matmul),
    "Max": _same(lambda *parts: parts[0] if len(parts) == 1 else torch.maximum(*parts)),
    "MaxPool": _pooled("max"),
    "Min": _same(lambda *parts: parts[0] if len(parts) == 1 else torch.minimum(*parts)),
    "Mul": _same(torch.mul),
    "Neg": _same(torch.neg),
    "Not": _same(torch.logical_not),
    "Or": _same(torch.logical_or),
    "Pad": _pad,
    "Pow": _same(lambda x, y: torch.pow(x, y).to(x.dtype)),
    "Range": _same(lambda first, last, step: torch.arange(first.item(), last.item(), step.item(), dtype=first.dtype)),
    "Reciprocal": _same(torch.reciprocal),
    "ReduceMax": _reduce("amax"),
    "ReduceMean": _reduce("mean"),
    "ReduceMin": _reduce("amin"),
    "ReduceSum": _reduce("sum"),
    "Relu": _same(torch.relu),
    "Reshape": _reshape,
    "Shape": lambda a: lambda x: torch.tensor(x.shape[a.get("start", 0) : a.get("end")], dtype=torch.int64),
    "Sigmoid": _same(torch.sigmoid),
    "Sign": _same(torch.sign),
    "Sin": _same(torch.sin),
    "Size": _same(lambda x: torch.tensor(x.numel(), dtype=torch.int64)),
    "Slice": _slice,
    "Softmax": _softmax,
    "Softplus": _same(functional.softplus),
    "Split": _split,
    "Sqrt": _same(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _same(torch.sub),
    "Tanh": _same(torch.tanh),
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _same(torch.where),
    "Xor": _same(torch.logical_xor),
}
"""Operator of the standard domain -> (attributes) -> function of the inputs; absent ones are None there."""
