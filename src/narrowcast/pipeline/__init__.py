"""The main job: plan, fold, observe, solve, install, judge."""

from narrowcast.pipeline.run import Quantized, quantize

__all__ = ["Quantized", "quantize"]
