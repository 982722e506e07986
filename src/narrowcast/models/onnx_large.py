"""Models that do not fit into memory: new constants go to a file at once, and graphs are looked at without weights."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import onnx
import onnx_ir as ir

from narrowcast.models.onnx_file import is_large, stored_size, tensors_of

# What is smaller stays in memory: shapes, scales and other numbers that optimizers and converters look at.
SMALLEST_SPOOLED = 2**16
_KEPT_FOR_CONVERTER = 1024
T = TypeVar("T")


class Spool:
    """A temporary file of constants, which is gone when no tensor in it is left."""

    def __init__(self) -> None:
        folder = tempfile.mkdtemp(prefix="narrowcast.")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.path = Path(folder) / "constants"
        self.path.touch()

    def put(self, tensor: ir.Tensor) -> ir.ExternalTensor:
        """The same constant, in the file and not in memory."""
        with self.path.open("ab") as file:
            offset = file.tell()
            tensor.tofile(file)
        return _Spooled(self, tensor, offset)


class _Spooled(ir.ExternalTensor):
    """A constant in a spool, which it keeps alive."""

    def __init__(self, spool: Spool, tensor: ir.Tensor, offset: int) -> None:
        shape = ir.Shape(tensor.shape)
        super().__init__(
            spool.path.name, offset, tensor.nbytes, tensor.dtype, shape=shape, name=str(tensor.name),
            base_dir=str(spool.path.parent),
        )  # fmt: skip
        self.spool = spool


def spool_for(model: ir.Model) -> Spool | None:
    """Where new constants of a model go; None where there is room for them in memory."""
    return Spool() if is_large(stored_size(model)) else None


def released(tensor: Any) -> None:
    """Give back the memory that a constant in a file was mapped to; it can be read again."""
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()


@contextmanager
def hollow(model: ir.Model) -> Iterator[ir.Model]:
    """A model itself, or of one that is large a copy whose large constants are zeros: it opens in little memory.

    All of them are the same stretch of one file that has no blocks on disk. Graph optimizers choose kernels by types
    and shapes and by small constants, which are left.
    """
    if not is_large(stored_size(model)):
        yield model
        return
    copy = model.clone()
    large = [v for v in copy.graph.initializers.values() if v.const_value is not None and _spoolable(v.const_value)]
    with tempfile.TemporaryDirectory(prefix="narrowcast.") as folder:
        with (Path(folder) / "zeros").open("wb") as file:
            file.truncate(max((value.const_value.nbytes for value in large), default=0))
        for value in large:
            old = value.const_value
            value.const_value = ir.ExternalTensor(
                "zeros", 0, old.nbytes, old.dtype, shape=ir.Shape(old.shape), name=str(value.name), base_dir=folder
            )
        yield copy


def _spoolable(tensor: Any) -> bool:
    return bool(tensor.dtype != ir.DataType.STRING and tensor.nbytes >= SMALLEST_SPOOLED)


def _is_big(tensor: Any) -> bool:
    return tensor is not None and bool(tensor.dtype != ir.DataType.STRING and tensor.nbytes > _KEPT_FOR_CONVERTER)


def without_weights(model: ir.Model, work: Callable[[onnx.ModelProto], onnx.ModelProto]) -> ir.Model:
    """What `work` makes of a model whose constants beyond a few numbers are inputs to it; they come back afterwards.

    onnx's own functions take messages, which have at most two gigabytes, and copy them. A message does not say in which
    folder the data of its tensors is; those that stayed in it (small ones, and those in subgraphs) are told again.

    Args:
        model: not changed.
        work: keeps the names of values.
    """
    copy = model.clone()
    graph = copy.graph
    were_inputs = {str(value.name) for value in graph.inputs}
    tensors = {}
    for name, value in list(graph.initializers.items()):
        if not _is_big(value.const_value):
            continue
        tensors[name] = value.const_value
        value.shape = ir.Shape(value.const_value.shape)
        value.type = ir.TensorType(value.const_value.dtype)
        del graph.initializers[name]
        value.const_value = None
        if name not in were_inputs:
            graph.inputs.append(value)
    folders = {_stretch(tensor): tensor.base_dir for tensor in _external(copy)}
    done = ir.from_proto(work(ir.to_proto(copy)))
    for tensor in _external(done):
        tensor.base_dir = folders[_stretch(tensor)]
    for value in list(done.graph.inputs):
        if value.name in tensors:
            value.const_value = tensors[str(value.name)]
            done.graph.register_initializer(value)
            if value.name not in were_inputs:
                done.graph.inputs.remove(value)
    return done


def _external(model: ir.Model) -> Iterator[ir.ExternalTensor]:
    return (tensor for tensor in tensors_of(model) if isinstance(tensor, ir.ExternalTensor))


def _stretch(tensor: ir.ExternalTensor) -> tuple[str, int, int]:
    """Which bytes of which file a tensor is."""
    return str(tensor.location), tensor.offset or 0, int(tensor.nbytes)
