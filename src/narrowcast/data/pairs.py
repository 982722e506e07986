"""Pairs of samples with a score of their similarity: the data that sentence and image embeddings are judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Pairs:
    """Sample i of `first` and sample i of `second` are as similar as `scores[i]` says.

    `iterate` yields the batches of `first` and then those of `second`, without targets; `compare` correlates the
    cosine of the two embeddings with the scores.

    Args:
        first: any repeatable form of data.
        second: the same form, as many samples.
        scores: one number per pair; only their order matters.
    """

    first: Any
    second: Any
    scores: Sequence[float]
