"""The forms of quantized products that ONNX Runtime turns into integer kernels, and those that only store.

Each function rewrites one use of one weight. What each becomes was measured on ONNX Runtime 1.31.1 (docs/onnx.md):

    form        written as                                                        becomes
    static      Q, DQ(x); DQ(W), DQ(int32 bias) -> Conv -> Q, DQ                  QLinearConv
                the same without output Q, two axes                               QGemm
                the same, more axes, float bias added behind                      MatMulIntegerToFloat
    dynamic     DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul             DynamicQuantizeMatMul
                DynamicQuantizeLinear -> ConvInteger -> Cast -> Mul               ConvInteger
    blocks      MatMulNBits (com.microsoft), level 1: float, 4: int8 inputs       MatMulNBits
    stored      DQ(W) [-> Reshape] -> node                                        float, dequantized at every run
    rows        Gather of codes, scales, zero points -> Sub -> Mul                rows of codes
    cast        Cast(W) -> node                                                   float, cast once when loading
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from narrowcast.core import PerGroup, QuantizedTensor
from narrowcast.models.onnx_layers import KINDS, RECURRENT, Use, reads_input_first
from narrowcast.models.onnx_scribe import MICROSOFT, Scribe, replace_node

Array = Any
# MatMulNBits takes blocks of powers of two in this range; one scale for more columns is written several times.
SMALLEST_BLOCK, LARGEST_BLOCK = 16, 256
# A bias of QLinearConv and QGemm is int32; sums must not leave it either.
LARGEST_BIAS = 2.0**30


def codes_of(record: QuantizedTensor) -> tuple[Array, Array, Array]:
    """Codes [out, columns] int32, scales and zero points [out, blocks] as arrays; zero points 0 where symmetric."""
    codes = record.codes.to("cpu").numpy().astype(np.int32)
    assert record.scale is not None
    scale = np.broadcast_to(record.scale.numpy(), (codes.shape[0], record.scale.shape[1])).astype(np.float32)
    zero = np.zeros_like(scale, dtype=np.int32)
    if record.zero_point is not None:
        zero = np.broadcast_to(record.zero_point.numpy(), scale.shape).astype(np.int32)
    return codes, scale, zero


def with_room_for_bias(record: QuantizedTensor, bias: Array | None, input_scale: float) -> tuple[Array, Array, int]:
    """Codes and scales [out] of a symmetric weight, with larger scales where the bias would leave int32.

    Returns:
        codes: [out, columns] int32.
        scale: [out] float32.
        changed: how many rows have other codes than the record.
    """
    codes, scale, _ = codes_of(record)
    scale = scale[:, 0].copy()
    if bias is None:
        return codes, scale, 0
    needed = (np.abs(bias.astype(np.float64)) / (input_scale * LARGEST_BIAS)).astype(np.float32)
    rows = needed > scale
    if rows.any():
        codes[rows] = np.rint(codes[rows] * (scale[rows] / needed[rows])[:, None]).astype(np.int32)
        scale[rows] = needed[rows]
    return codes, scale, int(rows.sum())


def static(
    scribe: Scribe, use: Use, record: QuantizedTensor, bias: Array | None, input_range: tuple[float, int]
) -> tuple[str, int]:
    """Weight and bias as integers; Q and DQ of the input are the placement's work.

    Args:
        scribe: writes.
        use: a Conv, Gemm or MatMul.
        record: int8 per channel or per tensor, symmetric.
        bias: [out] float32 of the node, or of the Add behind it; None without one.
        input_range: scale and zero point of the input.

    Returns:
        The name of the codes, and how many rows were given larger scales so that their bias fits.
    """
    node, stem = use.node, str(use.weight.name)
    codes, scale, changed = with_room_for_bias(record, bias, input_range[0])
    kind = KINDS[use.op]
    stored = scribe.constant(kind.restore(codes, use).astype(np.int8), f"{stem}_quantized")
    parts = _scales(scribe, scale, np.zeros(scale.shape, np.int8), stem)
    # without a zero point ONNX Runtime leaves a Gemm in float
    float_weight = scribe.before(node, "DequantizeLinear", [stored, *parts], f"{stem}_DequantizeLinear",
                                 attributes={"axis": kind.axis(use)})  # fmt: skip
    node.replace_input_with(use.index, float_weight)
    if bias is not None:
        _static_bias(scribe, use, bias, np.float32(input_range[0]) * scale)
    return str(stored.name), changed


def _scales(scribe: Scribe, scale: Array, zero: Array, stem: str) -> list[ir.Value]:
    return [scribe.constant(scale, f"{stem}_scale"), scribe.constant(zero, f"{stem}_zero_point")]


def set_bias(scribe: Scribe, use: Use, bias: Array) -> None:
    """Give a node, or the Add behind it, another float bias; a product without an Add gets one."""
    node, index = use.adder
    if node is None:
        return _add_bias(scribe, use, bias)
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, scribe.constant(bias.astype(np.float32), f"{use.weight.name}_bias"))
    return None


def _add_bias(scribe: Scribe, use: Use, bias: Array) -> None:
    product = use.node.outputs[0]
    readers, name = list(product.uses()), product.name
    assert use.node.graph is not None
    parts = [product, scribe.constant(bias.astype(np.float32), f"{use.weight.name}_bias")]
    added = scribe.after(product, use.node.graph, "Add", parts, f"{use.node.name}_bias_Add")
    added.shape, added.type = product.shape, product.type
    for reader, index in readers:
        reader.replace_input_with(index, added)
    if product.is_graph_output():
        outputs = use.node.graph.outputs
        outputs[outputs.index(product)] = added
        product.name, added.name = f"{name}_without_bias", name


def _static_bias(scribe: Scribe, use: Use, bias: Array, scale: Array) -> None:
    """The bias as int32 in the scale of the sums; behind a product of more than two axes it stays float.

    ONNX Runtime joins a MatMul of two axes with the Add behind it to a Gemm, which has no integer kernel with a float
    bias; of more axes it does not.
    """
    if use.op == "MatMul" and use.rank is not None and use.rank > 2:
        return set_bias(scribe, use, bias)
    (node, index), stem = use.adder, str(use.weight.name)
    codes = scribe.constant(np.rint(bias.astype(np.float64) / scale).astype(np.int32), f"{stem}_bias_quantized")
    parts = _scales(scribe, scale, np.zeros(scale.shape, np.int32), f"{stem}_bias")
    value = scribe.before(node, "DequantizeLinear", [codes, *parts], f"{stem}_bias_DequantizeLinear",
                          attributes={"axis": 0})  # fmt: skip
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    node.replace_input_with(index, value)
    return None


def dynamic(scribe: Scribe, use: Use, record: QuantizedTensor, bias: Array | None, shared: dict[str, Any]) -> str:
    """Integer product with a range of the whole input found at run time.

    Args:
        scribe: writes.
        use: a Conv, Gemm or MatMul.
        record: int8 per channel or per tensor, symmetric.
        bias: [out] float32 of the node, or of the Add behind it; None without one.
        shared: outputs of DynamicQuantizeLinear by what they quantize; added to.

    Returns:
        The name of the codes.
    """
    node, stem, convolution = use.node, str(use.weight.name), use.op == "Conv"
    codes, scale, _ = codes_of(record)
    # unsigned: with int8 weights ConvInteger takes ONNX Runtime's portable loop, which is 5 to 10 times slower
    layout = codes.reshape([int(side) for side in use.weight.const_value.shape]) + 128 if convolution else codes.T
    stored = scribe.constant(layout.astype(np.uint8 if convolution else np.int8), f"{stem}_quantized")
    key = f"{id(node.graph)}/{use.input.name}"
    if key not in shared:
        shared[key] = scribe.before(node, "DynamicQuantizeLinear", [use.input], f"{use.input.name}_dynamic", outputs=3)
    x, x_scale, x_zero = shared[key]
    spread = (1, -1, *[1] * (len(use.weight.const_value.shape) - 2)) if convolution else (-1,)
    scales = scribe.constant(scale[:, 0].reshape(spread), f"{stem}_scale")
    attributes = {k: v.value for k, v in node.attributes.items()} if convolution else {}
    zero = scribe.constant(np.uint8(128) if convolution else np.zeros(scale.shape[0], np.int8), f"{stem}_zero")
    op = "ConvInteger" if convolution else "MatMulInteger"
    sums = scribe.before(node, op, [x, stored, x_zero, zero], f"{stem}_{op}", attributes=attributes)
    as_float = scribe.before(node, "Cast", [sums], f"{stem}_Cast", attributes={"to": 1})
    both = scribe.before(node, "Mul", [x_scale, scales], f"{stem}_scales_Mul")
    result = scribe.before(node, "Mul", [as_float, both], f"{stem}_Mul")
    if bias is not None and use.op != "MatMul":
        result = scribe.before(node, "Add", [result, scribe.constant(bias.reshape(spread), f"{stem}_bias")],
                               f"{stem}_Add")  # fmt: skip
    replace_node(node, result)
    return str(stored.name)


def block_size(record: QuantizedTensor) -> int | None:
    """The block of MatMulNBits that holds a record without changing a number; None where there is none."""
    if not isinstance(record.spec.granularity, PerGroup):
        return LARGEST_BLOCK if record.shape[1] > 128 else max(SMALLEST_BLOCK, 1 << (record.shape[1] - 1).bit_length())
    size = min(record.spec.granularity.size, LARGEST_BLOCK)
    while size >= SMALLEST_BLOCK and (size & (size - 1) or record.spec.granularity.size % size):
        size -= 1
    return size if size >= SMALLEST_BLOCK else None


def blocks(scribe: Scribe, use: Use, record: QuantizedTensor, bias: Array | None, *, level: int) -> str:
    """MatMulNBits: codes packed per block of columns, the record's very numbers.

    Args:
        scribe: writes.
        use: a Gemm or MatMul.
        record: 2, 4 or 8 bits, per tensor, channel or group.
        bias: [out] float32 of the node, or of the Add behind it; None without one.
        level: 1 keeps inputs in float32, 4 rounds them to int8 per block.

    Returns:
        The name of the codes.
    """
    codes, scale, zero = codes_of(record)
    bits, size = record.spec.format.bits, block_size(record)
    assert size is not None
    out, columns = codes.shape
    count = -(-columns // size)
    group = -(-columns // scale.shape[1]) if not isinstance(record.spec.granularity, PerGroup) else (
        record.spec.granularity.size
    )  # fmt: skip
    which = np.minimum(np.arange(count) * size // group, scale.shape[1] - 1)
    scale, zero = scale[:, which], zero[:, which]
    offset = 1 << (bits - 1) if record.spec.format.low < 0 else 0
    filled = np.zeros((out, count * size), np.uint8)
    filled[:, :columns] = codes + offset
    stem, node = str(use.weight.name), use.node
    inputs = [
        use.input,
        scribe.constant(_packed(filled.reshape(out, count, size), bits), f"{stem}_Q{bits}"),
        scribe.constant(scale, f"{stem}_scales"),
        scribe.constant(_packed((zero + offset).astype(np.uint8), bits), f"{stem}_zero_points"),
    ]
    attributes = {"K": columns, "N": out, "bits": bits, "block_size": size, "accuracy_level": level}
    result = scribe.before(node, "MatMulNBits", inputs, f"{stem}_MatMulNBits", domain=MICROSOFT, attributes=attributes)
    if bias is not None and use.op != "MatMul":
        result = scribe.before(node, "Add", [result, scribe.constant(bias, f"{stem}_bias")], f"{stem}_Add")
    replace_node(node, result)
    return str(inputs[1].name)


def _packed(codes: Array, bits: int) -> Array:
    """Codes [..., n] below 2^bits as bytes, the first in the lowest bits; rows are filled up with 0."""
    per = 8 // bits
    short = -codes.shape[-1] % per
    codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], short), codes.dtype)], -1).astype(np.uint8)
    packed = np.zeros((*codes.shape[:-1], codes.shape[-1] // per), np.uint8)
    for place in range(per):
        packed |= codes[..., place::per] << (bits * place)
    return packed


def stored(scribe: Scribe, use: Use, record: QuantizedTensor) -> str:
    """The weight as codes that are dequantized at every run: small on disk, float in the product."""
    codes, scale, zero = codes_of(record)
    kind, node, stem = KINDS[use.op], use.node, str(use.weight.name)
    signed = record.spec.format.low < 0
    four, eight = (ml_dtypes.int4, np.int8) if signed else (ml_dtypes.uint4, np.uint8)
    storage = four if record.spec.format.bits <= 4 else eight
    granularity = record.spec.granularity
    matrix = isinstance(granularity, PerGroup) or use.op in RECURRENT  # stored as such, and arranged behind
    attributes = {"axis": 0 if matrix else kind.axis(use)}
    if isinstance(granularity, PerGroup):
        attributes = {"axis": 1, "block_size": min(granularity.size, codes.shape[1])}
    else:
        scale, zero = scale[:, 0], zero[:, 0]
    value = scribe.constant((codes if matrix else kind.restore(codes, use)).astype(storage), f"{stem}_quantized")
    parts = _scales(scribe, scale, zero.astype(storage), stem)
    result = scribe.before(node, "DequantizeLinear", [value, *parts], f"{stem}_DequantizeLinear",
                           attributes=attributes)  # fmt: skip
    if matrix:
        result = _from_matrix(scribe, use, result)
    node.replace_input_with(use.index, result)
    return str(value.name)


def _from_matrix(scribe: Scribe, use: Use, matrix: ir.Value) -> ir.Value:
    """The float matrix [out, columns] in the layout that the node reads."""
    node, stem = use.node, str(use.weight.name)
    shape = [int(side) for side in use.weight.const_value.shape]
    if use.op in ("Gemm", "MatMul", "Gather"):
        # the node reads the constant itself or its transpose; a Gemm with transB the constant [out, in]
        reads_matrix = use.op == "Gather" or not reads_input_first(use)
        return matrix if reads_matrix else scribe.before(node, "Transpose", [matrix], f"{stem}_Transpose",
                                                         attributes={"perm": [1, 0]})  # fmt: skip
    turned = use.op == "ConvTranspose"
    sides = [shape[1], shape[0], *shape[2:]] if turned else shape
    result = scribe.before(node, "Reshape", [matrix, scribe.constant(np.array(sides, np.int64), f"{stem}_shape")],
                           f"{stem}_Reshape")  # fmt: skip
    if turned:
        result = scribe.before(node, "Transpose", [result], f"{stem}_Transpose",
                               attributes={"perm": [1, 0, *range(2, len(shape))]})  # fmt: skip
    return result


def rows(scribe: Scribe, use: Use, record: QuantizedTensor) -> str:
    """A table of int8 codes of which only the rows asked for are dequantized; exact, in standard operators."""
    codes, scale, zero = codes_of(record)
    node, stem = use.node, str(use.weight.name)
    signed = record.spec.format.low < 0
    table = scribe.constant(codes.astype(np.int8 if signed else np.uint8), f"{stem}_quantized")

    def looked_up(values: ir.Value, name: str) -> Any:
        return scribe.before(node, "Gather", [values, use.input], f"{stem}_{name}_Gather", attributes={"axis": 0})

    found = scribe.before(node, "Cast", [looked_up(table, "codes")], f"{stem}_Cast", attributes={"to": 1})
    if not record.spec.symmetric:
        zeros = scribe.constant(zero[:, :1].astype(np.float32), f"{stem}_zero_point")
        found = scribe.before(node, "Sub", [found, looked_up(zeros, "zero_point")], f"{stem}_Sub")
    scales = scribe.constant(scale[:, :1], f"{stem}_scale")
    replace_node(node, scribe.before(node, "Mul", [found, looked_up(scales, "scale")], f"{stem}_Mul"))
    return str(table.name)


def cast(scribe: Scribe, use: Use, record: QuantizedTensor) -> str:
    """The weight in a float format, cast to float32 in front of the node; ONNX Runtime does so once, when loading."""
    kind, stem = KINDS[use.op], str(use.weight.name)
    name = record.spec.format.name
    storage = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}[name]
    array = kind.restore(record.dequantize().numpy(), use).astype(storage)
    value = scribe.constant(array, f"{stem}_{name}")
    result = scribe.before(use.node, "Cast", [value], f"{stem}_Cast", attributes={"to": 1})
    use.node.replace_input_with(use.index, result)
    return str(value.name)
