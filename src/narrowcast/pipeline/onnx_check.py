"""Holding the conversion of an ONNX file to another opset against the file itself."""

from __future__ import annotations

from typing import Any

import torch

from narrowcast.core import sqnr_db
from narrowcast.errors import ModelError
from narrowcast.models.onnx_model import OnnxModel
from narrowcast.pipeline.judge import first_tensor

# Float32 rounding of a network in another order of operations; below it, the function is another one.
_SAME_FUNCTION_DB = 60.0


def check_conversion(adapter: OnnxModel, probe: Any) -> None:
    """Hold a model that was converted to another opset against the original, on the first batch; tells it in the notes.

    Args:
        adapter: nothing is quantized yet.
        probe: the first batch; None without data.

    Raises:
        ModelError: the answers differ by more than float rounding.
    """
    if adapter.converted is None:
        return
    said = "not checked on data, because there is none"
    if probe is not None:
        with torch.no_grad():
            expected, got = first_tensor(probe.run(adapter.original)), first_tensor(probe.run(adapter.model))
        same = None
        if expected is not None and got is not None:
            same = sqnr_db(expected, got) if expected.shape == got.shape else float("-inf")
        if same is not None and same < _SAME_FUNCTION_DB:
            had, has = adapter.converted
            raise ModelError(
                f"{adapter.name}: onnx's conversion of opset {had} to {has} changed its answer on the first batch ("
                f"SQNR {same:.1f} dB, expected at least {_SAME_FUNCTION_DB:.0f}); export the model with a newer opset"
            )
        said = "its answer is no float tensor to compare" if same is None else (
            f"on the first batch its answer is that of the original to {same:.0f} dB"
        )  # fmt: skip
    adapter.notes[0] = f"{adapter.notes[0]}; {said}"
