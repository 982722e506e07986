"""Calibration and evaluation data: every form a user may bring, read as batches that run the model."""

from narrowcast.data.arrays import ArrayBatches, open_arrays
from narrowcast.data.batches import Batch, describe, iterate, opened, repeatable
from narrowcast.data.image_folder import ImageFolder
from narrowcast.data.pairs import Pairs
from narrowcast.data.preprocessing import Preprocessing
from narrowcast.data.statistics import DataStatistics, named_inputs, out_of_vocabulary
from narrowcast.data.texts import Texts

__all__ = [
    "ArrayBatches",
    "Batch",
    "DataStatistics",
    "ImageFolder",
    "Pairs",
    "Preprocessing",
    "Texts",
    "describe",
    "iterate",
    "named_inputs",
    "open_arrays",
    "opened",
    "out_of_vocabulary",
    "repeatable",
]
