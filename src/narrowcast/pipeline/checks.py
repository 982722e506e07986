"""What is asked of a model, its plan and its data before any work is done; errors name the layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from narrowcast.errors import ContractError, DataError, ModelError, RecipeError
from narrowcast.models import ModelAdapter
from narrowcast.pipeline.sequential import wants_blocks
from narrowcast.pipeline.solve_weight import check_finite, needs_of
from narrowcast.planning import LayerPlan, Plan


def check_has_values(adapter: ModelAdapter) -> None:
    """Raise ModelError where a weight is on the meta device."""
    for layer in adapter.layers():
        if not layer.reason and layer.type != "Parameter" and adapter.weight(layer).is_meta:
            raise ModelError(
                f"layer {layer.name!r} is on the meta device and has no values to quantize; load the weights first "
                "(nc.plan works without them)"
            )


def check_weights(adapter: ModelAdapter, plan: Plan) -> None:
    """Refuse to quantize weights that are not finite, before any work is done; kept ones may hold anything."""
    for row in plan.layers:
        if row.weight is not None:
            check_finite(row.layer, adapter.weight(row.layer))


def check_has_data(plan: Plan, data: Any) -> None:
    """Raise DataError where the plan needs calibration data and there is none."""
    static = [row.layer.name for row in plan.layers if row.input is not None and row.input.observer]
    if static and data is None:
        raise DataError(
            f"recipe {plan.recipe.name!r} fixes the input ranges of {len(static)} layers ({static[0]!r}, ...) from "
            "calibration data, and there is none; pass data=..., or use 'dynamic-int8', which needs none"
        )
    needing = [row for row in plan.layers if needs_of(row)]
    if needing and data is None:
        row = needing[0]
        raise DataError(
            f"recipe {plan.recipe.name!r} solves {len(needing)} weights ({row.layer.name!r}, ...) by "
            f"{next(iter(row.method))!r}, which needs calibration data, and there is none; pass data=..., or use "
            "method 'rtn' or another that needs none"
        )
    if plan.recipe.sequential is True and data is None:
        raise DataError(
            f"recipe {plan.recipe.name!r} is sequential = true, which sends calibration data through the blocks, and "
            "there is none; pass data=..., or leave sequential at 'auto'"
        )
    outliers = [row.layer.name for row in plan.layers if row.input is not None and row.input.outliers]
    if outliers and data is None:
        raise DataError(
            f"recipe {plan.recipe.name!r} keeps outlier channels of {len(outliers)} layers ({outliers[0]!r}, ...), "
            "which calibration data names, and there is none; pass data=..., or leave out 'outliers:...'"
        )


def check_resume(plan: Plan, resume: str | Path | None) -> None:
    """Raise RecipeError where there would be nothing to resume."""
    if resume is not None and not wants_blocks(plan):
        raise RecipeError(
            f"recipe {plan.recipe.name!r} solves all layers from one pass over the data, so there are no finished "
            "blocks to resume from; leave resume out, or set sequential = true"
        )


def is_matrix(row: LayerPlan) -> bool:
    """Whether a weight is one that quantization is about: not a vector, and not gone by folding."""
    return len(row.layer.shape) > 1 and row.bits_per_weight > 0


def check_plan(plan: Plan, *, strict: bool, min_coverage: float) -> None:
    """Raise what can be known before any work is done: weights that cannot be quantized, and the coverage."""
    if strict:
        short = [f"{row.layer.name}: kept: {row.reason}" for row in plan.layers if row.refused]
        refuse(short + [f"{row.layer.name}: falls back: {row.fallback}" for row in plan.layers if row.fallback])
    share = coverage(plan)
    if share < min_coverage:
        kept = [f"{row.layer.name}: {row.reason}" for row in plan.layers if row.weight is None and is_matrix(row)]
        raise ContractError(
            f"coverage {share:.1%} is below the required {min_coverage:.1%}; kept: {'; '.join(kept[:10])}"
        )


def refuse(short: list[str]) -> None:
    """Raise ContractError with these lines, if there are any."""
    if short:
        raise ContractError(f"strict: {len(short)} weights are not what the recipe says: {'; '.join(short[:10])}")


def coverage(plan: Plan) -> float:
    """Weights that are quantized as a share of all that could be, 0 to 1."""
    possible = sum(row.layer.parameters for row in plan.layers if is_matrix(row))
    return sum(row.layer.parameters for row in plan.layers if row.weight is not None) / possible if possible else 1.0
