"""Copies of an ONNX graph that show more of it: values as outputs beside its own, or one layer alone."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes import common

from narrowcast.models.onnx_parts import Part, Ranges, all_values


def cut(model: ir.Model, part: Part, shown: str, ranks: Sequence[int]) -> ir.Model:
    """One layer as a model of its own.

    Args:
        model: not changed.
        part: the layer, whose `given` goes in, and what is `beside` it.
        shown: name of the value that comes out: `part.handed`, or a float.
        ranks: axes of the inputs.
    """
    copy = model.clone()
    graph = copy.graph
    values, inputs = _values(graph), []
    for name, rank in zip((part.given, *part.beside), ranks, strict=True):
        kind = values[name].dtype or ir.DataType.FLOAT
        if part.given_codes is not None:
            kind = _code_type(part.given_codes)
        fed = ir.Value(name=f"{name}_fed", type=ir.TensorType(kind), shape=ir.Shape([None] * rank))
        values[name].replace_all_uses_with(fed)
        inputs.append(fed)
    output = _typed(values[shown], part.handed_codes if shown == part.handed else None)
    graph.inputs.clear()
    graph.inputs.extend(inputs)
    graph.outputs.clear()
    graph.outputs.append(output)
    common.RemoveUnusedNodesPass()(copy)
    return copy


def showing(model: ir.Model, names: dict[str, Ranges | None]) -> ir.Model:
    """A copy of a model whose outputs are these values too, besides its own; with ranges where they are codes."""
    copy = model.clone()
    values = _values(copy.graph)
    present = {str(value.name) for value in (*copy.graph.outputs, *copy.graph.inputs)}
    for name, codes in names.items():
        if name not in present:
            copy.graph.outputs.append(_typed(values[name], codes))
    return copy


def _code_type(codes: Ranges) -> ir.DataType:
    return ir.DataType.INT8 if codes.signed else ir.DataType.UINT8


def _typed(value: ir.Value, codes: Ranges | None) -> ir.Value:
    if codes is not None:
        value.type = ir.TensorType(_code_type(codes))
    elif value.type is None:
        value.type = ir.TensorType(ir.DataType.FLOAT)
    return value


def _values(graph: ir.Graph) -> dict[str, ir.Value]:
    return {str(value.name): value for value in all_values(graph)}
