"""ONNX Runtime: static quantization with its calibrators, dynamic quantization, MatMulNBits with its algorithms."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    matmul_nbits_quantizer,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from benchmarks.kit import KitModel
from benchmarks.peers_low_bits import onnx_graph
from benchmarks.peers_low_bits.base import BITS, GROUP, Answers

CALIBRATORS: dict[str, tuple[CalibrationMethod, dict[str, Any]]] = {
    "static min-max": (CalibrationMethod.MinMax, {}),
    "static entropy": (CalibrationMethod.Entropy, {}),
    "static percentile 99.999": (CalibrationMethod.Percentile, {"CalibPercentile": 99.999}),
}


class Reader(CalibrationDataReader):
    """Feeds the calibration batches, as often as it is rewound."""

    def __init__(self, kit: KitModel, names: list[str]) -> None:
        self.kit, self.names = kit, names
        self.rewind()

    def rewind(self) -> None:
        """Starts over."""
        self.left: Iterator[Any] = iter(self.kit.calibration())

    def get_next(self) -> dict[str, Any] | None:
        """The next batch as named arrays; None at the end."""
        batch = next(self.left, None)
        return None if batch is None else onnx_graph.feeds(self.names, batch)


def session(path: Path) -> onnxruntime.InferenceSession:
    """The file loaded with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def static(kit: KitModel, prepared: Path, path: Path, method: str) -> None:
    """QDQ with int8 weights per channel and uint8 activations per tensor."""
    calibrator, extra = CALIBRATORS[method]
    names = [node.name for node in onnx.load(prepared).graph.input]
    matrices = {} if kit.kind == "cnn" else {"nodes_to_quantize": onnx_graph.with_weights(prepared, kit)}
    quantize_static(
        prepared,
        path,
        Reader(kit, names),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=calibrator,
        extra_options=extra,
        **matrices,
    )


def algorithm(kit: KitModel, path: Path, form: str, method: str) -> Any:
    """MatMulNBits' configuration of one cell."""
    configurations = matmul_nbits_quantizer
    if method == "hqq":
        return configurations.HQQWeightOnlyQuantConfig(block_size=GROUP, bits=BITS[form])
    if method == "k-quant":
        return configurations.KQuantWeightOnlyQuantConfig()
    if method == "gptq":
        names = [node.name for node in onnx.load(path).graph.input]
        reader = [onnx_graph.feeds(names, batch) for batch in kit.calibration()]
        return configurations.GPTQWeightOnlyQuantConfig(calibration_data_reader=reader, block_size=GROUP)
    level = 4 if form == "W4A8" else 0
    return configurations.DefaultWeightOnlyQuantConfig(
        block_size=GROUP, is_symmetric=False, accuracy_level=level, bits=BITS[form]
    )


def quantized(kit: KitModel, form: str, method: str, source: Path, path: Path) -> None:
    """Writes the quantized file of one cell."""
    if method in CALIBRATORS:
        static(kit, source, path, method)
    elif method == "dynamic":
        nodes = onnx_graph.with_weights(source, kit)
        quantize_dynamic(source, path, per_channel=True, weight_type=QuantType.QInt8, nodes_to_quantize=nodes)
    else:
        work = matmul_nbits_quantizer.MatMulNBitsQuantizer(
            str(source),
            block_size=GROUP,
            bits=BITS[form],
            algo_config=algorithm(kit, source, form, method),
            nodes_to_exclude=onnx_graph.head(source, kit),
        )
        work.process()
        work.model.save_model_to_file(str(path))


def quantize(kit: KitModel, form: str, method: str) -> Answers:
    """One cell; matrices are counted in the graphs, before and after."""
    logging.getLogger().setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        source, prepared = onnx_graph.export(kit, Path(folder)), Path(folder) / "prepared.onnx"
        quant_pre_process(source, prepared, skip_symbolic_shape=True)
        matrices = len(onnx_graph.with_weights(prepared, kit))
        path = Path(folder) / "quantized.onnx"
        quantized(kit, form, method, prepared, path)
        left = len(onnx_graph.with_weights(path, kit))
        loaded = session(path)
    names = [node.name for node in loaded.get_inputs()]
    call = onnx_graph.answering(kit, names, lambda arrays: loaded.run(None, arrays)[0])
    return Answers(call, matrices - left, matrices)
