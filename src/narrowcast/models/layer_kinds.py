"""The table of torch modules whose weights can be quantized: one row per type, nothing else knows these types."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from narrowcast.core import QuantizedTensor, QuantSpec
from narrowcast.models.fused_experts import (
    experts_biases,
    experts_matrix,
    experts_shape,
    is_fused_experts,
    refuse_experts,
)
from narrowcast.models.recurrent_inputs import inner_inputs
from narrowcast.nn import (
    Activation,
    ConvShape,
    OutlierLinear,
    QuantizedConv,
    QuantizedEmbedding,
    QuantizedExperts,
    QuantizedLinear,
    QuantizedModule,
    QuantizedRecurrent,
    RecurrentShape,
    is_int8_per_channel,
    linear_op,
)

Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class LayerKind:
    """How one type of module is read and replaced.

    Args:
        name: the type as recipes name it.
        shapes: module -> shape (out, in * kernel) of every weight matrix, by parameter name.
        matrix: (module, parameter) -> that weight as a matrix.
        build: (module, records by parameter, activation) -> the module that replaces it.
        refuse: module -> why this one cannot be replaced; "" when it can.
        integer_op: (module, spec, activation mode) -> the integer kernel that would run, or None.
        channel_dim: dimension, from the end, of input and output that holds the channels of the weight's columns.
        kernel_elements: module -> columns of the weight per input channel.
        flattens: whether all dimensions of the input but the last are one: tokens, in any order.
        takes_activation: whether the input can be quantized (an embedding's input is an index).
        restore: (module, parameter, matrix) -> the matrix in the parameter's shape; differentiable.
        share: (module, inputs) -> share of the weight that an input vector is multiplied with.
        inner: (module, args, kwargs) -> the vectors that each weight multiplies in a call, by parameter name; None
            where every weight multiplies the input, or where nothing tells.
    """

    name: str
    shapes: Callable[[Any], Shapes]
    matrix: Callable[[Any, str], Tensor]
    build: Callable[[Any, Mapping[str, QuantizedTensor], Activation], QuantizedModule]
    integer_op: Callable[[Any, QuantSpec, str], str | None]
    refuse: Callable[[Any], str] = lambda module: ""
    channel_dim: int = -1
    kernel_elements: Callable[[Any], int] = lambda module: 1
    flattens: bool = False
    takes_activation: bool = True
    restore: Callable[[Any, str, Tensor], Tensor] = lambda module, name, matrix: matrix
    share: Callable[[Any, tuple[Any, ...]], float] = lambda module, args: 1.0
    inner: Callable[[Any, tuple[Any, ...], Mapping[str, Any]], dict[str, Tensor]] | None = None


def _linear_shape(module: nn.Linear) -> Shapes:
    return {"weight": (module.weight.shape[0], module.weight.shape[1])}


def _build_linear(module: Any, records: Mapping[str, QuantizedTensor], activation: Activation) -> QuantizedLinear:
    record = records["weight"]
    bias = None if module.bias is None else module.bias.float()
    if activation.outliers is not None:
        matrix = module.weight if isinstance(module, nn.Linear) else module.weight.t()
        columns = matrix.index_select(1, activation.outliers)
        return OutlierLinear(record.spec, record.shape, activation, record=record, columns=columns, bias=bias)
    return QuantizedLinear(record.spec, record.shape, activation, record=record, bias=bias)


def _linear_integer_op(module: nn.Linear, spec: QuantSpec, mode: str) -> str | None:
    return linear_op(spec, (module.weight.shape[0], module.weight.shape[1]), mode)


_LINEAR = LayerKind(
    "Linear", _linear_shape, lambda module, name: module.weight, _build_linear, _linear_integer_op, flattens=True
)

# Hugging Face's Conv1D is a linear layer whose weight lies transposed: [in, out].
_TRANSPOSED_LINEAR = LayerKind(
    "Conv1D",
    lambda module: {"weight": (module.weight.shape[1], module.weight.shape[0])},
    lambda module, name: module.weight.t(),
    _build_linear,
    lambda module, spec, mode: linear_op(spec, (module.weight.shape[1], module.weight.shape[0]), mode),
    flattens=True,
    restore=lambda module, name, matrix: matrix.t(),
)


def _build_conv(module: Any, records: Mapping[str, QuantizedTensor], activation: Activation) -> QuantizedConv:
    record = records["weight"]
    bias = None if module.bias is None else module.bias.float()
    return QuantizedConv(record.spec, ConvShape.of(module), activation, record=record, bias=bias)


def _refuse_conv(module: Any) -> str:
    _, padding, _ = ConvShape.of(module).as_direct()
    if min(padding) < 0:
        return "padding larger than the kernel's reach crops the input; no kernel does that"
    return ""


def _conv_kind(name: str, dimensions: int) -> LayerKind:
    return LayerKind(
        name,
        lambda module: {"weight": ConvShape.of(module).matrix},
        lambda module, parameter: ConvShape.of(module).to_matrix(module.weight),
        _build_conv,
        lambda module, spec, mode: (
            "conv2d_int8" if mode in ("dynamic", "static") and is_int8_per_channel(spec) else None
        ),
        refuse=_refuse_conv,
        channel_dim=-1 - dimensions,
        kernel_elements=lambda module: ConvShape.of(module).kernel[0] * ConvShape.of(module).kernel[1],
        restore=lambda module, name, matrix: ConvShape.of(module).from_matrix(matrix).reshape(module.weight.shape),
    )


def _build_embedding(module: Any, records: Mapping[str, QuantizedTensor], activation: Activation) -> QuantizedEmbedding:
    record = records["weight"]
    dtype = module.weight.dtype if module.weight.dtype.itemsize == 2 else torch.float32
    return QuantizedEmbedding(record.spec, record.shape, record=record, padding_idx=module.padding_idx, dtype=dtype)


def _build_recurrent(module: Any, records: Mapping[str, QuantizedTensor], activation: Activation) -> QuantizedRecurrent:
    biases = {name: value.detach().float() for name, value in module.named_parameters() if name.startswith("bias")}
    specs = {name: record.spec for name, record in records.items()}
    shape = RecurrentShape.of(module)
    return QuantizedRecurrent(shape, specs, activation, records=dict(records), biases=biases)


def _refuse_recurrent(module: Any) -> str:
    return "LSTM with a projection (proj_size) has no quantized module" if getattr(module, "proj_size", 0) else ""


def _recurrent_kind(name: str, op: str) -> LayerKind:
    return LayerKind(
        name,
        lambda module: RecurrentShape.of(module).weights(),
        lambda module, parameter: getattr(module, parameter),
        _build_recurrent,
        lambda module, spec, mode: op if mode == "dynamic" and is_int8_per_channel(spec) else None,
        refuse=_refuse_recurrent,
        inner=inner_inputs,
    )


def _build_experts(module: Any, records: Mapping[str, QuantizedTensor], activation: Activation) -> QuantizedExperts:
    shape = experts_shape(module)
    specs = {name: record.spec for name, record in records.items()}
    return QuantizedExperts(shape, specs, activation, records=dict(records), biases=experts_biases(module, shape))


def _experts_op(module: Any, spec: QuantSpec, mode: str) -> str | None:
    """The op that runs both products; static ranges would be one for all experts, which none has."""
    ops = {linear_op(spec, matrix, mode) for matrix in experts_shape(module).weights().values()}
    return ops.pop() if len(ops) == 1 and mode != "static" else None


_EXPERTS = LayerKind(
    "Experts",
    lambda module: experts_shape(module).weights(),
    experts_matrix,
    _build_experts,
    _experts_op,
    share=lambda module, args: args[1].shape[-1] / module.num_experts if len(args) > 1 else 1.0,
)

KINDS: dict[type[nn.Module], LayerKind] = {
    nn.Linear: _LINEAR,
    nn.Conv1d: _conv_kind("Conv1d", 1),
    nn.Conv2d: _conv_kind("Conv2d", 2),
    nn.ConvTranspose2d: _conv_kind("ConvTranspose2d", 2),
    nn.Embedding: LayerKind(
        "Embedding",
        _linear_shape,
        lambda module, name: module.weight,
        _build_embedding,
        lambda module, spec, mode: None,
        refuse=lambda module: "max_norm rescales rows while they are looked up" if module.max_norm is not None else "",
        takes_activation=False,
    ),
    nn.LSTM: _recurrent_kind("LSTM", "lstm_int8"),
    nn.GRU: _recurrent_kind("GRU", "gru_int8"),
}


def kind_of(module: nn.Module) -> LayerKind | None:
    """The row for a module, its own type or a subclass that computes the same; None where there is none.

    A module with a `forward` of its own computes something else, one whose weight is no parameter (parametrized,
    pruned, weight norm by hooks) computes it anew at each call, and the output projection of an attention that was not
    taken apart is never called, only read: none of these is replaced.
    """
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return _TRANSPOSED_LINEAR
    if is_fused_experts(module):
        return None if refuse_experts(module) else _EXPERTS
    for base, kind in KINDS.items():
        if isinstance(module, base):
            is_plain = type(module).forward is base.forward and "forward" not in module.__dict__
            return kind if is_plain and _owns_weights(module) and not _is_only_read(module) else None
    return None


def _owns_weights(module: nn.Module) -> bool:
    if hasattr(module, "parametrizations"):
        return False
    names = ("weight_ih_l0", "weight_hh_l0") if isinstance(module, nn.LSTM | nn.GRU) else ("weight",)
    return all(module._parameters.get(name) is not None for name in names)


def _is_only_read(module: nn.Module) -> bool:
    return isinstance(module, NonDynamicallyQuantizableLinear)


def why_unsupported(module: nn.Module, parameter: str) -> str:
    """Why a weight of this module stays as it is."""
    name = type(module).__name__
    if hasattr(module, "parametrizations"):
        return f"{name} is parametrized: its weight is computed at each call; remove the parametrization first"
    if is_fused_experts(module) and (reason := refuse_experts(module)):
        return reason
    if _is_only_read(module):
        return f"{name}: the attention around it multiplies with its weight without calling it"
    for base, kind in KINDS.items():
        if isinstance(module, base) and not _owns_weights(module):
            return f"{name}: its weight is computed at each call (weight norm, pruning); make it permanent first"
        if isinstance(module, base):
            return f"{name} has a forward of its own, so it is not the {kind.name} it derives from"
    if "Norm" in name:
        return f"{name}: scales and shifts of a normalization stay float"
    if name == "FoldedBatchNorm":
        return f"{name}: folded"
    return f"{name}.{parameter} is not the weight of a supported layer type"
