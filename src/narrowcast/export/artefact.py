"""Anything that narrowcast opens as one ONNX graph on disk, ready to be sent to another runtime."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from narrowcast.errors import DataError, FormatError, ModelError
from narrowcast.export.onnx_save import FORMS
from narrowcast.models import is_onnx, require_onnx
from narrowcast.models.onnx_file import read_onnx, write_onnx
from narrowcast.models.onnx_prepare import fold_shapes
from narrowcast.nn import QuantizedModule

# Of products that find the range of their input at run time.
RANGES = ("token", "input")
# What stores integers, or makes them of floats.
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulNBits", "MatMulInteger",
              "ConvInteger", "QLinearConv", "QLinearMatMul", "QGemm", "GatherBlockQuantized")  # fmt: skip


@dataclass(frozen=True)
class Artefact:
    """An ONNX file that was written.

    Args:
        path: the file.
        quantized: whether anything in it is in integers.
        layers: of a PyTorch model, what became of every quantized module; see `ExportedLayer`.
        notes: where it differs from what it was made of, and why.
    """

    path: Path
    quantized: bool
    layers: list[Any] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write_artefact(
    source: Any, path: Path, example: Any = None, *, form: str = "qdq", ranges: str = "token"
) -> Artefact:
    """Write a model as an ONNX file without what only its maker needed: stack traces, scopes.

    Args:
        source: path of an .onnx file, an `OnnxModule`, a quantized or float PyTorch module, or what `nc.quantize`
            returned.
        path: of the file to write.
        example: calibration data; PyTorch models need it, see `nc.export.onnx`.
        form: "qdq", or "qoperator": one operator for every integer step in place of Q and DQ nodes around a float one.
        ranges: of PyTorch models, where ranges found at run time are one per "token" or one per "input".

    Raises:
        ModelError: the source is none of these, or cannot be written as ONNX.
        DataError: a PyTorch model came without example.
    """
    require_onnx()
    if form not in FORMS:
        raise FormatError(f"form {form!r} is not known; ONNX files have {' or '.join(FORMS)}")
    if ranges not in RANGES:
        raise FormatError(f"ranges {ranges!r} are not known; there are {' and '.join(RANGES)}")
    source = getattr(source, "model", source) if hasattr(source, "report") else source
    layers: list[Any] = []
    notes: list[str] = []
    found = source
    if not is_onnx(source):
        if not isinstance(source, nn.Module):
            raise ModelError(f"expected an ONNX model or a PyTorch module, got {type(source).__name__}")
        if example is None:
            raise DataError("a PyTorch model is exported by running it: give calibration data (--data, example=)")
        layers, notes = _export(source, path, example, token_ranges=ranges == "token")
        found = path
    model = read_onnx(found)
    if form == "qoperator":
        notes += importlib.import_module("narrowcast.export.onnx_qoperator").to_qoperator(model)
    slim(model)
    write_onnx(model, path)
    return Artefact(path, is_quantized(model), layers, notes)


def _export(module: nn.Module, path: Path, example: Any, *, token_ranges: bool) -> tuple[list[Any], list[str]]:
    """Write a PyTorch module; returns what became of its quantized modules, and notes."""
    exporter = importlib.import_module("narrowcast.export.onnx_export")
    if any(isinstance(part, QuantizedModule) for part in module.modules()):
        exported = exporter.onnx(module, path, example, token_ranges=token_ranges)
        return list(exported.layers), list(exported.notes)
    exporter.float_onnx(module, path, example)
    return [], []


def slim(model: ir.Model) -> None:
    """Remove what does not change the function, in place: shapes asked of constants, notes of the exporter.

    Inferred shapes stay: ONNX Runtime fuses by them.
    """
    fold_shapes(model)
    importlib.import_module("onnx_ir.passes.common").RemoveUnusedNodesPass()(model)
    graphs = [*model.graphs(), *(function.graph for function in model.functions.values())]
    for graph in graphs:
        graph.doc_string = None
        graph.metadata_props.clear()
        for node in graph:
            node.doc_string = None
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()


def is_quantized(model: ir.Model) -> bool:
    """Whether a node of the model works with integers that stand for floats."""
    return any(node.op_type in _QUANTIZED for node in model.graph.all_nodes())


def products(model: ir.Model) -> Iterable[Any]:
    """Every product of the graph that ONNX Runtime makes of a model; see `NodeVerdict`."""
    verdict = importlib.import_module("narrowcast.models.onnx_verdict")
    found: Iterable[Any] = verdict.node_verdicts(verdict.optimized_graph(model))
    return found
