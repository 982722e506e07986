"""The weights and operators of an ONNX file, read from its protobuf without any package and without loading it.

Only the few fields that a listing needs are followed: ModelProto.graph (7), GraphProto.node (1) and initializer (5),
NodeProto.output (2), op_type (4), attribute (5) and domain (7), AttributeProto.t (5), TensorProto.dims (1),
data_type (2), name (8), data_location (14). Every length is checked against the file before it is believed.

Source:
    onnx/onnx.proto (field numbers); protobuf encoding documentation (wire types).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from mmap import ACCESS_READ, mmap
from pathlib import Path

from narrowcast.cli.headers import TensorEntry
from narrowcast.errors import CheckpointError

# TensorProto.DataType: number -> (name, bits)
_TYPES = {
    1: ("float32", 32), 2: ("uint8", 8), 3: ("int8", 8), 4: ("uint16", 16), 5: ("int16", 16), 6: ("int32", 32),
    7: ("int64", 64), 8: ("string", 0), 9: ("bool", 8), 10: ("float16", 16), 11: ("float64", 64), 12: ("uint32", 32),
    13: ("uint64", 64), 14: ("complex64", 64), 15: ("complex128", 128), 16: ("bfloat16", 16), 17: ("float8_e4m3fn", 8),
    18: ("float8_e4m3fnuz", 8), 19: ("float8_e5m2", 8), 20: ("float8_e5m2fnuz", 8), 21: ("uint4", 4), 22: ("int4", 4),
    23: ("float4_e2m1", 4), 24: ("float8_e8m0", 8), 25: ("uint2", 2), 26: ("int2", 2),
}  # fmt: skip
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
Field = tuple[int, int, int, int]  # number, wire type, start, end; for a varint its value stands in `start`


def onnx_entries(path: Path) -> tuple[list[TensorEntry], dict[str, int]]:
    """Initializers of an ONNX file, and how often each operator occurs in its main graph.

    Raises:
        CheckpointError: the file is missing, empty, truncated, or not an ONNX model.
    """
    if not path.is_file() or path.stat().st_size == 0:
        raise CheckpointError(f"{path} does not exist or is empty")
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
        graphs = [field for field in _fields(data, 0, len(data), path) if field[0] == 7 and field[1] == _BYTES]
        if len(graphs) != 1:
            raise CheckpointError(f"{path} is not an ONNX model: it has {len(graphs)} graphs, expected one")
        entries: list[TensorEntry] = []
        operators: Counter[str] = Counter()
        for number, wire, start, end in _fields(data, graphs[0][2], graphs[0][3], path):
            if wire == _BYTES and number == 5:
                entries.append(_tensor(data, start, end, path))
            elif wire == _BYTES and number == 1:
                name, constants = _node(data, start, end, path)
                operators[name] += 1
                entries += constants
    if not operators:
        raise CheckpointError(f"{path} is not an ONNX model: its graph has no operators")
    return entries, dict(operators.most_common())


def _fields(data: mmap, start: int, end: int, path: Path) -> Iterator[Field]:
    """The fields of one message, none of which reaches beyond `end`."""
    position = start
    while position < end:
        key, position = _varint(data, position, end, path)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, position = _varint(data, position, end, path)
            yield number, wire, value, 0
            continue
        if wire == _BYTES:
            length, position = _varint(data, position, end, path)
        else:
            length = {_FIXED64: 8, _FIXED32: 4}.get(wire, -1)
        if number == 0 or length < 0 or position + length > end:
            raise CheckpointError(f"{path} is not an ONNX model or is truncated: broken field at byte {position}")
        yield number, wire, position, position + length
        position += length


def _varint(data: mmap, position: int, end: int, path: Path) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise CheckpointError(f"{path} is not an ONNX model or is truncated: broken number at byte {position}")


def _text(data: mmap, start: int, end: int) -> str:
    return data[start:end].decode("utf-8", errors="replace")


def _node(data: mmap, start: int, end: int, path: Path) -> tuple[str, list[TensorEntry]]:
    """The operator of a node with its domain, and the tensors in its attributes under the name of its output."""
    name, domain, output, tensors = "", "", "", []
    for number, wire, first, last in _fields(data, start, end, path):
        if wire != _BYTES:
            continue
        if number == 2:
            output = output or _text(data, first, last)
        elif number == 4:
            name = _text(data, first, last)
        elif number == 7:
            domain = _text(data, first, last)
        elif number == 5:
            inside = _fields(data, first, last, path)
            tensors += [(low, high) for field, kind, low, high in inside if field == 5 and kind == _BYTES]
    entries = [replace(_tensor(data, low, high, path), name=output) for low, high in tensors]
    return f"{domain}.{name}" if domain and domain != "ai.onnx" else name, entries


def _tensor(data: mmap, start: int, end: int, path: Path) -> TensorEntry:
    name, kind, dims, external = "", 0, [], False
    for number, wire, first, last in _fields(data, start, end, path):
        if number == 1 and wire == _VARINT:
            dims.append(first)
        elif number == 1 and wire == _BYTES:
            dims += _packed(data, first, last, path)
        elif number == 2 and wire == _VARINT:
            kind = first
        elif number == 8 and wire == _BYTES:
            name = _text(data, first, last)
        elif number == 14 and wire == _VARINT:
            external = first == 1
    if kind not in _TYPES or any(side >= 2**63 for side in dims):
        raise CheckpointError(f"{path}: tensor {name!r:.200} has unknown type {kind} or impossible sides {dims[:8]}")
    dtype, bits = _TYPES[kind]
    size = -(-prod(dims) * bits // 8)
    if size > end - start and not external:
        raise CheckpointError(f"{path}: tensor {name!r:.200} would have {size} bytes, but only {end - start} are there")
    return TensorEntry(name, dtype, tuple(dims), size, "external" if external else "")


def _packed(data: mmap, start: int, end: int, path: Path) -> list[int]:
    values, position = [], start
    while position < end:
        value, position = _varint(data, position, end, path)
        values.append(value)
    return values
