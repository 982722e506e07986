"""Integer products that saturate on CPUs without VNNI, found from the weights, and their repair.

There ONNX Runtime multiplies uint8 inputs with int8 weights by vpmaddubsw, which sums the products of two neighbours
along K in 16 bits, saturating, before anything is widened: 2 x 255 x 127 does not fit. Neighbours are columns 2k and
2k + 1 of a matrix; of a convolution columns in the order kernel position, channel, since its patches are gathered with
channels last; each group is a product of its own. A zero point is taken off afterwards, so inputs are codes from 0 to
255, which a calibrated range fills. A pair saturates where weights of one sign sum to more than 128.

Not at risk: depthwise convolutions and ConvInteger, which widen before they multiply; uint8 weights, which another
kernel multiplies in 16 bits; CPUs with VNNI, which sum in 32 bits. Measured: tests/onnx_files/test_portable.py has the
emulation, docs/onnx.md how it was compared with ONNX Runtime.

Source:
    onnxruntime/core/mlas/lib/qgemm_kernel_avx2.cpp, amd64/QgemmU8S8KernelAvx2.asm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import log10
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from narrowcast.core import PerTensor, QuantizedTensor
from narrowcast.models.onnx_layers import RECURRENT, Use, attribute
from narrowcast.models.onnx_patterns import codes_of
from narrowcast.models.onnx_scribe import Scribe

Array = Any
# 255 * 128 is the largest multiple of the largest input code that fits into 16 bits.
LARGEST_PAIR = 128
# Rows are given larger scales, at most those of 7-bit weights, unless the weight loses more than this: then it is
# stored as uint8, which loses nothing and takes 1.2 times as long without VNNI, up to 2.3 times with it (measured).
ALLOWED_LOSS_DB = 1.5
_STEPS = 9
# The operators that were written for a weight, and the index of its zero point among their inputs.
_ZERO_POINTS = {"DequantizeLinear": {0: 2}, "MatMulInteger": {1: 3}, "DynamicQuantizeLSTM": {1: 9, 2: 11}}


def order_of(op: str, shape: tuple[int, ...], groups: int) -> Array | None:
    """The columns of a weight matrix in the order in which a kernel multiplies them; None where nothing saturates.

    Args:
        op: the ONNX operator.
        shape: of the weight as the node has it; of a convolution [out, in / groups, *kernel].
        groups: of a convolution.
    """
    if op != "Conv":
        return np.arange(shape[-1]) if op in ("Gemm", "MatMul", *RECURRENT) else None
    if shape[1] == 1 and groups == shape[0]:
        return None
    return np.arange(int(np.prod(shape[1:]))).reshape(shape[1], -1).T.reshape(-1)


def worst_pairs(codes: Array) -> Array:
    """The largest sum of two weights of one sign that one instruction adds up, per row.

    Args:
        codes: [rows, columns] int8 codes in the order of `order_of`.

    Returns:
        [rows] int32; a row saturates where it is above `LARGEST_PAIR`.
    """
    signed = np.asarray(codes, np.int32)
    pairs = _pairs(signed)
    sums = np.maximum(np.maximum(pairs, 0).sum(-1), np.maximum(-pairs, 0).sum(-1))
    return sums.max(-1, initial=0)


def narrowed(codes: Array) -> tuple[Array, Array]:
    """Rows that cannot saturate, near the given ones.

    Of several scales between the row's own and that of 7 bits the one is taken whose codes, with what is left of
    too large pairs cut off evenly, are nearest.

    Args:
        codes: [rows, columns] int8 codes in the order of `order_of`.

    Returns:
        codes: [rows, columns] int32.
        factor: [rows] float32 that the rows' scales are to be multiplied with; 1 where nothing changes.
    """
    best = np.array(codes, np.int32)
    factor = np.ones(len(best), np.float32)
    rows = np.flatnonzero(worst_pairs(best) > LARGEST_PAIR)
    least = np.full(len(rows), np.inf)
    given = best[rows].astype(np.float64)
    widest = worst_pairs(best[rows]) / LARGEST_PAIR
    for share in np.linspace(0.0, 1.0, _STEPS):
        scale = np.float32(1.0 + share * (widest - 1.0))
        tried = _cut(np.rint(given / scale[:, None]).astype(np.int32))
        error = ((tried * scale[:, None].astype(np.float64) - given) ** 2).sum(1)
        better = error < least
        least[better] = error[better]
        best[rows[better]], factor[rows[better]] = tried[better], scale[better]
    return best, factor


def _cut(codes: Array) -> Array:
    """Pairs whose sum is too large, made smaller by the same amount on both sides as far as that goes."""
    width = codes.shape[1]
    pairs = _pairs(codes)
    same = (pairs[..., 0] >= 0) == (pairs[..., 1] >= 0)
    excess = np.where(same, np.maximum(np.abs(pairs).sum(-1) - LARGEST_PAIR, 0), 0)
    first = np.minimum((excess + 1) // 2, np.abs(pairs[..., 0]))
    second = np.minimum(excess - first, np.abs(pairs[..., 1]))
    off = np.stack([first, second], -1)
    return (pairs - np.sign(pairs) * off).reshape(len(codes), width + width % 2)[:, :width]


def _pairs(codes: Array) -> Array:
    """[rows, columns] as [rows, pairs, 2], filled up with 0."""
    rows, columns = codes.shape
    return np.pad(codes, ((0, 0), (0, columns % 2))).reshape(rows, -(-columns // 2), 2)


@dataclass(frozen=True)
class Risk:
    """How many rows of a weight can saturate.

    Args:
        rows: with a pair that is too large.
        of: rows there are.
        worst: the largest sum of products of one pair, as a multiple of what 16 bits hold.
    """

    rows: int
    of: int
    worst: float

    def __str__(self) -> str:
        return f"{self.rows} of {self.of} channels reach {self.worst:.2f} times what 16 bits hold"


def risk_of(codes: Array, order: Array | None) -> Risk | None:
    """The risk of a weight [rows, columns] in int8; None where there is none."""
    if order is None:
        return None
    worst = worst_pairs(np.asarray(codes)[:, order])
    guilty = int((worst > LARGEST_PAIR).sum())
    return Risk(guilty, len(worst), float(worst.max()) * 255 / 32767) if guilty else None


@dataclass
class Portable:
    """What is known of layers at risk while a model is quantized.

    Args:
        repair: whether they are repaired.
        exact: whether every code has to stay, so that repair is uint8 in place of narrower codes.
        risks: by the path of the weight's use.
        repaired: what was done, by path.
        unsigned: paths whose weights are to be stored as uint8.
    """

    repair: bool = False
    exact: bool = False
    risks: dict[str, Risk] = field(default_factory=dict)
    repaired: dict[str, str] = field(default_factory=dict)
    unsigned: list[str] = field(default_factory=list)

    def look(self, use: Use, record: QuantizedTensor) -> QuantizedTensor:
        """The record to write: another one where it is at risk and repaired by larger scales."""
        order = None if use.op == "Gather" else order_of(
            use.op, _matrix_like(use, record), int(attribute(use.node, "group", 1))
        )  # fmt: skip
        codes, scale, _ = codes_of(record)
        risk = risk_of(codes, order)
        if risk is None or order is None:
            return record
        self.risks[use.path] = risk
        if not self.repair:
            return record
        if self.exact or isinstance(record.spec.granularity, PerTensor):
            return self._unsigned(use, record)
        changed = codes.copy()
        changed[:, order], factor = narrowed(codes[:, order])
        wide = scale[:, :1] * factor[:, None]
        loss = _loss_db(record, codes * scale[:, :1], changed * wide)
        if loss > ALLOWED_LOSS_DB:
            return self._unsigned(use, record)
        self.repaired[use.path] = f"narrower codes in these channels, weight SQNR {-loss:+.2f} dB"
        new_scale = torch.from_numpy(np.ascontiguousarray(wide, np.float32))
        return replace(record, codes=torch.from_numpy(changed).to(record.codes.dtype), scale=new_scale)

    def _unsigned(self, use: Use, record: QuantizedTensor) -> QuantizedTensor:
        self.unsigned.append(use.path)
        self.repaired[use.path] = "stored as uint8, which changes no number and is slower"
        return record

    def store_unsigned(self, scribe: Scribe, codes: Mapping[str, str]) -> None:
        """Turn the weights that are to be uint8, by name of their codes, into that; every product stays the same."""
        for path in self.unsigned:
            _make_unsigned(scribe.model.graph.initializers[codes[path]])

    def notes(self) -> list[str]:
        """What to say of it in the report."""
        if not self.risks:
            return []
        if self.repair:
            return [f"{path}: {risk} on CPUs without VNNI: {self.repaired[path]}" for path, risk in self.risks.items()]
        listed = "; ".join(f"{path}: {risk}" for path, risk in list(self.risks.items())[:3])
        more = f"; and {len(self.risks) - 3} more" if len(self.risks) > 3 else ""
        return [f"on CPUs without VNNI sums of two products can saturate ({listed}{more}); portable = true repairs it"]


def _matrix_like(use: Use, record: QuantizedTensor) -> tuple[int, ...]:
    stored = tuple(int(side) for side in use.weight.const_value.shape)
    return stored if use.op == "Conv" else record.shape


def _loss_db(record: QuantizedTensor, before: Array, after: Array) -> float:
    """How much of the weight's SQNR the change costs, its rounding error before being that of steps: scale^2 / 12."""
    assert record.scale is not None
    noise = float(np.square(record.scale.numpy(), dtype=np.float64).mean()) / 12.0
    added = float(np.square(after.astype(np.float64) - before).mean())
    return 10.0 * log10(1.0 + added / max(noise, 1e-300))


def _make_unsigned(value: ir.Value) -> None:
    ((node, index),) = list(value.uses())
    zero = node.inputs[_ZERO_POINTS[node.op_type][index]]
    assert zero is not None
    for constant, name in ((value, value.name), (zero, zero.name)):
        assert constant.const_value is not None
        array = (constant.const_value.numpy().astype(np.int16) + 128).astype(np.uint8)
        constant.const_value = ir.tensor(array, name=name)
        constant.type = ir.TensorType(ir.DataType.UINT8)


# Where an operator of ONNX Runtime has its int8 weights: index among the inputs, and whether they lie [in, out].
_WEIGHTS = {
    "QLinearConv": ((3, False),), "QGemm": ((3, True),), "QLinearMatMul": ((3, True),),
    "MatMulIntegerToFloat": ((1, True),), "DynamicQuantizeMatMul": ((1, True),), "MatMulInteger": ((1, True),),
    "DynamicQuantizeLSTM": ((1, True), (2, True)),
}  # fmt: skip


def risk_in_graph(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> Risk | None:
    """The risk of a node of the graph that ONNX Runtime runs; None where there is none, or its weights are no constant.

    Args:
        node: of any operator.
        constants: initializers by name.
    """
    numbers = {a.name: a.i for a in node.attribute}
    found = []
    for index, input_first in _WEIGHTS.get(node.op_type, ()):
        tensor = constants.get(node.input[index])
        if tensor is None or tensor.data_type != onnx.TensorProto.INT8 or tensor.external_data:
            continue
        array = onnx.numpy_helper.to_array(tensor)
        if node.op_type == "QLinearConv":
            order = order_of("Conv", array.shape, numbers.get("group", 1))
            array = array.reshape(array.shape[0], -1)
        else:
            array = np.swapaxes(array, -1, -2) if input_first and not numbers.get("transB", 0) else array
            array = array.reshape(-1, array.shape[-1])
            order = np.arange(array.shape[-1])
        if risk := risk_of(array, order):
            found.append(risk)
    return max(found, key=lambda risk: risk.worst, default=None)
