"""The quantized linear layers of ONNX Runtime: DynamicQuantizeMatMul, QLinearMatMul's successor and MatMulNBits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.linear_problem import INT4, INT4_WEIGHTS, INT8, Contender, Prepare, Problem, need
from benchmarks.linear_torch import int8_rows
from benchmarks.timing import Call

MICROSOFT = "com.microsoft"


def onnx_model(nodes: list[Any], constants: dict[str, Any], rows: int, columns: int) -> bytes:
    """A graph from X [M, K] float32 to Y [M, N] float32."""
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "linear",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, ["M", columns])],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, ["M", rows])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MICROSOFT, 1)]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model


def session_of(model: bytes) -> Any:
    """A session with torch's number of threads, which do not spin between runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def bound(model: bytes, rows: int) -> Prepare:
    """Calls with input and output bound to memory, so that no array is made or copied per call."""
    session = session_of(model)

    def prepare(x: Tensor) -> Call:
        output = torch.empty(len(x), rows)
        binding = session.io_binding()
        for name, tensor, bind in (("X", x, binding.bind_input), ("Y", output, binding.bind_output)):
            bind(name, "cpu", 0, "float32", list(tensor.shape), tensor.data_ptr())

        def call() -> Tensor:
            session.run_with_iobinding(binding)
            return output

        call.keeps = x  # type: ignore[attr-defined]  # the binding knows only its address
        return call

    return prepare


def dynamic_copies(problem: Problem) -> Callable[[], Prepare]:
    """DynamicQuantizeMatMul: int8 weights per column, uint8 input with one range per call."""
    need("onnx")
    need("onnxruntime")
    from onnx import helper

    codes, scale = int8_rows(problem.weight)
    node = helper.make_node("DynamicQuantizeMatMul", ["X", "B", "scale", "zero", "bias"], ["Y"], domain=MICROSOFT)
    constants = {
        "B": codes.t().contiguous().numpy(),
        "scale": scale.numpy(),
        "zero": torch.zeros(len(scale), dtype=torch.int8).numpy(),
        "bias": problem.bias.numpy(),
    }
    model = onnx_model([node], constants, *problem.weight.shape)
    return lambda: bound(model, len(problem.weight))


def nbits_copies(group: int, level: int) -> Callable[[Problem], Callable[[], Prepare]]:
    """MatMulNBits: symmetric int4 groups; level 0 multiplies in float32, level 4 in int8."""

    def copies(problem: Problem) -> Callable[[], Prepare]:
        need("onnx")
        need("onnxruntime")
        from onnx import helper

        rows, columns = problem.weight.shape
        groups = problem.weight.reshape(rows, columns // group, group)
        scale = groups.abs().amax(2) / 7.0
        codes = (groups / scale.unsqueeze(2)).round().clamp(-8, 7).add(8).to(torch.uint8)
        packed = codes[:, :, 0::2] | (codes[:, :, 1::2] << 4)
        node = helper.make_node(
            "MatMulNBits",
            ["X", "B", "scales", "", "", "bias"],
            ["Y"],
            domain=MICROSOFT,
            K=columns,
            N=rows,
            bits=4,
            block_size=group,
            accuracy_level=level,
        )
        constants = {
            "B": packed.contiguous().numpy(),
            "scales": scale.reshape(-1).numpy(),
            "bias": problem.bias.numpy(),
        }
        model = onnx_model([node], constants, rows, columns)
        return lambda: bound(model, rows)

    return copies


CONTENDERS = (
    Contender("ONNX Runtime DynamicQuantizeMatMul", INT8, "int8", 8, dynamic_copies),
    Contender("ONNX Runtime MatMulNBits g32 level 4", INT4, "int8", 5, nbits_copies(32, 4)),
    Contender("ONNX Runtime MatMulNBits g128 level 4", INT4, "int8", 4.25, nbits_copies(128, 4)),
    Contender("ONNX Runtime MatMulNBits g32 level 0", INT4_WEIGHTS, "float32", 5, nbits_copies(32, 0)),
)
