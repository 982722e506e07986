"""The main job: plan, fold, observe, solve, install, judge."""

from narrowcast.pipeline.doctor import examine
from narrowcast.pipeline.run import Quantized, quantize

__all__ = ["Quantized", "examine", "quantize"]
