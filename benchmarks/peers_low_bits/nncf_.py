"""NNCF on OpenVINO's form of the model, answered by OpenVINO in float32."""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from pathlib import Path
from typing import Any

import nncf
import openvino
from nncf.quantization.advanced_parameters import (
    AdvancedCompressionParameters,
    AdvancedQuantizationParameters,
    GroupSizeFallbackMode,
)
from nncf.quantization.range_estimator import RangeEstimatorParametersSet

from benchmarks.kit import KitModel
from benchmarks.peers_low_bits import onnx_graph
from benchmarks.peers_low_bits.base import Answers, group_of

MULTIPLYING = ("MatMul", "Convolution", "GroupConvolution")
ON_THE_WAY = ("Convert", "Subtract", "Multiply", "Reshape", "Transpose", "FakeQuantize")
OPTIONS = {"awq": "awq", "scale estimation": "scale_estimation", "gptq": "gptq"}


def multiplying(model: Any) -> list[Any]:
    """The nodes that multiply or convolve."""
    return [node for node in model.get_ordered_ops() if node.get_type_name() in MULTIPLYING]


def is_head(node: Any) -> bool:
    """Whether the node's product is the model's answer itself."""
    targets = [target.get_node().get_type_name() for out in node.outputs() for target in out.get_target_inputs()]
    return node.get_type_name() == "MatMul" and "Result" in targets


def matrices(kit: KitModel, model: Any) -> list[bool]:
    """For every node that multiplies by a constant, whether that is quantized; a decoder's tied head is left out."""
    found = []
    for node in multiplying(model):
        source, passed = node.input_value(1).get_node(), set()
        while source.get_type_name() in ON_THE_WAY:
            passed.add(source.get_type_name())
            source = source.input_value(0).get_node()
        if source.get_type_name() == "Constant" and not (kit.kind == "decoder" and is_head(node)):
            found.append("FakeQuantize" in passed or source.get_element_type().is_integral_number())
    return found


def static(kit: KitModel, model: Any, samples: Any, method: str) -> Any:
    """Weights and activations in int8."""
    chosen: dict[str, Any] = {} if kit.kind == "cnn" else {"model_type": nncf.ModelType.TRANSFORMER}
    if method == "min-max ranges":
        chosen["advanced_parameters"] = AdvancedQuantizationParameters(
            activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
            weights_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
        )
    return nncf.quantize(model, samples, subset_size=samples.get_length(), **chosen)


def weights(kit: KitModel, model: Any, samples: Any, form: str, method: str) -> Any:
    """Weights in int4, embeddings and a decoder's head left float32."""
    heads = [node.get_friendly_name() for node in multiplying(model) if kit.kind == "decoder" and is_head(node)]
    data = {OPTIONS[method]: True, "dataset": samples} if method in OPTIONS else {}
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        ratio=1.0,
        group_size=group_of(form) or -1,
        backup_mode=nncf.BackupMode.NONE,
        advanced_parameters=AdvancedCompressionParameters(
            group_size_fallback_mode=GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=4
        ),
        all_layers=True,
        ignored_scope=nncf.IgnoredScope(types=["Gather"], names=heads),
        **data,
    )


def quantize(kit: KitModel, form: str, method: str) -> Answers:
    """One cell."""
    logging.getLogger("nncf").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        model = openvino.Core().read_model(onnx_graph.export(kit, Path(folder)))
    names = [node.get_any_name() for node in model.inputs]
    samples = nncf.Dataset([onnx_graph.feeds(names, batch) for batch in kit.calibration()])
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        if form == "W8A8 static":
            quantized = static(kit, model, samples, method)
        else:
            quantized = weights(kit, model, samples, form, method)
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    compiled = openvino.Core().compile_model(quantized, "CPU", settings)
    call = onnx_graph.answering(kit, names, lambda arrays: compiled(arrays)[0])
    found = matrices(kit, quantized)
    return Answers(call, sum(found), len(found))
