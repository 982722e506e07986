"""Static products written so that ONNX Runtime computes the integers that narrowcast's modules compute.

Three forms, each with the weight's codes as they are stored:

    codes in, codes out    the convolution's scales and bias are divided per output channel by what the reader's range
                           of that channel is to the largest one; so one scale and zero point serve all: QLinearConv
    codes in, floats out   ConvInteger, Cast, Mul, Add: what is added, averaged or returned is not rounded in between.
                           Gemm and MatMul give floats anyway
    floats in              QuantizeLinear with a range per channel; DequantizeLinear with the one scale that products
                           know. Together no identity, but the product's weights have the difference in them
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from narrowcast.core import QuantizedTensor, QuantSpec, spread_channels
from narrowcast.models import onnx_patterns as patterns
from narrowcast.models.onnx_handover import Codes, Handover, hand_over, number
from narrowcast.models.onnx_layers import Use, attribute
from narrowcast.models.onnx_parts import RANGES, Ranges
from narrowcast.models.onnx_scribe import Scribe, replace_node

Array = Any


@dataclass(frozen=True)
class Product:
    """A Conv, Gemm or MatMul that is to multiply codes.

    Args:
        use: the node with its weight.
        record: the weight: int8 per channel or tensor, symmetric; it has taken in what `codes` have per channel.
        codes: of the input.
    """

    use: Use
    record: QuantizedTensor
    codes: Codes


@dataclass
class _Writer:
    scribe: Scribe
    graph: ir.Graph
    handover: Handover
    made: dict[tuple[Any, ...], tuple[ir.Value, ir.Value]] = field(default_factory=dict)
    stored: dict[str, str] = field(default_factory=dict)
    raised: dict[str, int] = field(default_factory=dict)
    ranges: dict[str, Any] = field(default_factory=dict)


def write_products(
    scribe: Scribe, graph: ir.Graph, products: Mapping[str, Product]
) -> tuple[dict[str, str], dict[str, int]]:
    """Write static products, and the Q and DQ nodes between them.

    Args:
        scribe: writes; what codes mean that the graph does not tell goes into the model's metadata.
        graph: the main graph, which has all of the nodes.
        products: by the node's name.

    Returns:
        The name of the codes of every product's weight, and how many of its rows have larger scales, and so other
        codes, because their bias would not fit into int32.
    """
    _fold_casts(scribe, graph)
    handover = hand_over(graph, {id(product.use.node): product.codes for product in products.values()})
    writer = _Writer(scribe, graph, handover)
    for node in handover.dropped:
        node.outputs[0].replace_all_uses_with(node.inputs[0])
    for node, wanted in handover.moved:
        for index, codes in enumerate(wanted):
            node.replace_input_with(index, _coded(writer, node.inputs[index], codes)[1])
    for path, product in products.items():
        _write(writer, path, product)
    scribe.model.metadata_props[RANGES] = json.dumps(writer.ranges)
    return writer.stored, writer.raised


def _fold_casts(scribe: Scribe, graph: ir.Graph) -> None:
    """Numbers cast to the type of a value, as the ends of a Clip are exported: as if they read that value."""
    for node in [node for node in graph if node.op_type == "CastLike"]:
        found, like = number(node.inputs[0]), node.inputs[1]
        if found is not None and (like.type is None or like.dtype == ir.DataType.FLOAT):
            replace_node(node, scribe.constant(np.float32(found), f"{node.outputs[0].name}_number"))


def _coded(writer: _Writer, value: ir.Value, codes: Codes, pads: tuple[int, ...] = ()) -> tuple[ir.Value, ir.Value]:
    """A value in codes, and what products read them as; made once for all readers that want the same.

    Args:
        writer: writes.
        value: as float, or given by an operator that writes these codes.
        codes: wanted.
        pads: zeros around the image, as Conv has them; () for none.
    """
    key = (str(value.name), pads, *codes.key)
    if key in writer.made:
        return writer.made[key]
    scribe, name = writer.scribe, str(value.name)
    common = (
        scribe.constant(np.float32(codes.common), f"{name}_scale"),
        scribe.constant(np.uint8(codes.common_zero), f"{name}_zero_point"),
    )
    ranges, attributes = common, {}
    if writer.handover.coded(value) is None and not codes.is_one_range:
        attributes = {"axis": codes.axis}
        ranges = (
            scribe.constant(codes.scale, f"{name}_channel_scale"),
            scribe.constant(codes.zero.astype(np.uint8), f"{name}_channel_zero_point"),
        )
    shape, kind = value.shape, value.type
    if pads:
        value, shape = _padded(writer, value, pads), None
    coded = scribe.after(value, writer.graph, "QuantizeLinear", [value, *ranges], f"{name}_QuantizeLinear",
                         attributes=attributes)  # fmt: skip
    decoded = scribe.after(coded, writer.graph, "DequantizeLinear", [coded, *common], f"{name}_DequantizeLinear")
    decoded.shape, decoded.type = shape, kind
    if not attributes and not codes.is_one_range:  # in the graph these codes seem to have one range
        meaning = Ranges(codes.scale, codes.zero, codes.axis)
        writer.ranges[str(coded.name)] = meaning.to_json()
    writer.made[key] = coded, decoded
    return coded, decoded


def _padded(writer: _Writer, value: ir.Value, pads: tuple[int, ...]) -> ir.Value:
    """The value with zeros around it, of which every channel has its own code."""
    half = len(pads) // 2
    around = np.array([0, 0, *pads[:half], 0, 0, *pads[half:]], np.int64)
    sides = writer.scribe.constant(around, f"{value.name}_pads")
    return writer.scribe.after(value, writer.graph, "Pad", [value, sides], f"{value.name}_Pad")


def _write(writer: _Writer, path: str, product: Product) -> None:
    """Rewrite one product."""
    use, codes, node = product.use, product.codes, product.use.node
    pads: tuple[int, ...] = ()
    if id(node) in writer.handover.padded:
        pads = tuple(attribute(node, "pads", []))
        del node.attributes["pads"]
    coded, decoded = _coded(writer, node.inputs[0], codes, pads)
    bias = _bias(product)
    output = writer.handover.coded(node.outputs[0])
    if use.op == "Conv" and output is None:
        writer.stored[path] = _sums(writer, product, coded, bias)
        return
    record = product.record
    if use.op == "Conv" and output is not None:
        record, bias = _divided(record, bias, output)
    elif use.op == "MatMul" and bias is not None and use.bias is None:
        _add_behind(writer, use, bias)
    node.replace_input_with(0, decoded)
    given = (codes.common, codes.common_zero)
    writer.stored[path], raised = patterns.static(writer.scribe, use, record, bias, given)
    if raised:
        writer.raised[path] = raised


def _bias(product: Product) -> Array | None:
    """The bias [out] float64 with what the zero points of the channels add up to beside the common one."""
    record, codes, had = product.record, product.codes, product.use.bias_array
    bias = None if had is None else had.astype(np.float64)
    if codes.has_one_zero:
        return bias
    integers, scale, _ = patterns.codes_of(record)
    groups = attribute(product.use.node, "group", 1) if product.use.op == "Conv" else 1
    apart = spread_channels(torch.from_numpy(codes.zero - codes.common_zero), record.shape, groups).numpy()
    excess = (integers * apart).sum(1) * (scale[:, 0].astype(np.float64) * codes.common)
    return -excess if bias is None else bias - excess


def _divided(record: QuantizedTensor, bias: Array | None, output: Codes) -> tuple[QuantizedTensor, Array | None]:
    """Weight and bias of a convolution whose output channels are each written in units of their own.

    The codes stay, and so does the bias in steps of the sums: both are divided by the same number.
    """
    ratio = output.scale.astype(np.float64) / output.common
    _, scale, _ = patterns.codes_of(record)
    divided = torch.from_numpy((scale[:, :1] / ratio[:, None]).astype(np.float32))
    record = replace(record, scale=divided, spec=QuantSpec.parse("int8/channel"))
    offset = output.common * (output.zero - output.common_zero)
    if bias is not None:
        return record, bias / ratio + offset
    return record, np.broadcast_to(offset, scale.shape[:1]) if offset.any() else None


def _sums(writer: _Writer, product: Product, coded: ir.Value, bias: Array | None) -> str:
    """A convolution that gives floats: sums of codes, times the scales, plus the bias, as narrowcast's kernels do."""
    use, node, scribe, stem = product.use, product.use.node, writer.scribe, str(product.use.weight.name)
    integers, scale, _ = patterns.codes_of(product.record)
    sides = [int(side) for side in use.weight.const_value.shape]
    # unsigned: with int8 weights ONNX Runtime takes its portable loop, which is 5 to 10 times slower
    stored = scribe.constant((integers.reshape(sides) + 128).astype(np.uint8), f"{stem}_quantized")
    zeros = (
        scribe.constant(np.uint8(product.codes.common_zero), f"{stem}_input_zero_point"),
        scribe.constant(np.uint8(128), f"{stem}_zero_point"),
    )
    spread = (1, -1, *[1] * (len(sides) - 2))
    attributes = {name: entry.value for name, entry in node.attributes.items()}
    sums = scribe.before(node, "ConvInteger", [coded, stored, *zeros], f"{stem}_ConvInteger", attributes=attributes)
    result = scribe.before(node, "Cast", [sums], f"{stem}_Cast", attributes={"to": 1})
    factor = scale[:, 0] * np.float32(product.codes.common)
    result = scribe.before(node, "Mul", [result, scribe.constant(factor.reshape(spread), f"{stem}_scale")],
                           f"{stem}_Mul")  # fmt: skip
    if bias is not None:
        added = scribe.constant(bias.astype(np.float32).reshape(spread), f"{stem}_bias")
        result = scribe.before(node, "Add", [result, added], f"{stem}_Add")
    replace_node(node, result)
    return str(stored.name)


def _add_behind(writer: _Writer, use: Use, bias: Array) -> None:
    """An Add behind a product that has none, for its bias to stand in."""
    node, scribe = use.node, writer.scribe
    output, name = node.outputs[0], str(node.outputs[0].name)
    readers = list(output.uses())
    constant = scribe.constant(bias.astype(np.float32), f"{name}_bias")
    added = scribe.after(output, writer.graph, "Add", [output, constant], f"{name}_Add")
    added.shape, added.type = output.shape, output.type
    for reader, index in readers:
        reader.replace_input_with(index, added)
    if output.is_graph_output():
        output.name = scribe.free(f"{name}_before")
        for position, value in enumerate(writer.graph.outputs):
            if value is output:
                writer.graph.outputs[position] = added
        added.name = name
