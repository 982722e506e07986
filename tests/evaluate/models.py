"""Factories of small models, for tests that open `package.module:factory` in this and in fresh processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def classifier() -> nn.Module:
    """Sixteen features to five classes, the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 5))


def large() -> nn.Module:
    """40 MB of weights that are really written, so they are resident."""
    return nn.Linear(10_000, 1000)


def broken() -> nn.Module:
    raise MemoryError("no room for this model")


NOT_A_FUNCTION = 3


class LanguageModel(nn.Module):
    """A causal model of 7 tokens: each predicts the next by a table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 7)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        return {"loss": torch.zeros(()), "logits": self.embed(input_ids)}
