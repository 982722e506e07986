"""Calibration and evaluation data: every form a user may bring, read as batches that run the model."""

from narrowcast.data.batches import Batch, describe, iterate, repeatable
from narrowcast.data.pairs import Pairs
from narrowcast.data.texts import Texts

__all__ = ["Batch", "Pairs", "Texts", "describe", "iterate", "repeatable"]
