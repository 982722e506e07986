"""A small convolutional network with BatchNorm, trained in seconds on scikit-learn's handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TRAINING_SAMPLES = 1200
EPOCHS = 8
BATCH = 64
SEED = 0


class DigitsNet(nn.Module):
    """Three convolutions, each with BatchNorm and ReLU, and a linear layer; 66 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.norm2 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.conv3, self.norm3 = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.output = nn.Linear(64 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1, 8, 8] in 0..1 -> logits [B, 10]."""
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.relu(self.norm3(self.conv3(x)))
        return self.output(x.flatten(1))


@dataclass(frozen=True)
class Digits:
    """The data: images [N, 1, 8, 8] in 0..1 and labels [N], split by a fixed shuffle."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def load_digits() -> Digits:
    """1797 digits from scikit-learn: 1200 to train and calibrate, 597 to test.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    from sklearn import datasets

    found = datasets.load_digits()
    order = np.random.default_rng(SEED).permutation(len(found.target))
    images = torch.from_numpy(found.images[order] / 16).float().unsqueeze(1)
    labels = torch.from_numpy(found.target[order]).long()
    cut = TRAINING_SAMPLES
    return Digits((images[:cut], labels[:cut]), (images[cut:], labels[cut:]))


def train(digits: Digits) -> nn.Module:
    """The trained network in eval mode; the same weights for the same seed on the same machine.

    Args:
        digits: the data.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small: a second thread costs more than it does
    try:
        with torch.random.fork_rng():
            torch.manual_seed(SEED)
            return _fit(DigitsNet(), *digits.train)
    finally:
        torch.set_num_threads(threads)


def _fit(model: nn.Module, images: Tensor, labels: Tensor) -> nn.Module:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = EPOCHS * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).split(BATCH):
            loss = F.cross_entropy(model(images[rows]), labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()
