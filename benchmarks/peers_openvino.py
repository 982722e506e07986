"""Whole networks in OpenVINO: float32, and int8 as nncf quantizes it or as read from ONNX Runtime's static file."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers_onnx
from benchmarks.kit import Batch, KitModel
from benchmarks.peers import UnavailableError

FLOAT32 = "f32"


def read(path: Path) -> Any:
    """OpenVINO's own form of an ONNX file."""
    try:
        import openvino
    except ImportError as missing:
        raise UnavailableError(f"{missing.name} is not installed") from missing
    return openvino.Core().read_model(path)


def int8_file(kit: KitModel, shape: tuple[int, ...], folder: Path) -> Path:
    """The network quantized by nncf.quantize with its defaults: int8 weights per channel, 8-bit activations, static."""
    path = folder / f"{kit.name}-{'x'.join(map(str, shape))}-nncf.xml"
    if path.exists():
        return path
    try:
        import nncf
    except ImportError as missing:
        raise UnavailableError(f"{missing.name} is not installed") from missing
    import openvino

    logging.getLogger("nncf").setLevel(logging.ERROR)
    transformer = {} if kit.kind == "cnn" else {"model_type": nncf.ModelType.TRANSFORMER}
    # Ranges of single images are averaged, which clips: images are calibrated in the largest batch.
    calibrated = kit.shapes[-1] if kit.kind == "cnn" else shape
    model = read(peers_onnx.float32_file(kit, calibrated, folder))
    samples = _calibration(kit, calibrated)
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        quantized = nncf.quantize(model, nncf.Dataset(samples), subset_size=len(samples), **transformer)
    if calibrated != shape:
        quantized.reshape([shape[0], *quantized.input(0).shape[1:]])
    openvino.save_model(quantized, path, compress_to_fp16=False)
    return path


def _calibration(kit: KitModel, shape: tuple[int, ...]) -> list[Any]:
    """Batches of exactly this shape from the calibration split."""
    if kit.kind == "cnn":
        return [batch.numpy() for batch in peers_onnx.calibration_batches(kit, shape[0])]
    from benchmarks.kit.minilm import calibration_examples

    most = max(8, 256 // shape[0])
    return [{name: t.numpy() for name, t in batch.items()} for batch in calibration_examples(shape, most)]


def prepare(path: Path, precision: str | None = None) -> peers_onnx.Prepare:
    """Runs a file in OpenVINO with as many threads as torch has now.

    Args:
        path: an ONNX file or OpenVINO's own .xml.
        precision: "f32" computes floating point in float32; None leaves the choice to OpenVINO, which takes bfloat16
            where the processor has it.

    Returns:
        What makes a call of a batch; a call reads and writes shared memory, nothing is copied.
    """
    import openvino

    settings: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "ENABLE_CPU_PINNING": False,  # a pinned thread would wait for whoever else is on its core
    }
    if precision is not None:
        settings["INFERENCE_PRECISION_HINT"] = precision
    compiled = openvino.Core().compile_model(read(path), "CPU", settings)
    names = [node.get_any_name() for node in compiled.inputs]

    def prepared(batch: Batch) -> Callable[[], object]:
        request = compiled.create_infer_request()
        feeds = {name: batch[name].numpy() for name in names} if isinstance(batch, dict) else {names[0]: batch.numpy()}
        return lambda: request.infer(feeds, share_inputs=True, share_outputs=True)[0]

    return prepared
