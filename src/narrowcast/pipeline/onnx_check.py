"""What is held against the float ONNX file: its conversion to another opset, and what ONNX Runtime can open at all."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import torch

from narrowcast.core import sqnr_db
from narrowcast.errors import ModelError
from narrowcast.models.onnx_large import hollow
from narrowcast.models.onnx_model import OnnxModel
from narrowcast.models.onnx_verdict import optimized_graph
from narrowcast.pipeline.judge import first_tensor

# Float32 rounding of a network in another order of operations; below it, the function is another one.
_SAME_FUNCTION_DB = 60.0


def check_conversion(adapter: OnnxModel, probe: Any) -> None:
    """Hold a model that was converted to another opset against the original, on the first batch; tells it in the notes.

    Args:
        adapter: nothing is quantized yet.
        probe: the first batch; None without data.

    Raises:
        ModelError: the answers differ by more than float rounding.
    """
    if adapter.converted is None:
        return
    said = "not checked on data, because there is none"
    if probe is not None:
        with torch.no_grad():
            expected, got = first_tensor(probe.run(adapter.original)), first_tensor(probe.run(adapter.model))
        same = None
        if expected is not None and got is not None:
            same = sqnr_db(expected, got) if expected.shape == got.shape else float("-inf")
        if same is not None and same < _SAME_FUNCTION_DB:
            had, has = adapter.converted
            raise ModelError(
                f"{adapter.name}: onnx's conversion of opset {had} to {has} changed its answer on the first batch ("
                f"SQNR {same:.1f} dB, expected at least {_SAME_FUNCTION_DB:.0f}); export the model with a newer opset"
            )
        said = "its answer is no float tensor to compare" if same is None else (
            f"on the first batch its answer is that of the original to {same:.0f} dB"
        )  # fmt: skip
    adapter.notes[0] = f"{adapter.notes[0]}; {said}"


def graph_that_runs(adapter: OnnxModel) -> tuple[onnx.GraphProto, list[str]]:
    """The graph that ONNX Runtime makes of what was quantized, and notes.

    A file that ONNX Runtime could not open before has operators of somebody else's; its own graph stands in.

    Raises:
        ModelError: ONNX Runtime opens the original, and not what was made of it.
    """
    try:
        return optimized_graph(adapter.graph), []
    except ModelError as error:
        if _opens(adapter.original.graph):
            raise
        with hollow(adapter.graph) as copy:
            graph = ir.to_proto(copy).graph
        return graph, [f"what ONNX Runtime runs was not checked, as it does not open the float model either: {error}"]


def _opens(model: ir.Model) -> bool:
    try:
        optimized_graph(model)
    except ModelError:
        return False
    return True
