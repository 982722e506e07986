"""Calibration and evaluation data: every form a user may bring, read as batches that run the model."""

from narrowcast.data.batches import Batch, describe, iterate, repeatable
from narrowcast.data.pairs import Pairs
from narrowcast.data.statistics import DataStatistics, named_inputs, out_of_vocabulary
from narrowcast.data.texts import Texts

__all__ = [
    "Batch",
    "DataStatistics",
    "Pairs",
    "Texts",
    "describe",
    "iterate",
    "named_inputs",
    "out_of_vocabulary",
    "repeatable",
]
