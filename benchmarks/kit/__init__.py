"""The kit: real trained models with their real data, each written as a user would write it.

One file per model family holds a plain `nn.Module`, its float32 weights, its calibration data and its metric.
This file knows their names only; a family is imported when it is asked for.
"""

from __future__ import annotations

import importlib

from benchmarks.kit.base import Batch, KitModel, MissingDataError, data_folder, run

KIT_NAMES = ("resnet20", "mobilenetv1", "mobilenetv2", "squeezenet11", "minilm", "stories260k", "textgenrnn")


def kit_model(name: str) -> KitModel:
    """The kit model called `name`.

    Args:
        name: one of KIT_NAMES.

    Returns:
        The model with its data and metric; nothing is read from disk yet.

    Raises:
        ValueError: no such model in the kit.
        MissingDataError: what the model needs is not on this machine.
    """
    if name not in KIT_NAMES:
        raise ValueError(f"no kit model {name!r}; the kit has {', '.join(KIT_NAMES)}")
    family: KitModel = importlib.import_module(f"benchmarks.kit.{name}").KIT
    return family


__all__ = ["KIT_NAMES", "Batch", "KitModel", "MissingDataError", "data_folder", "kit_model", "run"]
