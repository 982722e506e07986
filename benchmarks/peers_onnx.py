"""Whole networks as ONNX files and in ONNX Runtime: float32, dynamic int8 (linear layers), static int8 (CNNs)."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kit import Batch, KitModel, kit_model
from benchmarks.peers import UnavailableError

# Given a batch, the call that answers it; converting the batch is not part of the call.
Prepare = Callable[[Batch], Callable[[], object]]
CALIBRATION_IMAGES = 256


def float32_file(kit: KitModel, shape: tuple[int, ...], folder: Path) -> Path:
    """The network exported for inputs of exactly this shape; one file per shape, which suits every runtime best."""
    path = folder / f"{kit.name}-{'x'.join(map(str, shape))}.onnx"
    if not path.exists():
        _export(kit, kit.example(shape), path)
    return path


def _export(kit: KitModel, batch: Batch, path: Path) -> None:
    try:
        import onnxscript  # noqa: F401  torch.onnx.export needs it
    except ImportError as missing:
        raise UnavailableError(f"{missing.name} is not installed") from missing
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.ERROR)
    arguments: dict[str, Any] = {"kwargs": batch} if isinstance(batch, dict) else {"args": (batch,)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                copy.deepcopy(kit.build()), f=str(path), dynamo=True, verbose=False, external_data=False, **arguments
            )
    except Exception as error:  # whatever the exporter raises, the result says so
        raise UnavailableError(f"torch.onnx.export failed: {type(error).__name__}: {str(error)[:200]}") from error


def dynamic_int8_file(kit: KitModel, shape: tuple[int, ...], folder: Path) -> Path:
    """onnxruntime.quantization.quantize_dynamic: int8 weights per channel, uint8 activations per tensor."""
    if kit.kind == "cnn":
        raise UnavailableError("dynamic quantization is for linear layers; its ConvInteger is slower than float32")
    path = folder / f"{kit.name}-{'x'.join(map(str, shape))}-dynamic.onnx"
    if not path.exists():
        from onnxruntime.quantization import QuantType, quantize_dynamic

        prepared = _preprocessed(float32_file(kit, shape, folder))
        _quietly(lambda: quantize_dynamic(prepared, path, per_channel=True, weight_type=QuantType.QInt8))
    return path


def static_int8_file(kit: KitModel, shape: tuple[int, ...], folder: Path) -> Path:
    """onnxruntime.quantization.quantize_static: QDQ, int8 weights per channel, uint8 activations, calibrated."""
    if kit.kind != "cnn":
        raise UnavailableError("static quantization is measured on the convolutional networks only")
    path = folder / f"{kit.name}-{'x'.join(map(str, shape))}-static.onnx"
    if not path.exists():
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        prepared = _preprocessed(float32_file(kit, shape, folder))
        _quietly(
            lambda: quantize_static(
                prepared,
                path,
                _reader(prepared, kit, shape[0]),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
        )
    return path


def _preprocessed(path: Path) -> Path:
    """The same graph with shapes inferred and BatchNorm folded, as onnxruntime.quantization asks for."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_suffix(".prepared.onnx")
    if not prepared.exists():
        _quietly(lambda: quant_pre_process(path, prepared, skip_symbolic_shape=True))
    return prepared


def _quietly(work: Callable[[], object]) -> None:
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        work()
    finally:
        root.setLevel(level)


@lru_cache(maxsize=2)
def calibration_images(name: str) -> Tensor:
    """At most 256 calibration images of a convolutional kit model."""
    return torch.cat(list(kit_model(name).calibration()))[:CALIBRATION_IMAGES]


def calibration_batches(kit: KitModel, size: int) -> Iterator[Tensor]:
    """The calibration images in full batches of `size`."""
    images = calibration_images(kit.name)
    yield from images[: len(images) // size * size].split(size)


def _reader(path: Path, kit: KitModel, size: int) -> Any:
    import onnx
    from onnxruntime.quantization import CalibrationDataReader

    name = onnx.load(path).graph.input[0].name

    class Reader(CalibrationDataReader):
        """Feeds those batches one by one."""

        def __init__(self) -> None:
            self.batches = calibration_batches(kit, size)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch.numpy()}

    return Reader()


def session(path: Path) -> Any:
    """An ONNX Runtime session with as many threads as torch has now."""
    try:
        import onnxruntime
    except ImportError as missing:
        raise UnavailableError(f"{missing.name} is not installed") from missing
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # its threads would otherwise spin after each run and take cores from the next contender
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def prepare(path: Path) -> Prepare:
    """Runs an ONNX file in ONNX Runtime."""
    loaded = session(path)
    names = [node.name for node in loaded.get_inputs()]

    def prepared(batch: Batch) -> Callable[[], object]:
        feeds = {name: batch[name].numpy() for name in names} if isinstance(batch, dict) else {names[0]: batch.numpy()}
        return lambda: loaded.run(None, feeds)[0]

    return prepared
