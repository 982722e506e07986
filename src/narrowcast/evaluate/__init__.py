"""What a model is worth: accuracy with intervals, latency, bytes, memory, load time and energy beside a reference."""

from narrowcast.evaluate.compare import compare, machine
from narrowcast.evaluate.comparison import Comparison, Side
from narrowcast.evaluate.interval import Estimate
from narrowcast.evaluate.judge import OutputDifference, Score
from narrowcast.evaluate.sources import open_model

__all__ = ["Comparison", "Estimate", "OutputDifference", "Score", "Side", "compare", "machine", "open_model"]
