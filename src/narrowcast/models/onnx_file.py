"""Reading and writing ONNX files: nothing is believed before it is checked, nothing outside the folder is read.

Weights in external data stay on disk, memory-mapped, until they are asked for.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError, EncodeError

from narrowcast.errors import CheckpointError, ModelError
from narrowcast.models.onnx_damage import check_message
from narrowcast.models.onnx_source import is_onnx_module

# Above this, constants are not held in memory together, and go into a file of their own beside a saved model. A message
# can have twice as many bytes, but whoever reads or writes one holds it two or three times.
LARGE = 2**30
_SMALLEST_EXTERNAL = 1024
# Tags of protobuf: ModelProto.graph is field 7, GraphProto.initializer 5, TensorProto.raw_data 9, each with a length.
_GRAPH_FIELD, _INITIALIZER_FIELD, _RAW_DATA_FIELD = b"\x3a", b"\x2a", b"\x4a"


def read_onnx(source: Any) -> ir.Model:
    """An ONNX model, its external data checked but not read.

    Args:
        source: path of a file, an `onnx.ModelProto`, an `onnx_ir.Model` or an `OnnxModule`; the last two are copied.

    Raises:
        ModelError: the file is missing, damaged, no ONNX model, or wants data from outside its folder; a model in
            memory wants data of which it does not say in which folder it is.
    """
    if is_onnx_module(source):
        return source.graph.clone()
    if isinstance(source, ir.Model):
        _check_external(source, "the model", None)
        return source.clone()
    if isinstance(source, onnx.ModelProto):
        made = _from_proto(source, "the model")
        _check_external(made, "the model", None)
        return made
    path = Path(source)
    if not path.is_file():
        raise ModelError(f"{path} is not a file; give the path of an .onnx file")
    try:
        proto = onnx.load_model(path, load_external_data=False)
    except (DecodeError, ValueError, OSError) as error:
        raise ModelError(f"{path} is not an ONNX model or is damaged: {type(error).__name__}: {error}") from None
    model = _from_proto(proto, str(path))
    _check_external(model, str(path), path.absolute().parent)
    return model


def _from_proto(proto: onnx.ModelProto, name: str) -> ir.Model:
    check_message(proto, name)
    try:
        model = ir.from_proto(proto)
        list(model.graph.all_nodes())
    except Exception as error:  # a damaged message can make the reader fail in any way; its words are kept
        raise ModelError(f"{name} is damaged: {type(error).__name__}: {error!s:.500}") from None
    return model


def tensors_of(model: ir.Model) -> Iterator[Any]:
    """Every constant of a model: initializers and the tensors in attributes, in subgraphs and functions too."""
    functions = [function.graph for function in model.functions.values()]
    for graph in [*model.graphs(), *functions, *(inside for outer in functions for inside in outer.subgraphs())]:
        for value in graph.initializers.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            for attribute in node.attributes.values():
                if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                    yield attribute.as_tensor()
                elif not attribute.is_ref() and attribute.type == ir.AttributeType.TENSORS:
                    yield from attribute.as_tensors()


def _check_external(model: ir.Model, name: str, folder: Path | None) -> None:
    """Every tensor outside the file lies in a file of one folder that is long enough; then it is found there.

    Args:
        model: its tensors get the folder.
        name: of the model, for errors.
        folder: where the model's file is; None for a model in memory, whose tensors have to know theirs.
    """
    for tensor in tensors_of(model):
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        if folder is None and not tensor.base_dir:
            raise ModelError(
                f"{name}: the data of tensor {tensor.name!r} is in the file {str(tensor.location)!r}, and a model in "
                "memory does not say in which folder; give the path of the .onnx file, or load it with its data"
            )
        place = Path(tensor.base_dir) if folder is None else folder
        _check_place(tensor, name, place)
        tensor.base_dir = str(place)


def _check_place(tensor: ir.ExternalTensor, name: str, folder: Path) -> None:
    """A tensor's bytes are all there, in a file of the folder that has no other name."""
    what, location = f"{name}: the data of tensor {tensor.name!r}", str(tensor.location)
    if "\0" in location:
        raise ModelError(f"{what} is in {location!r}, which no file can be called")
    target = folder / location
    if Path(location).is_absolute() or not target.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"{what} is in {location!r}, which is outside the model's folder")
    if not target.is_file():
        raise ModelError(f"{what} is in {location!r}, and there is no such file")
    if target.stat().st_nlink > 1:
        raise ModelError(
            f"{what} is in {location!r}, which has {target.stat().st_nlink} hard links: it may be a file of another "
            "folder; copy it, and put the copy in its place"
        )
    if tensor.dtype == ir.DataType.STRING:
        raise ModelError(f"{what} is in {location!r}, and it is text, which has no bytes; store it in the model's file")
    offset = tensor.offset or 0
    length = tensor.length if tensor.length is not None else tensor.nbytes
    if offset < 0 or length < tensor.nbytes or offset + length > target.stat().st_size:
        raise ModelError(
            f"{what} is bytes {offset} to {offset + max(length, tensor.nbytes)} of {location!r}, which has "
            f"{target.stat().st_size}"
        )


def is_large(size: int) -> bool:
    """Whether constants of so many bytes stay out of memory."""
    return size > LARGE


def stored_size(model: ir.Model) -> int:
    """Bytes of all constants but texts."""
    return sum(int(tensor.nbytes) for tensor in tensors_of(model) if tensor.dtype != ir.DataType.STRING)


def write_onnx(model: ir.Model, path: str | Path) -> list[Path]:
    """Write a model, constant by constant; above a gigabyte these are in `<name>.data` beside it.

    Returns:
        The files written.

    Raises:
        CheckpointError: the folder does not exist or the disk refuses; what was there before is still there.
    """
    target = Path(path)
    if not target.absolute().parent.is_dir() or target.is_dir():
        raise CheckpointError(f"{target}: no file can be written there; name one in a folder that exists")
    data = f"{target.name}.data" if is_large(stored_size(model)) else None
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.absolute().parent) as folder:
            beside = Path(folder) / target.name
            if data is None:
                _write_message(model, beside)
            else:
                # the weights of a copy: saving makes the tensors of its argument external for the time
                ir.save(model, beside, external_data=data, size_threshold_bytes=_SMALLEST_EXTERNAL)
            names = ([data] if data is not None else []) + [target.name]
            for name in names:
                (Path(folder) / name).replace(target.absolute().parent / name)
    except (OSError, EncodeError, ValueError) as error:
        raise CheckpointError(f"{target} cannot be written: {error}") from None
    return [target.absolute().parent / name for name in names]


def _write_message(model: ir.Model, path: Path) -> None:
    """One protobuf message, written piece by piece: constants are copied from where they are, and never held together.

    Fields of a message may come in any order: the graph's constants follow what is left of the graph without them.
    """
    rest = model.clone()
    constants = rest.graph.initializers
    taken = {name: v.const_value for name, v in constants.items() if v.const_value is not None and _is_numbers(v)}
    for name in taken:
        del constants[name]
    proto = ir.to_proto(rest)
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    heads = {name: _tensor_head(tensor) for name, tensor in taken.items()}
    sizes = {name: len(heads[name]) + int(tensor.nbytes) for name, tensor in taken.items()}
    whole = len(graph) + sum(1 + len(_varint(size)) + size for size in sizes.values())
    with path.open("wb") as file:
        file.write(proto.SerializeToString() + _GRAPH_FIELD + _varint(whole) + graph)
        for name, tensor in taken.items():
            file.write(_INITIALIZER_FIELD + _varint(sizes[name]) + heads[name])
            file.flush()
            tensor.tofile(file)
            if isinstance(tensor, ir.ExternalTensor):
                tensor.release()


def _is_numbers(value: ir.Value) -> bool:
    tensor: Any = value.const_value
    return bool(tensor.dtype != ir.DataType.STRING)


def _tensor_head(tensor: Any) -> bytes:
    """A TensorProto up to its bytes."""
    proto = onnx.TensorProto(name=tensor.name, data_type=int(tensor.dtype), dims=[int(side) for side in tensor.shape])
    return bytes(proto.SerializeToString()) + _RAW_DATA_FIELD + _varint(int(tensor.nbytes))


def _varint(number: int) -> bytes:
    """A whole number as protobuf writes it: seven bits a byte, the lowest first."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


class _Hash:
    """A file of which only the hash is kept."""

    def __init__(self) -> None:
        self.sum = hashlib.sha256()

    def write(self, content: bytes) -> int:
        """Take in some bytes."""
        self.sum.update(content)
        return len(content)


def hash_of(model: ir.Model) -> str:
    """SHA-256 of a graph and of the numbers of all its constants, read one after another."""
    rest, found = model.clone(), _Hash()
    for name, value in list(rest.graph.initializers.items()):
        tensor: Any = value.const_value
        if tensor is None or not _is_numbers(value):
            continue
        found.write(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        tensor.tofile(found)
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()
        del rest.graph.initializers[name]
    found.write(ir.to_proto(rest).SerializeToString(deterministic=True))
    return found.sum.hexdigest()
