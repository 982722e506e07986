"""A training that a test kills: the same small model every time, dropout and augmentation included.

Run as `python fit_run.py WORK`; prints a line per step.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import narrowcast as nc

RULE = {"weight": "int4/channel", "input": "uint8/tensor static:minmax", "method": "rtn"}


class Noisy(Dataset[Any]):
    """Images that are another each time they are read: augmentation by the global generator."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.images = torch.randn(48, 3, 8, 8, generator=generator)
        self.labels = torch.randint(0, 4, (48,), generator=generator)

    def __len__(self) -> int:
        return 48

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index] + 0.1 * torch.randn(3, 8, 8), self.labels[index]


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Dropout(0.2), nn.Linear(8, 4),
    ).eval()  # fmt: skip


def settings(**more: Any) -> nc.qat.FitSettings:
    """Twelve steps in four epochs, everything frozen on the way."""
    given = {"epochs": 4, "batch_size": 16, "lr": 0.03, "freeze_after": 0.5, "freeze_ranges_after": 0.7} | more
    return nc.qat.FitSettings(**given)


def prepared(train: str = "lsq") -> tuple[nn.Module, nn.Module]:
    """(the float model, the same prepared)."""
    model, data = build(), Noisy()
    recipe = {"rule": [RULE | {"train": train}]}
    return model, nc.qat.prepare(model, recipe, [data.images], progress=False)


def accuracy(model: nn.Module) -> float:
    """Share of the images that are recognised."""
    data = Noisy()
    return float((model(data.images).argmax(1) == data.labels).float().mean())


def main(work: str) -> None:
    """Train, and write the state after every step."""
    teacher, model = prepared()

    def tell(now: nc.qat.Progress) -> None:
        print(now.step, flush=True)

    given = settings(checkpoint_every=1)
    nc.qat.fit(model, Noisy(), given, teacher=teacher, evaluate=accuracy, work=work, resume=True, tell=tell)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
