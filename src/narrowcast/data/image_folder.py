"""A folder of images as data; its sub-folders, in order of their names, are the classes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from narrowcast.data.preprocessing import Preprocessing
from narrowcast.errors import DataError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm")


class ImageFolder:
    """Images read batch by batch, as often as wanted.

    Args:
        folder: images in it, or one sub-folder per class.
        preprocessing: how they become inputs; there is no default that fits most models.
        batch_size: images per batch.
        limit: images to use; None uses all.

    Raises:
        DataError: there is no such folder or no image in it, or Pillow is not installed; while iterating for an image
            that cannot be read, or images of different sizes.
    """

    def __init__(
        self, folder: str | Path, preprocessing: Preprocessing, *, batch_size: int = 32, limit: int | None = None
    ) -> None:
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"{folder} is not a folder; give one with images, or with a sub-folder per class")
        self.preprocessing, self.batch_size = preprocessing, batch_size
        classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        files = [(path, label) for label, name in enumerate(classes) for path in _images(name)]
        self.labelled = bool(files)
        self.files = (files or [(path, 0) for path in _images(folder)])[:limit]
        if not self.files:
            raise DataError(f"folder {folder} holds no image ({', '.join(SUFFIXES)})")
        try:
            import PIL  # noqa: F401
        except ImportError:
            raise DataError("a folder of images needs Pillow: pip install pillow; or save the images as .npz") from None

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.files), self.batch_size):
            yield self._batch(self.files[start : start + self.batch_size])

    def __len__(self) -> int:
        return len(self.files)

    def take(self, rows: Sequence[int]) -> Any:
        """The batch of the images with these numbers."""
        return self._batch([self.files[row] for row in rows])

    def digest(self) -> str:
        """SHA-256 of the files' names, sizes and classes, and of how they are read; not of their pixels."""
        facts = [(path.name, path.stat().st_size, label) for path, label in self.files]
        return hashlib.sha256(repr((facts, self.preprocessing)).encode()).hexdigest()

    def _batch(self, rows: Sequence[tuple[Path, int]]) -> Any:
        images = self._images([path for path, _ in rows])
        return (images, torch.tensor([label for _, label in rows])) if self.labelled else images

    def _images(self, paths: list[Path]) -> Tensor:
        images = [_read(path, self.preprocessing) for path in paths]
        shapes = {tuple(image.shape) for image in images}
        if len(shapes) > 1:
            raise DataError(
                f"images have different sizes, for example {sorted(shapes)[:2]}; give --image-size, or side"
            )
        return self.preprocessing.of_pixels(torch.stack(images))


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)


def _read(path: Path, preprocessing: Preprocessing) -> Tensor:
    """One image, uint8 [channels, H, W]."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as file:
            image = file.convert("L" if preprocessing.order == "L" else "RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"image {path} cannot be read: {error}") from None
    side = preprocessing.side
    if side is not None:
        scale = side / min(image.size)
        width, height = (max(side, round(length * scale)) for length in image.size)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR).crop((left, top, left + side, top + side))
    pixels = np.atleast_3d(np.array(image))
    if preprocessing.order == "BGR":
        pixels = pixels[:, :, ::-1]
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
