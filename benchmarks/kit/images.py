"""Image classifiers of the kit: reading uint8 images, turning them into network input, and their metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.kit.base import Scores

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Prepare = Callable[[Tensor], Tensor]


@lru_cache(maxsize=4)
def read_images(path: Path) -> tuple[Tensor, Tensor]:
    """Images [N, H, W, 3] uint8 and labels [N] int64 of one .npz file."""
    with np.load(path) as arrays:
        return torch.from_numpy(arrays["images"]), torch.from_numpy(arrays["labels"].astype(np.int64))


def to_unit_range(images: Tensor) -> Tensor:
    """Images [N, H, W, 3] in 0..255 as a contiguous float32 [N, 3, H, W] in 0..1."""
    return images.permute(0, 3, 1, 2).float().div(255.0).contiguous()


def normalize(images: Tensor) -> Tensor:
    """Images [N, H, W, 3] in 0..255 as float32 [N, 3, H, W] with ImageNet's mean and standard deviation removed."""
    mean = torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)
    return (to_unit_range(images) - mean) / std


def image_batches(path: Path, prepare: Prepare, samples: slice, size: int = 100) -> Iterator[Tensor]:
    """The chosen images as network input, `size` at a time."""
    for images in read_images(path)[0][samples].split(size):
        yield prepare(images)


def classification_scores(logits: Tensor, labels: Tensor, top: tuple[int, ...] = (1,)) -> Scores:
    """Percentage of rows whose label is among the k largest logits, for every k in `top`.

    Args:
        logits: [rows, classes].
        labels: [rows] int64.
        top: the values of k.

    Returns:
        {"top1": ..., "top5": ...} for the values asked for.
    """
    ranked = logits.topk(max(top), dim=1).indices
    hits = ranked == labels.unsqueeze(1)
    return {f"top{k}": 100.0 * hits[:, :k].any(1).double().mean().item() for k in top}
