"""ResNet-20 for CIFAR-10 (He et al. 2015, arXiv:1512.03385, section 4.2) with parameter-free shortcuts."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.kit.base import Batch, KitModel, Scores, build_copied, collect, data_folder, load_mapped, on_meta
from benchmarks.kit.images import classification_scores, image_batches, normalize, read_images

CALIBRATION = slice(0, 256)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut that subsamples and zero-pads channels where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        """A block from `inputs` to `outputs` channels."""
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.extra = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.stride != 1:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra, self.extra))
        return F.relu(y + x)


def _stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        BasicBlock(inputs, outputs, stride), BasicBlock(outputs, outputs, 1), BasicBlock(outputs, outputs, 1)
    )


class ResNet20(nn.Module):
    """20 weight layers, 270 thousand parameters."""

    def __init__(self, classes: int = 10) -> None:
        """A network with `classes` outputs."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1)
        self.layer2 = _stage(16, 32, 2)
        self.layer3 = _stage(32, 64, 2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 32, 32] -> logits [B, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def weights() -> Path:
    """The float32 checkpoint."""
    return data_folder("resnet20_cifar10") / "model.safetensors"


def build() -> nn.Module:
    """The trained network, eval mode."""
    return build_copied(ResNet20, weights())


def _images(split: str) -> Path:
    return data_folder("resnet20_cifar10") / f"cifar10_{split}_5000.npz"


def calibration() -> list[Batch]:
    """256 training images in batches of 64."""
    return list(image_batches(_images("train"), normalize, CALIBRATION, 64))


def outputs(model: nn.Module, samples: slice) -> Tensor:
    """Logits [N, 10] of the chosen test images."""
    return collect(model, image_batches(_images("test"), normalize, samples, 250))


def scores(logits: Tensor, samples: slice) -> Scores:
    """Top-1 accuracy in percent."""
    return classification_scores(logits, read_images(_images("test"))[1][samples])


def example(shape: tuple[int, ...]) -> Tensor:
    """The first `shape[0]` test images as network input."""
    return normalize(read_images(_images("test"))[0][: shape[0]])


KIT = KitModel(
    name="resnet20",
    kind="cnn",
    metric="top1",
    architecture=ResNet20,
    weights=weights,
    load=partial(load_mapped, ResNet20),
    skeleton=partial(on_meta, ResNet20),
    build=build,
    calibration=calibration,
    outputs=outputs,
    scores=scores,
    example=example,
    sets={"all": slice(0, 5000), "held_out": slice(0, 5000), "quick": slice(0, 1000)},
    shapes=((1,), (32,)),
    published={"all": {"top1": 91.56}},
)
