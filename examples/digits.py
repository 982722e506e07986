"""A small CNN for scikit-learn's handwritten digits: the model and the data of the other examples and of the README.

    python digits.py                 trains it in a few seconds and writes digits.safetensors

`digits:build`, `digits:calibration` and `digits:evaluation` are what the command line takes as a model and as data.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from sklearn.datasets import load_digits
from torch import Tensor, nn

WEIGHTS = Path("digits.safetensors")
TRAINING_SAMPLES = 1200


def network() -> nn.Module:
    """Three convolutions with BatchNorm and a linear layer; not trained."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 4 * 4, 10)),
    )


def samples(part: slice) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 8, 8] in 0..1 and labels [N], shuffled once and for all."""
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))[part]
    return torch.from_numpy(found.images).float().unsqueeze(1)[order] / 16, torch.from_numpy(found.target)[order]


def train(epochs: int = 4) -> nn.Module:
    """The trained network in evaluation mode."""
    torch.manual_seed(0)
    model = network().train()
    images, labels = samples(slice(TRAINING_SAMPLES))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            optimizer.step()
    return model.eval()


def build() -> nn.Module:
    """The trained network, from digits.safetensors in the current directory."""
    if not WEIGHTS.is_file():
        raise FileNotFoundError(f"{WEIGHTS} is not here; run `python digits.py` first")
    model = network()
    load_model(model, WEIGHTS)
    return model.eval()


def calibration() -> list[Tensor]:
    """256 training images in batches of 64; labels are not needed."""
    return list(samples(slice(256))[0].split(64))


def evaluation() -> tuple[Tensor, Tensor]:
    """597 images that training has not seen, with their labels."""
    return samples(slice(TRAINING_SAMPLES, None))


def main() -> None:
    model = train()
    save_model(model, str(WEIGHTS))
    images, labels = evaluation()
    with torch.inference_mode():
        correct = (model(images).argmax(1) == labels).float().mean().item()
    print(f"wrote {WEIGHTS}; {correct:.1%} of {len(labels)} unseen digits are right")


if __name__ == "__main__":
    main()
