"""A quantized PyTorch model with float modules in the quantized ones' places, which torch's exporter can read.

Their weights are what the codes stand for, under the names that the codes are found by afterwards.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from narrowcast.core import PerGroup, QuantizedTensor
from narrowcast.errors import ModelError
from narrowcast.kernels.reference_linear import FUSED
from narrowcast.models.modules import replace_everywhere_
from narrowcast.nn import Activation, QuantizedConv, QuantizedEmbedding, QuantizedLinear, QuantizedModule
from narrowcast.nn.integer_graph import unfuse_


@dataclass(frozen=True)
class Source:
    """What a quantized module holds, as ONNX can have it.

    Args:
        record: its weight.
        activation: treatment of its input.
        kind: "Linear", "Conv" or "Embedding".
        behind: the activation function that the module has taken in, "none" where there is none.
    """

    record: QuantizedTensor
    activation: Activation
    kind: str
    behind: str = "none"


class _Linear(nn.Module):
    def __init__(self, module: QuantizedLinear) -> None:
        super().__init__()
        self.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        self.bias = None if module.bias is None else nn.Parameter(module.bias.clone(), requires_grad=False)
        self.activation = FUSED[module.fused]

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(functional.linear(x, self.weight, self.bias))


class _Convolution(nn.Module):
    def __init__(self, module: QuantizedConv) -> None:
        super().__init__()
        self.shape = module.shape
        self.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        self.bias = None if module.bias is None else nn.Parameter(module.bias.clone(), requires_grad=False)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        shape = self.shape
        top, left, bottom, right = shape.padding
        if shape.transposed:
            extra = shape.extra_padding(x, output_size)
            return functional.conv_transpose2d(
                x, self.weight, self.bias, shape.stride, (top, left), extra, shape.groups, shape.dilation
            )
        mode = "constant" if shape.padding_mode == "zeros" else shape.padding_mode
        if mode != "constant" or (top, left) != (bottom, right):
            pads = (left, right) if shape.dimensions == 1 else (left, right, top, bottom)
            x, top, left = functional.pad(x, pads, mode=mode), 0, 0
        if shape.dimensions == 1:
            return functional.conv1d(x, self.weight, self.bias, shape.stride[1], left, shape.dilation[1], shape.groups)
        return functional.conv2d(x, self.weight, self.bias, shape.stride, (top, left), shape.dilation, shape.groups)


class _Table(nn.Module):
    def __init__(self, module: QuantizedEmbedding) -> None:
        super().__init__()
        self.weight = nn.Parameter(module.weight.detach().float().clone(), requires_grad=False)

    def forward(self, indices: Tensor) -> Tensor:
        return functional.embedding(indices, self.weight)


_TWINS: dict[type, tuple[str, Any]] = {
    QuantizedLinear: ("Linear", _Linear),
    QuantizedConv: ("Conv", _Convolution),
    QuantizedEmbedding: ("Embedding", _Table),
}


def float_twin(model: nn.Module) -> tuple[nn.Module, dict[str, Source]]:
    """A copy of a quantized model with float modules, and what the quantized ones held, by path.

    Raises:
        ModelError: it has no quantized module, or one that has no form in ONNX.
    """
    twin = copy.deepcopy(model).eval()
    for module in list(twin.modules()):
        unfuse_(module)
    sources: dict[str, Source] = {}
    for path, module in list(twin.named_modules()):
        if not isinstance(module, QuantizedModule):
            continue
        row = _TWINS.get(type(module))
        if row is None:
            raise ModelError(
                f"module {path!r} ({type(module).__name__}) has no form in ONNX; keep it float by a rule of the "
                "recipe, and quantize again"
            )
        sources[path] = _source(module, row[0])
        twin = replace_everywhere_(twin, module, row[1](module))
    if not sources:
        raise ModelError("the model has no quantized module; pass what nc.quantize or nc.qat.convert returned")
    return twin, sources


def _source(module: Any, kind: str) -> Source:
    record = module.quantized_weights()["weight"]
    if kind == "Embedding":
        return Source(record, Activation(), kind)
    if kind == "Conv" and module.shape.transposed and not isinstance(record.spec.granularity, PerGroup):
        record = _turned(record, module)
    return Source(record, module.input_ranges(), kind, getattr(module, "fused", "none"))


def _turned(record: QuantizedTensor, module: QuantizedConv) -> QuantizedTensor:
    """The record of a transposed convolution with its columns as ONNX has them: not mirrored."""
    array = module.shape.from_matrix(record.codes)  # [in, out, height, width]
    codes = array.transpose(0, 1).reshape(record.codes.shape).contiguous()
    return QuantizedTensor(codes, record.scale, record.zero_point, record.spec, record.levels)
