"""The report's rows for an ONNX file: what was planned, what was done, and what ONNX Runtime makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from narrowcast.models.onnx_verdict import Kernel
from narrowcast.planning import LayerPlan
from narrowcast.report import LayerOutcome


def outcomes(job: Any, kernels: Mapping[str, Kernel]) -> list[LayerOutcome]:
    """One outcome per weight of the plan.

    Args:
        job: what was done.
        kernels: what ONNX Runtime runs, by the path of the node.
    """
    return [_outcome(job, row, kernels) for row in job.plan.layers]


def _outcome(job: Any, row: LayerPlan, kernels: Mapping[str, Kernel]) -> LayerOutcome:
    layer, observation = row.layer, job.calibration.observation
    macs = None
    if observation.batches:
        macs = sum(observation.positions.get(site.path, 0) for site in layer.sites) * layer.parameters
    base = LayerOutcome(
        layer.name, layer.type, "kept", row.reason, parameters=layer.parameters, bits_per_weight=row.bits_per_weight,
        bytes_before=layer.bytes, bytes_after=row.bytes_after, macs=macs,
    )  # fmt: skip
    if row.weight is None:
        return base
    solved = job.solved[layer.name]
    runs = {site.path: kernels[site.path] for site in layer.sites}
    floats = [f"{path}: {kernel}" for path, kernel in runs.items() if row.integer and not kernel.integer
              and kernel.op != "Gather"]  # fmt: skip
    missed = f"no integer kernel in ONNX Runtime: {'; '.join(floats)}" if floats else ""
    other = "" if row.chosen or not solved.fallback else f"{solved.fallback}: rtn instead of {next(iter(row.method))}"
    fallen = "; ".join(part for part in (row.fallback, missed, other) if part)
    chosen = f"rounded to nearest: {solved.fallback}" if row.chosen and solved.fallback else ""
    twice = f"stored {len(layer.sites)} times, once for every use" if len(layer.sites) > 1 else ""
    reasons = [part for part in (row.reason, fallen or chosen, twice) if part]
    ran = ", ".join(sorted({str(kernel) for kernel in runs.values()}))
    method = f"{solved.method}, bias corrected" if layer.name in job.corrected else solved.method
    return replace(
        base, outcome="fell back" if fallen else "quantized", reason="; ".join(reasons), spec=str(row.weight),
        input=job.inputs[layer.name], method=method, weight_sqnr_db=solved.sqnr_db,
        kernel=row.kernel if row.weight.format.is_cast else ran,
        seconds=solved.seconds,
        errors=list(solved.errors), notes=list(solved.notes),
    )  # fmt: skip
