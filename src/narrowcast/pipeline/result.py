"""The result of the main job, and the sums of its report."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from narrowcast.nn import mark_portable_
from narrowcast.pipeline.checks import coverage
from narrowcast.pipeline.judge import Verdict
from narrowcast.planning import Plan
from narrowcast.recipe import Recipe
from narrowcast.report import LayerOutcome, Report, Totals


@dataclass(frozen=True)
class Quantized:
    """The result of `quantize`.

    Args:
        model: the quantized module; call it like the float one. It is told whether the recipe is portable.
        report: what became of every weight.
        recipe: the recipe that was followed.
        source_sha256: hash of the float model's tensors, which says what this was made from.
    """

    model: nn.Module
    report: Report
    recipe: Recipe
    source_sha256: str = ""

    def __post_init__(self) -> None:
        mark_portable_(self.model, self.recipe.portable)


def totals_of(plan: Plan, outcomes: list[LayerOutcome], verdict: Verdict, probe: Any) -> Totals:
    """Sums over the outcomes; sizes and seconds are the caller's to fill in."""
    done = [row for row in outcomes if row.spec]
    integer_names = {row.layer.name for row in plan.layers if row.integer}
    integer = [row for row in done if row.layer in integer_names]
    macs = None
    if probe is not None:
        macs = sum(row.macs or 0 for row in integer) / max(sum(row.macs or 0 for row in outcomes), 1)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Totals(
        quantized_parameters=sum(row.parameters for row in done),
        coverage=coverage(plan),
        integer_parameters=sum(row.parameters for row in integer),
        integer_macs=macs,
        peak_memory_bytes=kilobytes * (1 if sys.platform == "darwin" else 1024),
        output_sqnr_db=verdict.sqnr_db,
        float_ms=verdict.float_ms,
        quantized_ms=verdict.quantized_ms,
        timed_samples=None if probe is None else probe.samples,
        threads=torch.get_num_threads(),
    )
