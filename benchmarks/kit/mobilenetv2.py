"""MobileNetV2 1.0 (Sandler et al. 2018, arXiv:1801.04381), ImageNet backbone with folded BatchNorm, CIFAR-10 head."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.kit.base import Batch, KitModel, Scores, build_copied, collect, data_folder, load_mapped, on_meta
from benchmarks.kit.images import classification_scores, image_batches, normalize, read_images

CALIBRATION = slice(0, 256)
STAGES = (  # expansion, outputs, repeats, stride of the first repeat
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """Widen by a 1x1, filter by a depthwise 3x3, narrow by a linear 1x1; add the input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        """A block from `inputs` to `outputs` channels through `inputs * expansion`."""
        super().__init__()
        hidden = inputs * expansion
        if expansion != 1:
            self.expand = nn.Conv2d(inputs, hidden, 1)
        self.dw = nn.Conv2d(hidden, hidden, 3, stride=stride, padding=1, groups=hidden)
        self.project = nn.Conv2d(hidden, outputs, 1)
        self.expansion = expansion
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        y = F.relu6(self.expand(x)) if self.expansion != 1 else x
        y = self.project(F.relu6(self.dw(y)))
        return x + y if self.residual else y


class MobileNetV2(nn.Module):
    """A stem, 17 inverted residuals, a wide 1x1 and a linear head."""

    def __init__(self, classes: int = 10) -> None:
        """A network with `classes` outputs."""
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, stride=2, padding=1)
        blocks: list[nn.Module] = []
        inputs = 32
        for expansion, outputs, repeats, stride in STAGES:
            for repeat in range(repeats):
                blocks.append(InvertedResidual(inputs, outputs, stride if repeat == 0 else 1, expansion))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Conv2d(320, 1280, 1)
        self.classifier = nn.Linear(1280, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 112, 112] -> logits [B, classes]."""
        x = F.relu6(self.stem(x))
        x = F.relu6(self.last(self.blocks(x)))
        return self.classifier(x.mean((2, 3)))


def weights() -> Path:
    """The float32 checkpoint."""
    return data_folder("mobilenetv2_cifar10") / "model.safetensors"


def build() -> nn.Module:
    """The trained network, eval mode."""
    return build_copied(MobileNetV2, weights())


def _images(split: str) -> Path:
    return data_folder("resnet20_cifar10") / f"cifar10_{split}_5000.npz"


def prepare(images: Tensor) -> Tensor:
    """CIFAR images [N, 32, 32, 3] enlarged to 112 x 112 (bilinear, in 0..255), then normalized, [N, 3, 112, 112]."""
    enlarged = F.interpolate(images.permute(0, 3, 1, 2).float(), size=112, mode="bilinear", align_corners=False)
    return normalize(enlarged.permute(0, 2, 3, 1))


def calibration() -> list[Batch]:
    """256 training images in batches of 32."""
    return list(image_batches(_images("train"), prepare, CALIBRATION, 32))


def outputs(model: nn.Module, samples: slice) -> Tensor:
    """Logits [N, 10] of the chosen test images."""
    return collect(model, image_batches(_images("test"), prepare, samples, 50))


def scores(logits: Tensor, samples: slice) -> Scores:
    """Top-1 accuracy in percent."""
    return classification_scores(logits, read_images(_images("test"))[1][samples])


def example(shape: tuple[int, ...]) -> Tensor:
    """The first `shape[0]` test images as network input."""
    return prepare(read_images(_images("test"))[0][: shape[0]])


KIT = KitModel(
    name="mobilenetv2",
    kind="cnn",
    metric="top1",
    architecture=MobileNetV2,
    weights=weights,
    load=partial(load_mapped, MobileNetV2),
    skeleton=partial(on_meta, MobileNetV2),
    build=build,
    calibration=calibration,
    outputs=outputs,
    scores=scores,
    example=example,
    sets={"all": slice(0, 2000), "held_out": slice(0, 2000), "quick": slice(0, 500)},
    shapes=((1,), (32,)),
    published={"all": {"top1": 77.70}, "quick": {"top1": 77.6}},
)
