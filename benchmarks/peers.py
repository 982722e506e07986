"""What narrowcast is timed against: torch eager in float32 and bfloat16, torch.ao's dynamic int8, ONNX Runtime."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.kit import Batch, KitModel, run

Call = Callable[[], object]
T = TypeVar("T")


class UnavailableError(RuntimeError):
    """A contender that cannot run this model here; the message is the reason that the result shows."""


def attempt(name: str, work: Callable[[], T], skipped: dict[str, str]) -> T | None:
    """The result of `work`; None when it fails, and then its reason is in `skipped` under this name.

    A contender that cannot do something here is a result that the page shows, not a crash.
    """
    try:
        return work()
    except Exception as error:
        text = str(error) if isinstance(error, UnavailableError) else f"{type(error).__name__}: {error}"
        skipped[name] = text[:300]
        return None


def converted(batch: Batch, convert: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with its floating-point tensors converted; token ids stay as they are."""
    if isinstance(batch, dict):
        return {name: convert(tensor) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}
    return convert(batch) if batch.is_floating_point() else batch


def in_channels_last(tensor: Tensor) -> Tensor:
    """The same image batch with channels lying innermost."""
    return tensor.contiguous(memory_format=torch.channels_last)


def eager(model: nn.Module, batch: Batch) -> Call:
    """A call of the model in eager mode, without autograd."""

    def call() -> object:
        with torch.inference_mode():
            return run(model, batch)

    return call


def torch_float32(kit: KitModel, batch: Batch) -> Call:
    """Plain eager PyTorch."""
    return eager(kit.build(), batch)


def torch_float32_channels_last(kit: KitModel, batch: Batch) -> Call:
    """Plain eager PyTorch in the memory format that suits CPU convolutions better."""
    return eager(kit.build().to(memory_format=torch.channels_last), converted(batch, in_channels_last))


def torch_bfloat16(kit: KitModel, batch: Batch) -> Call:
    """Model and input cast to bfloat16."""
    return eager(kit.build().to(torch.bfloat16), converted(batch, lambda tensor: tensor.to(torch.bfloat16)))


def torch_ao_model(kit: KitModel) -> nn.Module:
    """torch.ao.quantization.quantize_dynamic with its defaults: linear layers and LSTMs in int8."""
    if kit.kind == "cnn":
        raise UnavailableError("torch.ao's dynamic quantization has no convolutions")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces its own removal
        return torch.ao.quantization.quantize_dynamic(kit.build(), {nn.Linear, nn.LSTM}, dtype=torch.qint8)


def torch_ao_dynamic(kit: KitModel, batch: Batch) -> Call:
    """The model with torch.ao's dynamic int8."""
    return eager(torch_ao_model(kit), batch)


def onnxruntime_float32(kit: KitModel, batch: Batch) -> Call:
    """ONNX Runtime on the graph that torch.onnx.export gives for this very shape."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch.onnx.export needs it
    except ImportError as missing:
        raise UnavailableError(f"{missing.name} is not installed") from missing
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its threads would otherwise spin after each run and take cores from the next contender
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    model = kit.build()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_onnx(model, batch, path)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = feeds(session, batch)
    check_same(eager(model, batch)(), session.run(None, inputs)[0])
    return lambda: session.run(None, inputs)


def check_same(expected: Any, answer: Any) -> None:
    """Refuses an exported graph that does not compute what the model computes."""
    tensor = expected if isinstance(expected, Tensor) else expected.last_hidden_state
    error = (torch.from_numpy(answer) - tensor).abs().max().item()
    if not error <= 1e-3 * max(1.0, tensor.abs().max().item()):
        raise UnavailableError(f"the exported graph answers differently, by up to {error:.3g}")


def export_onnx(model: nn.Module, batch: Batch, path: Path) -> None:
    """Writes the model with the shapes of this batch."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    arguments: dict[str, Any] = {"kwargs": batch} if isinstance(batch, dict) else {"args": (batch,)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(copy.deepcopy(model), f=str(path), dynamo=True, verbose=False, **arguments)
    except Exception as error:  # whatever the exporter raises, the result says so
        raise UnavailableError(f"torch.onnx.export failed: {type(error).__name__}: {str(error)[:200]}") from error


def feeds(session: Any, batch: Batch) -> dict[str, Any]:
    """The batch as the session's inputs."""
    if isinstance(batch, dict):
        return {node.name: batch[node.name].numpy() for node in session.get_inputs()}
    return {session.get_inputs()[0].name: batch.numpy()}


FLOAT32 = "torch float32"
CHANNELS_LAST = "torch float32 channels_last"
BFLOAT16 = "torch bfloat16"
TORCH_AO = "torch.ao dynamic int8"
ONNXRUNTIME = "ONNX Runtime float32"

PEERS: dict[str, Callable[[KitModel, Batch], Call]] = {
    FLOAT32: torch_float32,
    CHANNELS_LAST: torch_float32_channels_last,
    BFLOAT16: torch_bfloat16,
    TORCH_AO: torch_ao_dynamic,
    ONNXRUNTIME: onnxruntime_float32,
}
