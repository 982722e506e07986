"""narrowcast makes a trained neural network small and fast by storing and computing its numbers in fewer bits.

    import narrowcast as nc

    quantized = nc.quantize(model, "dynamic-int8")
    print(quantized.report)
    nc.save(quantized, "model-int8")

Every public name is imported when it is first used: a command that only prints a number does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from narrowcast import export, kernels, qat
    from narrowcast.evaluate import Comparison, compare
    from narrowcast.export import load, save
    from narrowcast.parity import Parity, verify
    from narrowcast.pipeline import Quantized, quantize
    from narrowcast.planning import Plan, plan
    from narrowcast.recipe import Recipe, Rule
    from narrowcast.report import Report

__version__ = "0.1.0"

_ROOMS = {
    "Comparison": "evaluate",
    "Parity": "parity",
    "Plan": "planning",
    "Quantized": "pipeline",
    "Recipe": "recipe",
    "Report": "report",
    "Rule": "recipe",
    "compare": "evaluate",
    "load": "export",
    "plan": "planning",
    "quantize": "pipeline",
    "save": "export",
    "verify": "parity",
}

__all__ = [
    "CheckpointError",
    "Comparison",
    "ContractError",
    "DataError",
    "FormatError",
    "KernelError",
    "ModelError",
    "NarrowcastError",
    "Parity",
    "Plan",
    "Quantized",
    "Recipe",
    "RecipeError",
    "Report",
    "Rule",
    "__version__",
    "compare",
    "export",
    "kernels",
    "load",
    "plan",
    "qat",
    "quantize",
    "save",
    "verify",
]


def __getattr__(name: str) -> Any:
    """A public name on its first use."""
    if name in ("export", "kernels", "qat"):
        return importlib.import_module(f"narrowcast.{name}")
    if name not in _ROOMS:
        raise AttributeError(f"module 'narrowcast' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"narrowcast.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names."""
    return __all__
