"""TrainedEmbedding: a table in training whose rows are rounded as QuantizedEmbedding will hold them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from narrowcast.core import PerChannel, PerGroup
from narrowcast.nn.embedding import QuantizedEmbedding
from narrowcast.nn.trained import AnyRange, TrainedModule, WeightCast
from narrowcast.nn.trained_ranges import InputRange
from narrowcast.nn.training import Training


class TrainedEmbedding(TrainedModule):
    """The twin of a QuantizedEmbedding; only rows that are looked up are rounded.

    Args:
        path, quantized, training, ranges, input_range: see `TrainedModule`; there is no input range.
        weights: {"weight": [num_embeddings, embedding_dim]}; tied layers have the same parameter.
    """

    twin_of = QuantizedEmbedding

    def __init__(
        self, path: str, quantized: QuantizedEmbedding, training: Training, ranges: dict[str, AnyRange],
        input_range: InputRange | None, weights: dict[str, nn.Parameter],
    ) -> None:  # fmt: skip
        super().__init__(path, quantized, training, ranges, input_range)
        self.num_embeddings, self.embedding_dim = quantized.num_embeddings, quantized.embedding_dim
        self.padding_idx = quantized.padding_idx
        self.weight = weights["weight"]

    def matrix(self, name: str) -> Tensor:
        """See `TrainedModule`."""
        return self.weight.float()

    def build(self) -> QuantizedEmbedding:
        """See `TrainedModule`."""
        record = self.records()["weight"]
        dtype = self.weight.dtype if self.weight.dtype.itemsize == 2 else torch.float32
        return QuantizedEmbedding(record.spec, record.shape, record=record, padding_idx=self.padding_idx, dtype=dtype)

    def trained_forward(self, indices: Tensor) -> Tensor:
        """[...] integer -> [..., embedding_dim]; the row of `padding_idx` gets no gradient, as in torch."""
        part = self.weight_range()
        weight = self.weight.float()
        if isinstance(part, WeightCast) or not isinstance(part.spec.granularity, PerChannel | PerGroup):
            rows = functional.embedding(indices, part.quantized(weight), self.padding_idx)
            return rows.to(self.weight.dtype)
        rows = part.rows(weight, indices.reshape(-1), self.padding_idx)
        return rows.view(*indices.shape, self.embedding_dim).to(self.weight.dtype)
