"""Four small models, with data, that between them have everything the presets meet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """A small CNN: stem, a residual depthwise block with norms, a 1x1, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.pointwise = nn.Conv2d(16, 24, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.norm(self.depthwise(x)).relu()
        return self.head(self.pointwise(x).relu().mean((2, 3)))


class Transformer(nn.Module):
    """A table, one encoder layer of torch's own, a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 32)
        self.position = nn.Parameter(torch.randn(1, 16, 32) * 0.1)
        self.body = nn.TransformerEncoderLayer(32, 4, 76, batch_first=True)
        self.classes = nn.Linear(32, 5)

    def forward(self, indices: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.table(indices) + self.position[:, : indices.shape[1]]
        return self.classes(self.body(x, src_key_padding_mask=mask).mean(1))


class Text(nn.Module):
    """An embedding, an LSTM and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 24)
        self.memory = nn.LSTM(24, 32, num_layers=2, batch_first=True)
        self.head = nn.Linear(32, 60)

    def forward(self, indices: Tensor) -> Tensor:
        return self.head(self.memory(self.table(indices))[0])


class Tied(nn.Module):
    """A language model in miniature: the table is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(60, 32)
        self.up = nn.Linear(32, 86)
        self.down = nn.Linear(86, 32)
        self.head = nn.Linear(32, 60, bias=False)
        self.head.weight = self.table.weight

    def forward(self, indices: Tensor) -> Tensor:
        x = self.table(indices)
        return self.head(x + self.down(self.up(x).relu()))


def _images() -> Tensor:
    return torch.randn(48, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def _tokens() -> Tensor:
    return torch.randint(0, 60, (48, 11), generator=torch.Generator().manual_seed(0))


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "cnn": (Residual, _images),
    "transformer": (Transformer, _tokens),
    "lstm": (Text, _tokens),
    "tied": (Tied, _tokens),
}


def example(name: str) -> tuple[nn.Module, Tensor]:
    """A model in evaluation mode, its norms settled by a few batches, and its data."""
    torch.manual_seed(0)
    make, data = CASES[name]
    model, x = make(), data()
    with torch.no_grad():
        for _ in range(20):
            model(x)  # training mode: running statistics of the norms
    return model.eval(), x
