"""Quantization-aware training: `prepare` a model, train it in any loop, `convert` it without losing a bit.

Or attach low-rank adapters to a quantized model, train these alone, and merge them.
"""

from narrowcast.qat.adapter_files import load_adapters, save_adapters
from narrowcast.qat.adapters import attach_adapters
from narrowcast.qat.convert import convert
from narrowcast.qat.distill import distill_loss
from narrowcast.qat.freeze import FreezeSchedule
from narrowcast.qat.groups import parameter_groups
from narrowcast.qat.health import Health, report
from narrowcast.qat.loop import Fitted, Progress, fit
from narrowcast.qat.merge import merge_adapters
from narrowcast.qat.parallel import sync_ranges
from narrowcast.qat.prepare import prepare
from narrowcast.qat.settings import FitSettings

__all__ = [
    "FitSettings",
    "Fitted",
    "FreezeSchedule",
    "Health",
    "Progress",
    "attach_adapters",
    "convert",
    "distill_loss",
    "fit",
    "load_adapters",
    "merge_adapters",
    "parameter_groups",
    "prepare",
    "report",
    "save_adapters",
    "sync_ranges",
]
