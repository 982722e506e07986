"""Every form of a quantized product, in ONNX Runtime: the right numbers, by the kernel that was promised."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")

from tests.onnx_files import graphs

from narrowcast.core import QuantSpec, choose_scale
from narrowcast.methods import Rtn
from narrowcast.models.onnx_model import OnnxModel, Written
from narrowcast.models.onnx_verdict import kernels_of, optimized_graph
from narrowcast.nn import Activation

STATIC = QuantSpec.parse("uint8/tensor")


def written(
    model: Any, spec: str, given: str = "", x: Any = None, *, blocked: bool = True
) -> tuple[OnnxModel, Any, Any]:
    """The one layer of a model in a format; with a static input, its range is that of `x`."""
    adapter = OnnxModel(model, blocked=blocked)
    (layer,) = [row for row in adapter.layers() if row.type != "Parameter"]
    path = layer.sites[0].path
    record = Rtn(range="absmax").quantize(adapter.weight(layer), QuantSpec.parse(spec))
    activation = Activation(QuantSpec.parse(given)) if given else Activation()
    if given == "uint8/tensor":
        ranges = {}
        for name in adapter.place_ranges([path]):
            seen = torch.as_tensor(x if name == "x" else adapter.original(torch.as_tensor(x)))
            scale, zero = choose_scale(seen.min().view(1, 1), seen.max().view(1, 1), STATIC)
            ranges[name] = (float(scale), int(zero))
        activation = Activation(STATIC, torch.tensor([ranges["x"][0]]), torch.tensor([ranges["x"][1]]).byte())
    adapter.install(path, Written(record, activation))
    if given == "uint8/tensor":
        adapter.put_ranges([path], ranges)
    adapter.finish()
    return adapter, record, kernels_of(optimized_graph(adapter.graph), adapter.codes)[path]


def float_twin(model: Any, record: Any) -> Any:
    """The float model with the numbers that the codes stand for."""
    adapter = OnnxModel(model)
    layer = adapter.layers()[0]
    use = adapter.use(layer.sites[0])
    from narrowcast.models.onnx_layers import KINDS

    array = use.weight.const_value.numpy()
    matrix = record.dequantize().numpy()
    restored = {"ConvTranspose": lambda: KINDS["ConvTranspose"].restore(matrix, use)}.get(
        use.op, lambda: matrix.T if array.shape != matrix.shape and array.ndim == 2 else matrix.reshape(array.shape)
    )()
    for tensor in model.graph.initializer:
        if tensor.name == "layer.weight":
            tensor.CopyFrom(graphs.constant(np.ascontiguousarray(restored, dtype=np.float32), "layer.weight"))
    return OnnxModel(model).original


PRODUCTS = {
    "gemm": lambda: graphs.one("Gemm", graphs.normal(40, 12), ["n", 40], bias=graphs.normal(12, seed=9)),
    "gemm transposed": lambda: graphs.one("Gemm", graphs.normal(12, 40), ["n", 40], bias=graphs.normal(12), transB=1),
    "matmul": lambda: graphs.one("MatMul", graphs.normal(40, 12), ["n", 40]),
    "matmul with bias": lambda: graphs.one("MatMul", graphs.normal(40, 12), ["n", 40], bias=graphs.normal(12)),
    "matmul of tokens": lambda: graphs.one(
        "MatMul", graphs.normal(40, 12), ["n", 4, 40], bias=graphs.normal(12), rank=3
    ),
}
CONVOLUTIONS = {
    "conv": lambda: graphs.one(
        "Conv", graphs.normal(8, 4, 3, 3), ["n", 4, 9, 9], bias=graphs.normal(8), rank=4, pads=[1] * 4, strides=[2, 2]
    ),
    "grouped conv": lambda: graphs.one("Conv", graphs.normal(8, 2, 3, 3), ["n", 4, 9, 9], rank=4, group=2),
    "conv of sounds": lambda: graphs.one("Conv", graphs.normal(8, 4, 3), ["n", 4, 20], bias=graphs.normal(8), rank=3),
}
DECONVOLUTION = {
    "deconvolution": lambda: graphs.one(
        "ConvTranspose", graphs.normal(4, 8, 3, 3), ["n", 4, 9, 9], rank=4, strides=[2, 2]
    )
}
SHAPES = {"matmul of tokens": (3, 4, 40), "conv of sounds": (3, 4, 20)}


def example(name: str) -> Any:
    shape = SHAPES.get(name) or ((3, 40) if name in PRODUCTS else (3, 4, 9, 9))
    return torch.from_numpy(graphs.normal(*shape, seed=7))


def relative(got: Any, expected: Any) -> float:
    return float((got - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", [*PRODUCTS, *CONVOLUTIONS, *DECONVOLUTION])
@pytest.mark.parametrize(
    "spec", ["int8/channel", "int8/channel/asym", "int4/group32/asym", "int4/channel", "int4/group16"]
)
def test_stored_weights_are_the_very_numbers_of_the_record(name: str, spec: str) -> None:
    build = (PRODUCTS | CONVOLUTIONS | DECONVOLUTION)[name]
    adapter, record, kernel = written(build(), spec)
    expected = float_twin(build(), record)(example(name))
    assert relative(adapter.model(example(name)), expected) < 2e-6
    assert (kernel.op == "MatMulNBits") == (name in PRODUCTS)


@pytest.mark.parametrize("name", [*PRODUCTS, *CONVOLUTIONS, *DECONVOLUTION])
@pytest.mark.parametrize("spec", ["fp16", "bf16"])
def test_cast_weights_are_the_very_numbers_of_the_record(name: str, spec: str) -> None:
    build = (PRODUCTS | CONVOLUTIONS | DECONVOLUTION)[name]
    adapter, record, _ = written(build(), spec)
    assert relative(adapter.model(example(name)), float_twin(build(), record)(example(name))) < 2e-6


@pytest.mark.parametrize("name", [*PRODUCTS, *CONVOLUTIONS])
def test_static_products_run_in_integer_kernels_and_give_the_integers_exactly(name: str) -> None:
    build = (PRODUCTS | CONVOLUTIONS)[name]
    x = example(name)
    adapter, record, kernel = written(build(), "int8/channel", "uint8/tensor", x, blocked=False)
    assert kernel.integer, kernel
    scale, zero = choose_scale(x.min().view(1, 1), x.max().view(1, 1), STATIC)
    rounded = ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale
    expected = float_twin(build(), record)(rounded.view(x.shape))
    got = adapter.model(x)
    if name in CONVOLUTIONS:  # the output is rounded to 8 bits, too
        step = (adapter.original(x).max() - adapter.original(x).min()) / 255
        assert float((got - expected).abs().max()) <= 0.51 * float(step) + 1e-5
    else:
        assert relative(got, expected) < 1e-4  # the bias is rounded to multiples of both scales


@pytest.mark.parametrize("name", [*PRODUCTS, *CONVOLUTIONS])
def test_dynamic_products_run_in_integer_kernels_with_the_range_of_the_input(name: str) -> None:
    build = (PRODUCTS | CONVOLUTIONS)[name]
    x = example(name)
    adapter, record, kernel = written(build(), "int8/channel", "uint8/token", blocked=False)
    assert kernel.integer, kernel
    scale, zero = choose_scale(x.min().view(1, 1), x.max().view(1, 1), STATIC)
    rounded = ((x / scale).round() + zero).clamp(0, 255).sub(zero) * scale
    assert relative(adapter.model(x), float_twin(build(), record)(rounded.view(x.shape))) < 1e-5


@pytest.mark.parametrize("name", list(PRODUCTS))
def test_low_bit_products_with_dynamic_inputs_run_in_integer_kernels(name: str) -> None:
    adapter, record, kernel = written(PRODUCTS[name](), "int4/group32/asym", "int8/token")
    assert kernel.integer and kernel.op == "MatMulNBits"
    assert relative(adapter.model(example(name)), float_twin(PRODUCTS[name](), record)(example(name))) < 0.02


@pytest.mark.parametrize("spec", ["int8/channel", "int8/channel/asym", "fp16"])
def test_tables_are_looked_up_as_codes_and_give_the_very_numbers(spec: str) -> None:
    model = graphs.one("Gather", graphs.normal(30, 8), ["n", "t"], rank=3)
    adapter, record, _ = written(model, spec)
    rows = torch.tensor([[0, 5, 29], [3, 3, 1]])
    assert torch.equal(adapter.model(rows), record.dequantize()[rows])


def test_a_bias_that_would_leave_int32_gets_larger_weight_scales() -> None:
    weight = graphs.normal(12, 40)
    weight[3] *= 1e-12
    model = graphs.one("Gemm", weight, ["n", 40], bias=np.full(12, 5, np.float32), transB=1)
    adapter, _, kernel = written(model, "int8/channel", "uint8/tensor", example("gemm"), blocked=False)
    assert kernel.integer
    assert float(adapter.model(example("gemm"))[0, 3]) == pytest.approx(5, rel=1e-5)
    assert any("1 channels have larger scales" in note for note in adapter.notes)
