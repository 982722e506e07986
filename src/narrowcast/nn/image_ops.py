"""What the nodes of a flow mean to an integer network: convolution, clamp, addition, pool, concatenation, or nothing.

One row of a table per operation, with its module, its functions and its method, each with a reader that turns the call
into an `ImageOp` or refuses. A node without meaning is run as it stands, between networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from narrowcast.kernels.network import CEIL_MODE, EXCLUDE_PADDING, GLOBAL, Window
from narrowcast.nn.conv import QuantizedConv
from narrowcast.nn.flow import FlowNode, Ref
from narrowcast.nn.folded import FoldedBatchNorm, FusedActivation


@dataclass(frozen=True)
class ImageOp:
    """One operation on images.

    Args:
        kind: "conv", "identity", "clamp", "hardswish", "add", "max_pool", "average_pool", "cat", "channel_pad",
            "pad".
        sources: names of the images it reads.
        low, high: bounds of a clamp.
        window: of a convolution or pool; of a pad only its padding.
        flat: whether an average pool drops the two dimensions that it makes 1.
        pad: (before, after) channels of zeros of a channel pad.
    """

    kind: str
    sources: tuple[str, ...]
    low: float = -math.inf
    high: float = math.inf
    window: Window = field(default_factory=Window)
    flat: bool = False
    pad: tuple[int, int] = (0, 0)


def image_op(node: FlowNode, module: nn.Module | None) -> ImageOp | None:
    """The meaning of a node; None where it has none here.

    Args:
        node: of a flow.
        module: what it calls, for a module.
    """
    if node.kind == "module":
        reader = next((read for types, read in _MODULES if isinstance(module, types)), None)
        if reader is None or len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], Ref):
            return None
        return reader(module, node.args[0].name)
    name = node.target.rpartition(".")[2]
    reader = _CALLS.get(name) if node.kind in ("function", "method") else None
    try:
        return None if reader is None else reader(*node.args, **dict(node.kwargs))
    except (TypeError, ValueError, AttributeError):  # a signature or an argument that the reader does not know
        return None


def _convolution(module: Any, source: str) -> ImageOp | None:
    shape = module.shape
    plain = shape.dimensions == 2 and not shape.transposed and shape.padding_mode == "zeros"
    if not plain or module.activation.mode != "static" or not module.is_integer or min(shape.padding) < 0:
        return None
    window = Window(shape.kernel, shape.stride, shape.padding, shape.dilation)
    return ImageOp("conv", (source,), window=window)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    (first, *rest) = value
    return int(first), int(rest[0] if rest else first)


def _source(x: Any) -> tuple[str]:
    if not isinstance(x, Ref):
        raise TypeError("not an image")
    return (x.name,)


def _identity(x: Any, *_: Any, **__: Any) -> ImageOp:
    return ImageOp("identity", _source(x))


def _clamp(x: Any, min: Any = None, max: Any = None) -> ImageOp:
    low, high = (-math.inf if min is None else float(min)), (math.inf if max is None else float(max))
    return ImageOp("clamp", _source(x), low, high)


def _hardtanh(x: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> ImageOp:
    return ImageOp("clamp", _source(x), float(min_val), float(max_val))


def _add(x: Any, other: Any, *, alpha: int = 1) -> ImageOp:
    if alpha != 1:
        raise ValueError("scaled addition")
    return ImageOp("add", _source(x) + _source(other))


def _max_pool(
    x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1, ceil_mode: bool = False,
    return_indices: bool = False,
) -> ImageOp:  # fmt: skip
    if return_indices:
        raise ValueError("indices")
    vertical, horizontal = _pair(padding)
    window = Window(
        _pair(kernel_size), _pair(kernel_size if stride is None else stride),
        (vertical, horizontal, vertical, horizontal), _pair(dilation), CEIL_MODE * bool(ceil_mode),
    )  # fmt: skip
    return ImageOp("max_pool", _source(x), window=window)


def _average_pool(
    x: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, ceil_mode: bool = False,
    count_include_pad: bool = True, divisor_override: Any = None,
) -> ImageOp:  # fmt: skip
    vertical, horizontal = _pair(padding)
    if divisor_override or (ceil_mode and count_include_pad):
        raise ValueError("a divisor that is neither the window nor what it covers of the image")
    flags = CEIL_MODE * bool(ceil_mode) | EXCLUDE_PADDING * (not count_include_pad)
    window = Window(
        _pair(kernel_size), _pair(kernel_size if stride is None else stride),
        (vertical, horizontal, vertical, horizontal), flags=flags,
    )  # fmt: skip
    return ImageOp("average_pool", _source(x), window=window)


def _adaptive_pool(x: Any, output_size: Any) -> ImageOp:
    if _pair(output_size) != (1, 1):
        raise ValueError("more than one output pixel")
    return ImageOp("average_pool", _source(x), window=Window(flags=GLOBAL))


def _mean(x: Any, dim: Any, keepdim: bool = False) -> ImageOp:
    if sorted(axis % 4 for axis in dim) != [2, 3]:
        raise ValueError("not the mean of an image")
    return ImageOp("average_pool", _source(x), window=Window(flags=GLOBAL), flat=not keepdim)


def _cat(tensors: Any, dim: int = 0) -> ImageOp:
    if dim not in (1, -3):
        raise ValueError("not along the channels")
    return ImageOp("cat", tuple(name for tensor in tensors for name in _source(tensor)))


def _subsample(x: Any, index: Any) -> ImageOp:
    """x[:, :, ::a, ::b]: a pool of single pixels."""
    everything = slice(None)
    if len(index) != 4 or tuple(index[:2]) != (everything, everything):
        raise ValueError("not a subsampling")
    steps = [part.step or 1 for part in index[2:] if part.start is None and part.stop is None]
    return ImageOp("max_pool", _source(x), window=Window(stride=(steps[0], steps[1]))) if len(steps) == 2 else _refuse()


def _pad(x: Any, pad: Any, mode: str = "constant", value: Any = None) -> ImageOp:
    """Zeros around the image, or around the channels."""
    if mode != "constant" or value not in (None, 0, 0.0) or min(pad) < 0:
        raise ValueError("not a padding with zeros")
    if len(pad) == 4:
        left, right, top, bottom = pad
        return ImageOp("pad", _source(x), window=Window(padding=(top, left, bottom, right)))
    if len(pad) != 6 or any(pad[:4]):
        raise ValueError("neither a padding of the image nor of the channels")
    return ImageOp("channel_pad", _source(x), pad=(pad[4], pad[5]))


def _zero_pad(x: Any, padding: Any) -> ImageOp:
    return _pad(x, (padding,) * 4 if isinstance(padding, int) else tuple(padding))


def _refuse() -> ImageOp:
    raise ValueError("not an operation on images")


def _relu(x: Any, inplace: bool = False) -> ImageOp:
    return ImageOp("clamp", _source(x), 0.0)


def _relu6(x: Any, inplace: bool = False) -> ImageOp:
    return ImageOp("clamp", _source(x), 0.0, 6.0)


def _hardswish(x: Any, inplace: bool = False) -> ImageOp:
    return ImageOp("hardswish", _source(x))


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> ImageOp:
    return ImageOp("identity", _source(x)) if not training else _refuse()


_CALLS: Mapping[str, Callable[..., ImageOp]] = {
    "add": _add, "add_": _add, "iadd": _add, "relu": _relu, "relu_": _relu, "relu6": _relu6, "hardtanh": _hardtanh,
    "clamp": _clamp, "clamp_": _clamp, "hardswish": _hardswish, "max_pool2d": _max_pool, "avg_pool2d": _average_pool,
    "adaptive_avg_pool2d": _adaptive_pool, "mean": _mean, "cat": _cat, "concat": _cat, "getitem": _subsample,
    "pad": _pad, "dropout": _dropout, "dropout2d": _dropout, "contiguous": _identity,
}  # fmt: skip


def _of(*attributes: str, call: Callable[..., ImageOp]) -> Callable[[Any, str], ImageOp | None]:
    """Reads a module by the attributes that its function takes as arguments."""

    def read(module: Any, source: str) -> ImageOp | None:
        try:
            return call(Ref(source), **{name: getattr(module, name) for name in attributes})
        except (TypeError, ValueError):
            return None

    return read


_MODULES: tuple[tuple[tuple[type[nn.Module], ...], Callable[[Any, str], ImageOp | None]], ...] = (
    ((QuantizedConv,), _convolution),
    ((FoldedBatchNorm, FusedActivation, nn.Identity, nn.Dropout, nn.Dropout2d), _of(call=_identity)),
    ((nn.ReLU6,), _of(call=_relu6)),  # before Hardtanh, which it is a kind of
    ((nn.ReLU,), _of(call=_relu)),
    ((nn.Hardtanh,), _of("min_val", "max_val", call=_hardtanh)),
    ((nn.Hardswish,), _of(call=_hardswish)),
    (
        (nn.MaxPool2d,),
        _of("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices", call=_max_pool),
    ),
    (
        (nn.AvgPool2d,),
        _of(
            "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override", call=_average_pool
        ),
    ),
    ((nn.AdaptiveAvgPool2d,), _of("output_size", call=_adaptive_pool)),
    ((nn.ZeroPad2d,), _of("padding", call=_zero_pad)),
)
