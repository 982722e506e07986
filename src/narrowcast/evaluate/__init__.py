"""What a model is worth: accuracy with intervals, latency, bytes, memory, load time and energy beside a reference."""

from narrowcast.evaluate.compare import compare, machine
from narrowcast.evaluate.comparison import Comparison, Side
from narrowcast.evaluate.interval import Estimate
from narrowcast.evaluate.judge import OutputDifference, Score
from narrowcast.evaluate.opened import Opened, evaluating, open_side
from narrowcast.evaluate.sources import open_model

__all__ = [
    "Comparison",
    "Estimate",
    "Opened",
    "OutputDifference",
    "Score",
    "Side",
    "compare",
    "evaluating",
    "machine",
    "open_model",
    "open_side",
]
