"""Quantization-aware training: `prepare` a model, train it in any loop, `convert` it without losing a bit."""

from narrowcast.qat.convert import convert
from narrowcast.qat.distill import distill_loss
from narrowcast.qat.freeze import FreezeSchedule
from narrowcast.qat.groups import parameter_groups
from narrowcast.qat.health import Health, report
from narrowcast.qat.loop import Fitted, Progress, fit
from narrowcast.qat.prepare import prepare
from narrowcast.qat.settings import FitSettings

__all__ = [
    "FitSettings",
    "Fitted",
    "FreezeSchedule",
    "Health",
    "Progress",
    "convert",
    "distill_loss",
    "fit",
    "parameter_groups",
    "prepare",
    "report",
]
