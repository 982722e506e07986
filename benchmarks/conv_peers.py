"""Convolutions of torch, ONNX Runtime and narrowcast for one layer."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.conv_problem import ConvContender, ConvLayer, Prepare
from benchmarks.linear_onnx import MICROSOFT, session_of
from benchmarks.linear_problem import need
from benchmarks.linear_torch import int8_rows, uint8_range
from benchmarks.timing import Call

CALIBRATION = 4  # images


def in_torch(dtype: torch.dtype, memory_format: torch.memory_format) -> Any:
    """functional.conv2d and relu_ in one floating-point type and memory format."""

    def make(layer: ConvLayer) -> Prepare:
        module = layer.module().to(dtype=dtype, memory_format=memory_format)

        def prepare(x: Tensor) -> Call:
            converted = x.to(dtype).contiguous(memory_format=memory_format)
            return lambda: functional.relu_(module(converted))

        return prepare

    return make


@lru_cache(maxsize=4)
def quantized(layer: ConvLayer) -> nn.Module:
    """The layer and its ReLU as nc.quantize makes them with static ranges; inputs are float."""
    import narrowcast as nc

    with torch.inference_mode(False):
        model = nn.Sequential(layer.module(), nn.ReLU())
        return nc.quantize(model, "static-int8", data=[layer.example(CALIBRATION)], progress=False).model


def in_narrowcast(memory_format: torch.memory_format) -> Any:
    """Narrowcast's static int8 with float inputs of one memory format."""

    def make(layer: ConvLayer) -> Prepare:
        model = quantized(layer)

        def prepare(x: Tensor) -> Call:
            converted = x.contiguous(memory_format=memory_format)
            return lambda: model(converted)

        return prepare

    return make


def graph(layer: ConvLayer, nodes: list[Any], constants: dict[str, Any], value_type: int, *, innermost: bool) -> bytes:
    """A graph from X to Y, four dimensions each, channels second or innermost."""
    from onnx import helper, numpy_helper

    def shape(channels: int, size: int) -> list[Any]:
        return ["B", size, size, channels] if innermost else ["B", channels, size, size]

    made = helper.make_graph(
        nodes,
        "convolution",
        [helper.make_tensor_value_info("X", value_type, shape(layer.inputs, layer.size))],
        [helper.make_tensor_value_info("Y", value_type, shape(layer.outputs, layer.output_size))],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    return bytes(helper.make_model(made, opset_imports=opsets, ir_version=10).SerializeToString())


def attributes(layer: ConvLayer) -> dict[str, Any]:
    """The attributes of the ONNX operator."""
    pad = layer.kernel // 2
    return {
        "kernel_shape": [layer.kernel] * 2,
        "strides": [layer.stride] * 2,
        "pads": [pad] * 4,
        "group": layer.groups,
    }


def bound(model: bytes, x: Tensor, answer_shape: tuple[int, ...]) -> Call:
    """A call with input and output bound to memory."""
    session = session_of(model)
    output = torch.empty(answer_shape, dtype=x.dtype)
    binding = session.io_binding()
    kind = {torch.float32: "float32", torch.uint8: "uint8"}[x.dtype]
    binding.bind_input("X", "cpu", 0, kind, list(x.shape), x.data_ptr())
    binding.bind_output("Y", "cpu", 0, kind, list(output.shape), output.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return output

    call.keeps = x  # type: ignore[attr-defined]  # the binding knows only its address
    return call


def onnxruntime_float32(layer: ConvLayer) -> Prepare:
    """Conv and Relu, which ONNX Runtime fuses."""
    need("onnx")
    need("onnxruntime")
    from onnx import TensorProto, helper

    module = layer.module()
    nodes = [
        helper.make_node("Conv", ["X", "W", "bias"], ["C"], **attributes(layer)),
        helper.make_node("Relu", ["C"], ["Y"]),
    ]
    constants = {"W": module.weight.detach(), "bias": module.bias.detach()}
    model = graph(layer, nodes, constants, TensorProto.FLOAT, innermost=False)
    return lambda x: bound(model, x, (len(x), layer.outputs, layer.output_size, layer.output_size))


def ranges(layer: ConvLayer) -> tuple[tuple[float, int], tuple[float, int]]:
    """Scale and zero point of the input and of the output after ReLU."""
    x = layer.example(CALIBRATION)
    with torch.no_grad():
        return uint8_range(x), uint8_range(functional.relu(layer.module()(x)))


def quantized_constants(layer: ConvLayer) -> dict[str, Tensor]:
    """The initializers of QLinearConv: uint8 values with one range, int8 weights per channel, int32 bias."""
    module = layer.module()
    codes, scale = int8_rows(module.weight.detach().flatten(1))
    (x_scale, x_zero), (y_scale, y_zero) = ranges(layer)
    return {
        "x_scale": torch.tensor(x_scale),
        "x_zero": torch.tensor(x_zero, dtype=torch.uint8),
        "W": codes.view_as(module.weight),
        "w_scale": scale,
        "w_zero": torch.zeros(len(scale), dtype=torch.int8),
        "y_scale": torch.tensor(y_scale),
        "y_zero": torch.tensor(y_zero, dtype=torch.uint8),
        "bias": (module.bias.detach() / (scale * x_scale)).round().to(torch.int32),
    }


QLINEAR_INPUTS = ["X", "x_scale", "x_zero", "W", "w_scale", "w_zero", "y_scale", "y_zero", "bias"]


def onnxruntime_uint8(layer: ConvLayer) -> Prepare:
    """QLinearConv from uint8 to uint8 with channels innermost, as inside a quantized graph; clipping at 0 is the ReLU.

    Quantizing the input and dequantizing the output are not part of it: it is the bare product.
    """
    need("onnx")
    need("onnxruntime")
    from onnx import TensorProto, helper

    node = helper.make_node(
        "QLinearConv", QLINEAR_INPUTS, ["Y"], domain=MICROSOFT, channels_last=1, **attributes(layer)
    )
    model = graph(layer, [node], quantized_constants(layer), TensorProto.UINT8, innermost=True)
    x_range, y_range = ranges(layer)

    def prepare(x: Tensor) -> Call:
        codes = (x / x_range[0]).round().add(x_range[1]).clamp(0, 255).to(torch.uint8)
        innermost = codes.permute(0, 2, 3, 1).contiguous()
        call = bound(model, innermost, (len(x), layer.output_size, layer.output_size, layer.outputs))
        call.range = y_range  # type: ignore[attr-defined]
        return call

    return prepare


def onnxruntime_float_ends(layer: ConvLayer) -> Prepare:
    """QuantizeLinear, QLinearConv, DequantizeLinear: float in and out, as narrowcast is called."""
    need("onnx")
    need("onnxruntime")
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("QuantizeLinear", ["X", "x_scale", "x_zero"], ["Q"]),
        helper.make_node("QLinearConv", ["Q", *QLINEAR_INPUTS[1:]], ["R"], **attributes(layer)),
        helper.make_node("DequantizeLinear", ["R", "y_scale", "y_zero"], ["Y"]),
    ]
    model = graph(layer, nodes, quantized_constants(layer), TensorProto.FLOAT, innermost=False)
    return lambda x: bound(model, x, (len(x), layer.outputs, layer.output_size, layer.output_size))


UINT8_PEER = "ONNX Runtime QLinearConv uint8 to uint8"
CONTENDERS = (
    ConvContender("torch float32", "float32", 4, in_torch(torch.float32, torch.contiguous_format)),
    ConvContender("torch float32 channels_last", "float32", 4, in_torch(torch.float32, torch.channels_last)),
    ConvContender("torch bfloat16 channels_last", "bfloat16", 2, in_torch(torch.bfloat16, torch.channels_last)),
    ConvContender("ONNX Runtime float32", "float32", 4, onnxruntime_float32),
    ConvContender("ONNX Runtime QLinearConv float to float", "int8", 4, onnxruntime_float_ends),
    ConvContender(UINT8_PEER, "int8", 1, onnxruntime_uint8),
    ConvContender("narrowcast static int8", "int8", 4, in_narrowcast(torch.contiguous_format)),
    ConvContender("narrowcast static int8 channels_last", "int8", 4, in_narrowcast(torch.channels_last)),
)
