"""How stored images become what a model was trained on; declared by the user, never guessed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from narrowcast.errors import DataError

LAYOUTS = ("NCHW", "NHWC")
ORDERS = ("RGB", "BGR", "L")


@dataclass(frozen=True)
class Preprocessing:
    """value = (pixel / divisor - mean) / std, channel by channel.

    Args:
        side: the shorter side is resized to it, then the centre is cut; None leaves images as they are.
        mean: one number per channel, or one for all; empty subtracts nothing.
        std: one number per channel, or one for all, greater than 0; empty divides by nothing.
        divisor: of 8-bit pixels: 255 for 0..1, 1 for 0..255.
        layout: "NCHW" as PyTorch has it, "NHWC" as TensorFlow has it.
        order: of the channels of image files: "RGB", "BGR" as OpenCV reads them, or "L" for one of grey.

    Raises:
        DataError: a number or a word is none of these.
    """

    side: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    divisor: float = 255.0
    layout: str = "NCHW"
    order: str = "RGB"

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS or self.order not in ORDERS:
            raise DataError(
                f"layout {self.layout!r} and order {self.order!r} of images: use one of {', '.join(LAYOUTS)} and one "
                f"of {', '.join(ORDERS)}"
            )
        if not self.divisor > 0 or any(not value > 0 for value in self.std):
            raise DataError(f"divisor {self.divisor} and std {self.std} of images must be greater than 0")
        if self.side is not None and self.side < 1:
            raise DataError(f"side {self.side} of images must be at least 1")

    def of_pixels(self, images: Tensor) -> Tensor:
        """8-bit images [N, C, H, W] as float32 in `layout`, normalised.

        Raises:
            DataError: `mean` or `std` has not one number per channel.
        """
        return self.normalize(images.float() / self.divisor)

    def normalize(self, images: Tensor) -> Tensor:
        """Float images [N, C, H, W] minus mean, by deviation, in `layout`; contiguous.

        Raises:
            DataError: `mean` or `std` has not one number per channel.
        """
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values and len(values) not in (1, images.shape[1]):
                raise DataError(f"--{name} has {len(values)} numbers, the images have {images.shape[1]} channels")
            if values:
                each = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
                images = images - each if name == "mean" else images / each
        return (images if self.layout == "NCHW" else images.permute(0, 2, 3, 1)).contiguous()

    def of_array(self, array: np.ndarray) -> Tensor:
        """An array [N, ...] as a model takes it.

        8-bit arrays of four axes are images, [N, H, W, C] where the last axis has 1, 3 or 4 entries, else
        [N, C, H, W]; other integers become int64, bools stay, floats become float32.
        """
        if array.dtype == np.uint8 and array.ndim == 4:
            images = torch.from_numpy(np.array(array, order="C"))
            return self.of_pixels(images.permute(0, 3, 1, 2) if array.shape[-1] in (1, 3, 4) else images)
        if array.dtype.kind in "iu":
            return torch.from_numpy(array.astype(np.int64))
        return torch.from_numpy(np.array(array, dtype=bool if array.dtype.kind == "b" else np.float32))
