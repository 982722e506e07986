"""MobileNetV1 x0.25 "person in the image?" (MLPerf Tiny): depthwise-separable, BatchNorm not folded, Keras padding."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from torch import Tensor, nn

from benchmarks.kit.base import Batch, KitModel, Scores, build_copied, collect, data_folder, load_mapped, on_meta
from benchmarks.kit.images import classification_scores, image_batches, read_images, to_unit_range

CALIBRATION = slice(0, 200)
BLOCKS = (  # inputs, outputs, stride of the depthwise convolution
    (8, 16, 1),
    (16, 32, 2),
    (32, 32, 1),
    (32, 64, 2),
    (64, 64, 1),
    (64, 128, 2),
    *((128, 128, 1),) * 5,
    (128, 256, 2),
    (256, 256, 1),
)


def _convolution(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU with TensorFlow's SAME padding: at stride 2 only the right and bottom edges grow."""
    padding = kernel // 2 if stride == 1 else 0
    conv = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, groups=groups)
    layers = [conv, nn.BatchNorm2d(outputs, eps=1e-3), nn.ReLU()]
    return nn.Sequential(*([nn.ZeroPad2d((0, 1, 0, 1))] if stride == 2 else []), *layers)


class MobileNetV1(nn.Module):
    """A stem and 13 pairs of a depthwise and a pointwise convolution."""

    def __init__(self, classes: int = 2) -> None:
        """A network with `classes` outputs."""
        super().__init__()
        self.stem = _convolution(3, 8, stride=2)
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(
                    _convolution(inputs, inputs, stride=stride, groups=inputs),
                    _convolution(inputs, outputs, kernel=1),
                )
                for inputs, outputs, stride in BLOCKS
            )
        )
        self.classifier = nn.Linear(256, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 96, 96] in 0..1 -> logits [B, classes]."""
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


def weights() -> Path:
    """The float32 checkpoint."""
    return data_folder("mobilenetv1_025_vww") / "model.safetensors"


def build() -> nn.Module:
    """The trained network, eval mode."""
    return build_copied(MobileNetV1, weights())


def _images() -> Path:
    return data_folder("mobilenetv1_025_vww") / "vww_1000.npz"


def calibration() -> list[Batch]:
    """The first 200 images in batches of 50."""
    return list(image_batches(_images(), to_unit_range, CALIBRATION, 50))


def outputs(model: nn.Module, samples: slice) -> Tensor:
    """Logits [N, 2] of the chosen images."""
    return collect(model, image_batches(_images(), to_unit_range, samples))


def scores(logits: Tensor, samples: slice) -> Scores:
    """Accuracy in percent."""
    return classification_scores(logits, read_images(_images())[1][samples])


def example(shape: tuple[int, ...]) -> Tensor:
    """`shape[0]` images that calibration does not see, as network input."""
    return to_unit_range(read_images(_images())[0][CALIBRATION.stop :][: shape[0]])


KIT = KitModel(
    name="mobilenetv1",
    kind="cnn",
    metric="top1",
    architecture=MobileNetV1,
    weights=weights,
    load=partial(load_mapped, MobileNetV1),
    skeleton=partial(on_meta, MobileNetV1),
    build=build,
    calibration=calibration,
    outputs=outputs,
    scores=scores,
    example=example,
    sets={"all": slice(0, 1000), "held_out": slice(200, 1000), "quick": slice(200, 500)},
    shapes=((1,), (32,)),
    published={"all": {"top1": 85.30}, "held_out": {"top1": 85.50}},
)
