"""What quantizes the ONNX files of `python -m benchmarks.onnx`: narrowcast's presets, ONNX Runtime, NNCF, OpenVINO.

Each maker reads the float32 file of a case and writes one file; imports of tools are inside, since narrowcast and the
other tools may be installed in different interpreters.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.onnx_cases import Case, Feeds, Infer

PRESETS = ("static-int8", "dynamic-int8", "weight-int8", "weight-int4", "dynamic-int4", "fp16", "bf16")
EXPORTED = ("static-int8", "dynamic-int8", "weight-int8", "weight-int4")
NARROWCAST, ORT, NNCF, OPENVINO = "narrowcast", "ONNX Runtime", "NNCF", "OpenVINO"
FLOAT32 = "float32"
CNN = ("cnn",)
LINEAR = ("encoder", "decoder", "recurrent")
ALL = (*CNN, *LINEAR, "vad")
KIT = (*CNN, *LINEAR)

# (case, float32 file, calibration feeds, file to write) -> what the tool says of its work
Maker = Callable[[Case, Path, list[Feeds], Path], list[str]]


@dataclass(frozen=True)
class Tool:
    """One way to a quantized file.

    Attributes:
        tool, method: as the table names it.
        make: writes the file.
        kinds: of cases that it is for.
        runtime: what runs the file: ORT or OPENVINO.
        peer: whether it needs the other tools' interpreter.
    """

    tool: str
    method: str
    make: Maker
    kinds: tuple[str, ...] = ALL
    runtime: str = ORT
    peer: bool = False

    @property
    def name(self) -> str:
        """Tool and method."""
        return f"{self.tool} {self.method}"

    @property
    def ending(self) -> str:
        """Of its file."""
        return "xml" if self.runtime == OPENVINO else "onnx"


def preset(name: str, case: Case, source: Path, feeds: list[Feeds], path: Path) -> list[str]:
    """One of narrowcast's presets on the ONNX file."""
    import narrowcast as nc

    data: Any = [tensors(batch) for batch in feeds]
    quantized = nc.quantize(source, name, data=data, progress=False)
    nc.save(quantized, path)
    rows = [f"{row.layer}: {row.reason}" for row in quantized.report.layers if row.outcome == "fell back"]
    return [*rows, *quantized.report.notes]


def exported(name: str, case: Case, source: Path, feeds: list[Feeds], path: Path) -> list[str]:
    """One of narrowcast's presets on the PyTorch module, exported."""
    import narrowcast as nc
    from benchmarks.kit import kit_model

    kit = kit_model(case.name)
    model = kit.build()
    if case.kind == "encoder":
        from benchmarks.peers_low_bits.onnx_graph import EncoderStates

        model.config._attn_implementation = "eager"
        model = EncoderStates(model).eval()
    quantized = nc.quantize(model, name, data=kit.calibration(), progress=False)
    done = nc.export.onnx(quantized, path, example=kit.calibration())
    return [*(f"{row.layer}: {row.note}" for row in done.layers if row.note), *done.notes]


def tensors(feeds: Feeds) -> Any:
    """Named arrays as the tensor, or the named tensors, that a model takes."""
    import torch

    found = {name: torch.from_numpy(array) for name, array in feeds.items()}
    return next(iter(found.values())) if len(found) == 1 else found


def float32(case: Case, source: Path, feeds: list[Feeds], path: Path) -> list[str]:
    """The file as it is."""
    path.write_bytes(source.read_bytes())
    return []


def prepared(source: Path) -> Path:
    """The float32 file as onnxruntime.quantization asks for it: shapes inferred, BatchNorm folded, optimized."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = source.with_suffix(".prepared.onnx")
    if not path.exists():
        quant_pre_process(source, path, skip_symbolic_shape=True)
    return path


def ort_static(weights: str, case: Case, source: Path, feeds: list[Feeds], path: Path) -> list[str]:
    """quantize_static: QDQ, min-max, per channel; its own list of operators for CNNs, matrices only elsewhere."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        """Feeds the calibration batches once."""

        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> Feeds | None:
            return next(self.left, None)

    matrices = {} if case.kind in ("cnn", "vad") else {"op_types_to_quantize": ["MatMul", "Gemm"]}
    activations = quantization.QuantType.QUInt8 if weights == "U8S8" else quantization.QuantType.QInt8
    quantization.quantize_static(
        prepared(source),
        path,
        Reader(),
        quant_format=quantization.QuantFormat.QDQ,
        per_channel=True,
        activation_type=activations,
        weight_type=quantization.QuantType.QInt8,
        **matrices,
    )
    return []


def ort_dynamic(case: Case, source: Path, feeds: list[Feeds], path: Path) -> list[str]:
    """quantize_dynamic: int8 weights per channel, uint8 inputs; matrices, lookups and LSTMs, its default list."""
    import onnx
    from onnxruntime import quantization

    model = onnx.load(prepared(source))
    # it transposes weights of Gemm and trips over their shapes where the file states them
    del model.graph.value_info[:]
    quantization.quantize_dynamic(model, path, per_channel=True, weight_type=quantization.QuantType.QInt8)
    return []


def nncf_onnx(case: Case, source: Path, feeds: list[Feeds], path: Path) -> list[str]:
    """nncf.quantize with its defaults on the ONNX file."""
    import nncf
    import onnx

    onnx.save(_nncf(onnx.load(source), nncf, case, feeds), path)
    return []


def nncf_openvino(case: Case, source: Path, feeds: list[Feeds], path: Path) -> list[str]:
    """nncf.quantize with its defaults on OpenVINO's form of the file."""
    import nncf
    import openvino

    model = openvino.Core().read_model(source)
    openvino.save_model(_nncf(model, nncf, case, feeds), path, compress_to_fp16=False)
    return []


def _nncf(model: Any, nncf: Any, case: Case, feeds: list[Feeds]) -> Any:
    logging.getLogger("nncf").setLevel(logging.ERROR)
    transformer = {"model_type": nncf.ModelType.TRANSFORMER} if case.kind in ("encoder", "decoder") else {}
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        return nncf.quantize(model, nncf.Dataset(feeds), subset_size=len(feeds), **transformer)


def openvino_float32(case: Case, source: Path, feeds: list[Feeds], path: Path) -> list[str]:
    """OpenVINO's form of the file."""
    import openvino

    openvino.save_model(openvino.Core().read_model(source), path, compress_to_fp16=False)
    return []


TOOLS = (
    Tool(ORT, FLOAT32, float32),
    *(Tool(NARROWCAST, name, partial(preset, name)) for name in PRESETS),
    *(Tool(f"{NARROWCAST} from PyTorch", name, partial(exported, name), (*CNN, "encoder", "decoder"))
      for name in EXPORTED),
    Tool(ORT, "static U8S8", partial(ort_static, "U8S8")),
    Tool(ORT, "static S8S8", partial(ort_static, "S8S8")),
    Tool(ORT, "dynamic", ort_dynamic),
    Tool(NNCF, "int8 in ONNX Runtime", nncf_onnx, peer=True),
    Tool(OPENVINO, FLOAT32, openvino_float32, runtime=OPENVINO, peer=True),
    Tool(OPENVINO, "int8", nncf_openvino, runtime=OPENVINO, peer=True),
)  # fmt: skip


def tool(name: str) -> Tool:
    """The tool of that full name."""
    return next(found for found in TOOLS if found.name == name)


def session(path: Path, runtime: str, threads: int) -> tuple[Infer, list[str]]:
    """What answers named arrays with a list of arrays, and the names of the inputs."""
    if runtime == OPENVINO:
        return _openvino_session(path, threads)
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # its threads would otherwise spin after each run and take cores from the next contender
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    loaded = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda feeds: loaded.run(None, feeds), [node.name for node in loaded.get_inputs()]


def _openvino_session(path: Path, threads: int) -> tuple[Infer, list[str]]:
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "ENABLE_CPU_PINNING": False,
    }
    compiled = openvino.Core().compile_model(openvino.Core().read_model(path), "CPU", settings)
    names = [node.get_any_name() for node in compiled.inputs]
    request = compiled.create_infer_request()
    count = len(compiled.outputs)

    def infer(feeds: Feeds) -> list[Any]:
        got = request.infer(feeds, share_inputs=True, share_outputs=True)
        return [got[index] for index in range(count)]

    return infer, names
