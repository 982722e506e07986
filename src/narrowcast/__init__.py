"""narrowcast makes a trained neural network small and fast by storing and computing its numbers in fewer bits.

    import narrowcast as nc

    quantized = nc.quantize(model, "dynamic-int8")
    print(quantized.report)
    nc.save(quantized, "model-int8")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from narrowcast import kernels
from narrowcast.errors import (
    CheckpointError,
    ContractError,
    DataError,
    FormatError,
    KernelError,
    ModelError,
    NarrowcastError,
    RecipeError,
)
from narrowcast.export import load, save
from narrowcast.pipeline import Quantized, quantize
from narrowcast.plan import Plan, plan
from narrowcast.recipe import Recipe, Rule
from narrowcast.report import Report

if TYPE_CHECKING:
    from narrowcast.evaluate import Comparison, compare

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Comparison",
    "ContractError",
    "DataError",
    "FormatError",
    "KernelError",
    "ModelError",
    "NarrowcastError",
    "Plan",
    "Quantized",
    "Recipe",
    "RecipeError",
    "Report",
    "Rule",
    "__version__",
    "compare",
    "kernels",
    "load",
    "plan",
    "quantize",
    "save",
]


def __getattr__(name: str) -> Any:
    """`compare` brings SciPy's statistics, which take longer to import than a checkpoint takes to load: on first use."""
    if name in ("compare", "Comparison"):
        from narrowcast import evaluate

        return getattr(evaluate, name)
    raise AttributeError(f"module 'narrowcast' has no attribute {name!r}")
