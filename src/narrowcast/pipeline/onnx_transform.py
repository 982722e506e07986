"""Transforms of ONNX graphs: worked on a twin in torch, written back to the nodes, checked in ONNX Runtime."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from narrowcast.errors import ModelError
from narrowcast.models import TorchModel
from narrowcast.models.onnx_model import OnnxModel
from narrowcast.models.onnx_rewrite import write_back
from narrowcast.pipeline.onnx_on_twin import (
    SAME_FUNCTION_DB,
    answers,
    checked_twin,
    plan_on_twin,
    readable_errors,
    sameness,
)
from narrowcast.pipeline.transform import Transformed, transform
from narrowcast.planning import Plan


def transform_onnx(adapter: OnnxModel, plan: Plan, data: Any, probe: Any) -> Transformed:
    """Apply the transforms of the plan's recipe to the graph. The errors are those of `transform`, and name nodes.

    Args:
        adapter: its graph is changed.
        plan: of the same adapter.
        data: calibration data; None when there is none.
        probe: its first batch; None without data.

    Raises:
        ModelError: ONNX Runtime's answers are others than before, or the graph cannot be computed in torch.
    """
    if not plan.recipe.transforms:
        return Transformed()
    twin = checked_twin(adapter, probe)
    work = TorchModel(twin.module)
    before = [] if probe is None else answers(adapter, probe)
    with readable_errors(twin):
        done = transform(work, plan_on_twin(plan, twin), data, probe)
    nodes = write_back(adapter, twin, work.model)
    notes = [twin.readable(note) for note in done.notes]
    if probe is not None:
        notes.append(_same_in_runtime(before, answers(adapter, probe), nodes))
    return Transformed(notes, done.changes)


def _same_in_runtime(before: list[Tensor], after: list[Tensor], nodes: list[str]) -> str:
    same = sameness(before, after)
    if same < SAME_FUNCTION_DB:
        raise ModelError(
            f"the transforms changed what ONNX Runtime answers (SQNR {same:.1f} dB, expected at least "
            f"{SAME_FUNCTION_DB:.0f}): {', '.join(nodes[:8])}; leave the transforms out, or name pairs that keep the "
            "function"
        )
    return f"transforms: {len(nodes)} nodes rewritten; ONNX Runtime's answers are unchanged to {same:.0f} dB"
