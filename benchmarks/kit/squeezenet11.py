"""SqueezeNet 1.1 for ImageNet (Iandola et al. 2016, arXiv:1602.07360): concatenated branches, no BatchNorm."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.kit.base import Batch, KitModel, Scores, build_copied, collect, data_folder, load_mapped, on_meta
from benchmarks.kit.images import classification_scores, image_batches, normalize, read_images

CALIBRATION = slice(0, 200)


class Fire(nn.Module):
    """Squeeze by a 1x1, expand by a 1x1 and a 3x3 side by side."""

    def __init__(self, inputs: int, squeezed: int, expanded: int) -> None:
        """A module from `inputs` to twice `expanded` channels."""
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeezed, 1)
        self.expand1x1 = nn.Conv2d(squeezed, expanded, 1)
        self.expand3x3 = nn.Conv2d(squeezed, expanded, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, 2 * expanded, H, W]."""
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))], dim=1)


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1, 1.2 million parameters."""

    def __init__(self, classes: int = 1000) -> None:
        """A network with `classes` outputs."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, stride=2)
        self.fire2 = Fire(64, 16, 64)
        self.fire3 = Fire(128, 16, 64)
        self.fire4 = Fire(128, 32, 128)
        self.fire5 = Fire(256, 32, 128)
        self.fire6 = Fire(256, 48, 192)
        self.fire7 = Fire(384, 48, 192)
        self.fire8 = Fire(384, 64, 256)
        self.fire9 = Fire(512, 64, 256)
        self.conv10 = nn.Conv2d(512, classes, 1)
        self.pool = nn.MaxPool2d(3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 224, 224] -> logits [B, classes]; the published network ends in a ReLU before the average."""
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(self.fire3(self.fire2(x)))
        x = self.pool(self.fire5(self.fire4(x)))
        x = self.fire9(self.fire8(self.fire7(self.fire6(x))))
        return F.relu(self.conv10(x)).mean((2, 3))


def weights() -> Path:
    """The float32 checkpoint."""
    return data_folder("squeezenet11_imagenet") / "model.safetensors"


def build() -> nn.Module:
    """The trained network, eval mode."""
    return build_copied(SqueezeNet, weights())


def _images() -> Path:
    return data_folder("squeezenet11_imagenet") / "imagenet_500.npz"


def calibration() -> list[Batch]:
    """The first 200 images in batches of 20."""
    return list(image_batches(_images(), normalize, CALIBRATION, 20))


def outputs(model: nn.Module, samples: slice) -> Tensor:
    """Logits [N, 1000] of the chosen images."""
    return collect(model, image_batches(_images(), normalize, samples, 25))


def scores(logits: Tensor, samples: slice) -> Scores:
    """Top-1 and top-5 accuracy in percent."""
    return classification_scores(logits, read_images(_images())[1][samples], top=(1, 5))


def example(shape: tuple[int, ...]) -> Tensor:
    """`shape[0]` images that calibration does not see, as network input."""
    return normalize(read_images(_images())[0][CALIBRATION.stop :][: shape[0]])


KIT = KitModel(
    name="squeezenet11",
    kind="cnn",
    metric="top1",
    architecture=SqueezeNet,
    weights=weights,
    load=partial(load_mapped, SqueezeNet),
    skeleton=partial(on_meta, SqueezeNet),
    build=build,
    calibration=calibration,
    outputs=outputs,
    scores=scores,
    example=example,
    sets={"all": slice(0, 500), "held_out": slice(200, 500), "quick": slice(200, 300)},
    shapes=((1,), (32,)),
    published={"all": {"top1": 61.8, "top5": 84.2}, "held_out": {"top1": 60.0, "top5": 83.0}},
)
