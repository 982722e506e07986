"""narrowcast makes a trained neural network small and fast by storing and computing its numbers in fewer bits.

    import narrowcast as nc

    quantized = nc.quantize(model, "dynamic-int8")
    print(quantized.report)
    nc.save(quantized, "model-int8")
"""

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
from narrowcast.evaluate import Comparison, compare
from narrowcast.export import load, save
from narrowcast.pipeline import Quantized, quantize
from narrowcast.plan import Plan, plan
from narrowcast.recipe import Recipe, Rule
from narrowcast.report import Report

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
