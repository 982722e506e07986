"""The target `ort`: ONNX Runtime's own file format for phones, and the operators that a small build must have."""

from __future__ import annotations

import importlib
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnxruntime

from narrowcast.errors import CheckpointError, FormatError, ModelError
from narrowcast.export.artefact import write_artefact
from narrowcast.export.target_onnx import kernels
from narrowcast.export.targets import Delivered, Request

PLATFORMS = ("arm", "amd64")
OPERATORS = ".required_operators.config"


def deliver(request: Request) -> Delivered:
    """Write `<name>.ort` and `<name>.required_operators.config` beside it.

    Raises:
        FormatError: the platform is not known.
        ModelError: ONNX Runtime refuses the model.
        CheckpointError: the disk refuses.
    """
    settings = dict(request.settings)
    platform = settings.pop("platform", PLATFORMS[0])
    if platform not in PLATFORMS:
        raise FormatError(f"platform {platform!r} is not known; ONNX Runtime optimizes for {' or '.join(PLATFORMS)}")
    config = request.out.with_suffix(OPERATORS)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{request.out.name}.", dir=request.out.absolute().parent) as place:
            source, made = Path(place) / "model.onnx", Path(place) / "model.ort"
            written = write_artefact(request.model, source, request.example, **settings)
            facts, doubts = kernels(written)
            convert(source, made, platform=platform)
            operators = required_operators(made)
            (Path(place) / "operators").write_text(operators.replace(str(made), request.out.name), encoding="utf-8")
            (Path(place) / "operators").replace(config)
            made.replace(request.out)
    except OSError as error:
        raise CheckpointError(f"{request.out} cannot be written: {error}") from None
    facts |= {"optimized for": platform, "operators": f"{config.name}: --include_ops_by_config of a minimal build"}
    files = {path.name: path.stat().st_size for path in (request.out, config)}
    return Delivered(request.out, files, facts, written.notes, doubts)


def convert(source: Path, target: Path, *, platform: str) -> None:
    """Write an ONNX file in ORT format, optimized as far as it runs on every machine of a platform.

    As onnxruntime.tools.convert_onnx_models_to_ort does in its style "Fixed": the layout of blocked channels is that of
    one machine and left out, but for amd64; signed codes stay as they are for Arm, whose kernels multiply them.

    Raises:
        ModelError: ONNX Runtime refuses the model.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    left_out = []
    if platform == "arm":
        options.add_session_config_entry("session.qdqisint8allowed", "1")
        left_out = ["NchwcTransformer"]
    try:
        onnxruntime.InferenceSession(
            str(source), options, providers=["CPUExecutionProvider"], disabled_optimizers=left_out
        )
    except Exception as error:  # ONNX Runtime has a class of error for each status
        raise ModelError(f"ONNX Runtime cannot convert the model: {type(error).__name__}: {error!s:.500}") from None


def required_operators(model: Path) -> str:
    """The operators of an ORT file as ONNX Runtime's build reads them."""
    tools: Any = importlib.import_module("onnxruntime.tools.ort_format_model")
    config = model.with_suffix(".config")
    logging.getLogger("ort_format_model.utils").setLevel(logging.WARNING)  # it tells of files that are moved at once
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the tool leaves closing its file to Python
        tools.create_config_from_models([model], config, enable_type_reduction=False)
    return config.read_text(encoding="utf-8")
