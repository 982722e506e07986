"""The modules of a twin: what an ONNX node with a weight, or the end of a normalization, is in torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional

from narrowcast.models.onnx_layers import KINDS, Use, attribute, reads_input_first

_NORMS: dict[str, type[nn.Module]] = {
    "LayerNormalization": nn.LayerNorm,
    "RMSNormalization": nn.RMSNorm,
    "SimplifiedLayerNormalization": nn.RMSNorm,
}


@dataclass
class Made:
    """A node, or two, as a module.

    Args:
        module: with one input.
        input: the value that it reads.
        output: the value that it gives.
        consumed: the nodes that it stands for.
        before: what is done to the input first; None for nothing.
        use: the weight of a layer; None for a normalization.
    """

    module: nn.Module
    input: ir.Value
    output: ir.Value
    consumed: tuple[ir.Node, ...]
    before: Callable[[Tensor], Tensor] | None = None
    use: Use | None = None


class ChannelScaleNorm(nn.Module):
    """The end of a normalization that is written in single nodes: a scale and a shift per channel.

    Args:
        weight: [channels].
        bias: [channels], or None for none.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., channels] -> the same shape."""
        return x * self.weight if self.bias is None else x * self.weight + self.bias


@dataclass
class Parameters:
    """The parameters of a twin: a constant that several nodes read as the same matrix is one of them.

    Args:
        made: by constant and the way in which it lies.
    """

    made: dict[tuple[int, bool], nn.Parameter] = field(default_factory=dict)

    def of(self, use: Use) -> nn.Parameter:
        """The weight as torch has it: [out, in, ...], of transposed convolutions [in, out, ...]."""
        turned = is_turned(use)
        key = id(use.weight), turned
        if key not in self.made:
            array = use.weight.const_value.numpy()
            self.made[key] = _parameter(shared_tensor(array.T if turned else array))
        return self.made[key]


def is_turned(use: Use) -> bool:
    """Whether the constant of a product is the transpose of the matrix [out, in]."""
    return use.op in ("Gemm", "MatMul") and reads_input_first(use) != use.transposed


def shared_tensor(array: Any) -> Tensor:
    """A tensor in the memory of an array, which may be that of a mapped file: it must not be written to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns of memory that cannot be written
        return torch.from_numpy(array)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _constant(value: Any) -> Tensor | None:
    tensor = None if value is None else value.const_value
    return None if tensor is None else torch.from_numpy(np.array(tensor.numpy()))


def layer_of(use: Use, parameters: Parameters) -> Made | None:
    """A node with a weight as a module; None where torch has none that computes the same."""
    make = _MAKERS.get(use.op)
    if make is None or use.inside or KINDS[use.op].refuse(use) or (use.bias is not None and use.bias_array is None):
        return None
    return make(use, parameters)


def _linear(use: Use, parameters: Parameters) -> Made | None:
    weight, bias = parameters.of(use), use.bias_array
    if bias is not None and bias.size not in (1, weight.shape[0]):
        return None
    module = nn.Linear(1, 1, bias=False, device="meta")
    module.in_features, module.out_features, module.weight = weight.shape[1], weight.shape[0], weight
    if bias is not None:
        module.bias = _parameter(torch.from_numpy(np.array(np.broadcast_to(bias, weight.shape[0]))))
    node, adder = use.node, use.adder[0]
    last = node if bias is None or adder is None else adder
    return Made(module, node.inputs[0], last.outputs[0], (node,) if last is node else (node, last), use=use)


def _convolution(use: Use, parameters: Parameters) -> Made | None:
    weight = parameters.of(use)
    spatial = weight.dim() - 2
    if spatial not in (1, 2):
        return None
    node = use.node
    stride, dilation = (tuple(attribute(node, name, [1] * spatial)) for name in ("strides", "dilations"))
    pads = list(attribute(node, "pads", [0] * 2 * spatial))
    auto = attribute(node, "auto_pad", "NOTSET")
    even = auto in ("NOTSET", "VALID") and pads[:spatial] == pads[spatial:]
    groups = int(attribute(node, "group", 1))
    kind: Any = nn.Conv1d if spatial == 1 else nn.Conv2d
    module = kind(groups, groups, tuple(weight.shape[2:]), stride, tuple(pads[:spatial]) if even else 0, dilation,
                  groups, False, device="meta")  # fmt: skip
    module.in_channels, module.out_channels, module.weight = weight.shape[1] * groups, weight.shape[0], weight
    _set_bias(module, use)
    before = None if even else _padding(use, spatial, auto, pads)
    return Made(module, node.inputs[0], node.outputs[0], (node,), before, use)


def _padding(use: Use, spatial: int, auto: str, pads: list[int]) -> Callable[[Tensor], Tensor]:
    """Zeros beside the image where the two sides differ, or depend on the image."""
    node, kernel = use.node, list(use.weight.const_value.shape[2:])
    stride, dilation = (list(attribute(node, name, [1] * spatial)) for name in ("strides", "dilations"))

    def pad(x: Tensor) -> Tensor:
        sides = []
        for axis in reversed(range(spatial)):
            low, high = pads[axis], pads[axis + spatial]
            if auto.startswith("SAME"):
                side, reach = x.shape[axis + 2], dilation[axis] * (int(kernel[axis]) - 1) + 1
                total = max(0, (-(-side // stride[axis]) - 1) * stride[axis] + reach - side)
                low, high = (total // 2, total - total // 2)[:: 1 if auto == "SAME_UPPER" else -1]
            sides += [low, high]
        return functional.pad(x, sides, "constant", 0)

    return pad


def _deconvolution(use: Use, parameters: Parameters) -> Made | None:
    node, weight = use.node, parameters.of(use)
    pads, more = list(attribute(node, "pads", [0] * 4)), list(attribute(node, "output_padding", [0, 0]))
    fits = weight.dim() == 4 and pads[:2] == pads[2:] and "output_shape" not in node.attributes
    if not fits or attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None
    stride, dilation = (tuple(attribute(node, name, [1, 1])) for name in ("strides", "dilations"))
    kind: Any = nn.ConvTranspose2d
    module = kind(1, 1, tuple(weight.shape[2:]), stride, tuple(pads[:2]), tuple(more), 1, False, dilation,
                                device="meta")  # fmt: skip
    module.in_channels, module.out_channels, module.weight = weight.shape[0], weight.shape[1], weight
    _set_bias(module, use)
    return Made(module, node.inputs[0], node.outputs[0], (node,), use=use)


def _set_bias(module: Any, use: Use) -> None:
    if use.bias_array is not None:
        module.bias = _parameter(torch.from_numpy(np.array(use.bias_array)))


def _embedding(use: Use, parameters: Parameters) -> Made:
    weight = parameters.of(use)
    module = nn.Embedding(1, 1, device="meta")
    module.num_embeddings, module.embedding_dim, module.weight = weight.shape[0], weight.shape[1], weight
    rows = weight.shape[0]
    node = use.node
    return Made(module, node.inputs[1], node.outputs[0], (node,), lambda i: torch.where(i < 0, i + rows, i), use)


_MAKERS: dict[str, Callable[[Use, Parameters], Made | None]] = {
    "Conv": _convolution, "ConvTranspose": _deconvolution, "Gather": _embedding, "Gemm": _linear, "MatMul": _linear,
}  # fmt: skip


def norm_of(node: ir.Node) -> Made | None:
    """A normalization of the last axis, or the scale and shift at its end, as a module; None where it is none."""
    if node.op_type in _NORMS:
        return _whole_norm(node)
    if node.op_type != "Mul" or node.domain != "":
        return None
    index = 0 if _per_channel(node.inputs[0]) is not None else 1
    weight = _per_channel(node.inputs[index])
    if weight is None or not _is_normalized(node.inputs[1 - index]):
        return None
    output, consumed, bias = node.outputs[0], [node], None
    readers = list(output.uses())
    if len(readers) == 1 and readers[0][0].op_type == "Add" and not output.is_graph_output():
        adder = readers[0][0]
        shift = _per_channel(adder.inputs[1 - readers[0][1]])
        if shift is not None and shift.numel() == weight.numel():
            output, consumed, bias = adder.outputs[0], [node, adder], shift
    return Made(ChannelScaleNorm(weight, bias), node.inputs[1 - index], output, tuple(consumed))


def _per_channel(value: Any) -> Tensor | None:
    """A constant with a number for every channel of the last axis, [channels]; None for anything else."""
    found = _constant(value)
    if found is None or found.dim() == 0 or found.numel() != found.shape[-1] or found.numel() < 2:
        return None
    return found.reshape(-1)


def _whole_norm(node: ir.Node) -> Made | None:
    weight = _constant(node.inputs[1])
    bias = _constant(node.inputs[2]) if len(node.inputs) > 2 else None
    spare = any(value.uses() or value.is_graph_output() for value in node.outputs[1:])
    if weight is None or weight.dim() != 1 or spare or int(attribute(node, "axis", -1)) != -1:
        return None
    epsilon = float(attribute(node, "epsilon", 1e-5))
    module: Any = _NORMS[str(node.op_type)](weight.numel(), eps=epsilon, device="meta")
    module.weight = _parameter(weight)
    if isinstance(module, nn.LayerNorm):
        module.register_parameter("bias", None if bias is None else _parameter(bias))
    return Made(module, node.inputs[0], node.outputs[0], (node,))


def _is_normalized(value: Any) -> bool:
    """Whether a value was divided by a root, or multiplied with the reciprocal of one, as normalizations are."""
    producer = value.producer() if value is not None else None
    while producer is not None and producer.op_type == "Cast":
        producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
    if producer is None or producer.op_type not in ("Div", "Mul"):
        return False
    roots = {"Sqrt"} if producer.op_type == "Div" else {"Reciprocal", "Div", "Pow"}
    makers = [part.producer() for part in producer.inputs if part is not None]
    return any(maker is not None and maker.op_type in roots and _has_root(maker) for maker in makers)


def _has_root(node: ir.Node) -> bool:
    if node.op_type in ("Sqrt", "Pow"):
        return True
    makers = [part.producer() for part in node.inputs if part is not None]
    return any(maker is not None and maker.op_type == "Sqrt" for maker in makers)
