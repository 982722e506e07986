"""ONNX Runtime behind the face of a torch module: tensors in, tensors out; and a look at values inside the graph."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import torch
from torch import Tensor, nn

from narrowcast.errors import DataError, ModelError
from narrowcast.models.onnx_file import is_large, read_onnx, tensors_of, write_onnx

# Where ONNX Runtime looks for the files of weights of a model that it gets as bytes.
_DATA_FOLDER = "session.model_external_initializers_file_folder_path"
_DTYPES = {
    "tensor(float)": torch.float32, "tensor(float16)": torch.float16, "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64, "tensor(int32)": torch.int32, "tensor(bool)": torch.bool,
    "tensor(uint8)": torch.uint8, "tensor(int8)": torch.int8,
}  # fmt: skip


def open_session(model: ir.Model, *, optimized: Path | None = None, frugal: bool = False) -> Any:
    """A session of ONNX Runtime on the CPU with as many threads as torch has.

    Args:
        model: not changed.
        optimized: where ONNX Runtime is to write the graph that it will run; None for nowhere.
        frugal: give memory back after every run, and be a little slower.

    Raises:
        ModelError: ONNX Runtime refuses the model; its words are in the message.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.enable_cpu_mem_arena = options.enable_mem_pattern = not frugal
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    with _loadable(model, options) as source:
        try:
            return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has a class of error for each status
            raise ModelError(f"ONNX Runtime refuses the model: {type(error).__name__}: {error!s:.500}") from None


@contextmanager
def _loadable(model: ir.Model, options: Any) -> Iterator[Any]:
    """The model as bytes, its weights in the file where they are; as a path where that cannot be."""
    tensors = list(tensors_of(model))
    folders = {str(tensor.base_dir) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    inside = sum(int(tensor.nbytes) for tensor in tensors if not isinstance(tensor, ir.ExternalTensor))
    if not is_large(inside) and len(folders) < 2:
        if folders:
            options.add_session_config_entry(_DATA_FOLDER, folders.pop())
        yield ir.to_proto(model).SerializeToString()
        return
    with tempfile.TemporaryDirectory(prefix="narrowcast.") as folder:
        yield str(write_onnx(model, Path(folder) / "model.onnx")[-1])


def open_onnx_module(path: str | Path) -> OnnxModule:
    """The model of an .onnx file, called like a torch module.

    Raises:
        ModelError: it cannot be read.
    """
    return OnnxModule(read_onnx(path), Path(path).name)


class OnnxModule(nn.Module):
    """An ONNX graph that is called like a torch module.

    `forward` takes the graph's inputs, by position or by name, and returns its output, or a tuple of several.

    Args:
        model: the graph; `graph` afterwards.
        name: for messages and reports.
    """

    def __init__(self, model: ir.Model, name: str) -> None:
        super().__init__()
        self.graph = model
        self.name = name
        self._session: Any = None
        fixed = {str(key) for key in model.graph.initializers}
        self.input_names = [str(value.name) for value in model.graph.inputs if str(value.name) not in fixed]
        self.output_names = [str(value.name) for value in model.graph.outputs]
        self.eval()
        # what reads data looks at the signature of `forward` for the names of the inputs
        self.forward = _with_signature(self.answer, self.input_names)  # type: ignore[method-assign]

    @property
    def declared(self) -> Declared:
        """What the graph says of its inputs."""
        return Declared(self.graph)

    @property
    def session(self) -> Any:
        """The session, opened when it is first needed."""
        if self._session is None:
            self._session = open_session(self.graph)
        return self._session

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        """What the graph gives for these inputs: a tensor, or a tuple of several."""
        feeds = feeds_of(self.declared, self.input_names, args, kwargs)
        got = run_session(self.session, None, feeds)
        tensors = tuple(torch.from_numpy(array) if hasattr(array, "dtype") else array for array in got)
        return tensors[0] if len(tensors) == 1 else tensors

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxModule:
        return OnnxModule(self.graph.clone(), self.name)


@dataclass(frozen=True)
class Entry:
    """One input as a session describes it: name, type like "tensor(float)", sides by number or name."""

    name: str
    type: str
    shape: list[Any] | None


class Declared:
    """The inputs of a graph in the words of a session, which would take the memory of the whole model.

    Args:
        model: the graph.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model

    def get_inputs(self) -> list[Entry]:
        """All inputs of the graph."""
        return [_entry(value) for value in self.model.graph.inputs]


def _entry(value: ir.Value) -> Entry:
    kind = "" if value.dtype is None else value.dtype.name.lower()
    shape = None
    if value.shape is not None:
        shape = [side if isinstance(side, int) else side.value for side in value.shape]
    return Entry(str(value.name), f"tensor({kind})", shape)


def _with_signature(call: Callable[..., Any], names: Sequence[str]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    forward.input_names = tuple(names)  # type: ignore[attr-defined]
    return forward


def feeds_of(session: Any, names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a session as arrays of the dtypes that it wants.

    Floats become the float type that is wanted, whole numbers the whole type if they fit; nothing else is changed.

    Raises:
        DataError: an input is missing, unknown, of another kind of numbers, or of a shape that the graph rules out.
    """
    wanted = {entry.name: entry for entry in session.get_inputs() if entry.name in names}
    if len(args) > len(names):
        raise DataError(f"{len(args)} inputs were given by position, and the model has {len(names)}: {_listed(wanted)}")
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    if missing := [name for name in wanted if name not in given]:
        raise DataError(
            f"the model has the input {missing[0]!r}, and the data does not: it has {', '.join(given) or 'none'}; the "
            f"model's inputs are {_listed(wanted)}"
        )
    if unknown := [name for name in given if name not in wanted]:
        raise DataError(
            f"the model has no input {unknown[0]!r}; its inputs are {_listed(wanted)}: rename it, or leave it out"
        )
    return {name: _feed(wanted[name], value) for name, value in given.items()}


def _listed(wanted: Mapping[str, Any]) -> str:
    return ", ".join(f"{name!r} {entry.type} {entry.shape}" for name, entry in wanted.items())


def _feed(entry: Any, value: Any) -> Any:
    """One input as an array.

    Raises:
        DataError: it does not fit what the graph declares.
    """
    tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    dtype = _DTYPES.get(entry.type, tensor.dtype)
    wants = f"input {entry.name!r} wants {entry.type} {entry.shape}, and the data has"
    if tensor.is_floating_point() != dtype.is_floating_point:
        remedy = "convert it as in training: pixels are divided by 255, minus mean, by standard deviation"
        if tensor.is_floating_point():
            remedy = f"give whole numbers, {str(dtype).removeprefix('torch.')}"
        raise DataError(f"{wants} {str(tensor.dtype).removeprefix('torch.')}; {remedy}")
    declared = [side if isinstance(side, int) else None for side in entry.shape or tensor.shape]
    got = list(tensor.shape)
    if len(got) != len(declared) or any(d not in (None, g) for d, g in zip(declared, got, strict=True)):
        raise DataError(f"{wants} the shape {got}; give {len(declared)} axes of these sizes{_turned(declared, got)}")
    cast = tensor.detach().to("cpu", dtype)
    if not dtype.is_floating_point and not torch.equal(cast.to(tensor.dtype), tensor.detach().cpu()):
        raise DataError(f"{wants} numbers from {int(tensor.min())} to {int(tensor.max())}, which do not fit")
    return cast.contiguous().numpy()


def _turned(declared: Sequence[int | None], got: Sequence[int]) -> str:
    """A guess at images whose channels are on the other side."""
    if len(got) != 4 or len(declared) != 4:
        return ""
    fits = all(d in (None, g) for d, g in zip(declared, [got[0], *got[2:], got[1]], strict=True))
    back = all(d in (None, g) for d, g in zip(declared, [got[0], got[3], *got[1:3]], strict=True))
    layout = 'NHWC: Preprocessing(layout="NHWC")' if fits else "NCHW" if back else ""
    return f"; it looks as if the model takes images as {layout}" if layout else ""


def run_session(session: Any, outputs: Sequence[str] | None, feeds: Mapping[str, Any]) -> list[Any]:
    """One run.

    Raises:
        DataError: the inputs do not fit the model; the message has ONNX Runtime's words.
    """
    try:
        return list(session.run(outputs, dict(feeds)))
    except Exception as error:  # as above: many classes without a common base
        shapes = {name: (str(array.dtype), array.shape) for name, array in feeds.items()}
        raise DataError(f"the inputs {shapes} do not run through the model: {error!s:.500}") from None
