"""Opening the DATA of a command line as something `narrowcast.data` reads: arrays, texts, images, or a factory."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from narrowcast.errors import DataError, ModelError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

DATA_HELP = (
    ".npz, .npy, .jsonl, .txt, a folder of images, or package.module:factory. An .npz holds `images`, `x` or `inputs` "
    "and perhaps `labels`, or arrays called like the model's arguments; a .jsonl texts, {text, label}, {sentence1, "
    "sentence2, score} or lists of numbers called like the model's arguments."
)
BatchOption = Annotated[int, typer.Option("--batch-size", help="Samples per batch.", min=1)]
LimitOption = Annotated[int | None, typer.Option("--limit", help="Use only the first so many samples.", min=1)]
TokenizerOption = Annotated[
    Path | None, typer.Option("--tokenizer", help="Directory of the tokenizer for texts; default: the model's own.")
]
MeanOption = Annotated[
    str, typer.Option("--mean", metavar="R,G,B", help="For 8-bit images: subtracted after division by 255.")
]
DeviationOption = Annotated[
    str, typer.Option("--std", metavar="R,G,B", help="For 8-bit images: divided by at the end.")
]
SideOption = Annotated[
    int | None, typer.Option("--image-size", help="Resize the shorter side of images, then cut the centre.", min=1)
]
INPUTS = ("images", "x", "inputs", "input")
ROWS_HASHED = 1024
TARGETS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class DataOptions:
    """What the options of a command say about its data.

    Args:
        batch_size: samples per batch.
        limit: samples to use; None uses all.
        tokenizer: directory of the tokenizer for texts, or None.
        mean: one number per channel; empty subtracts nothing.
        std: one number per channel; empty divides by nothing.
        side: side of images after resizing; None leaves them as they are.
    """

    batch_size: int = 32
    limit: int | None = None
    tokenizer: Path | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    side: int | None = None


def data_options(
    batch_size: int, limit: int | None, tokenizer: Path | None, mean: str, std: str, side: int | None
) -> DataOptions:
    """The options, numbers read.

    Raises:
        DataError: --mean or --std is not a list of numbers, or a deviation is not positive.
    """
    deviations = _numbers("--std", std)
    if any(value <= 0 for value in deviations):
        raise DataError(f"--std {std!r}: standard deviations are greater than 0")
    return DataOptions(batch_size, limit, tokenizer, _numbers("--mean", mean), deviations, side)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = (math.nan,)
    if not all(math.isfinite(value) for value in values):
        raise DataError(f"{option} {text!r} is not a list of numbers like 0.485,0.456,0.406")
    return values


class ArrayBatches:
    """Batches of arrays that lie in memory or in a mapped file, cut and converted one at a time, as often as wanted.

    Args:
        inputs: one array, or several by the names of the model's arguments; all [samples, ...].
        targets: [samples, ...], or None.
        options: batch size, limit, normalisation of images.
    """

    def __init__(self, inputs: Any, targets: np.ndarray | None, options: DataOptions) -> None:
        self.inputs, self.targets, self.options = inputs, targets, options
        first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
        self.samples = min(len(first), options.limit or len(first))

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, self.samples, self.options.batch_size):
            yield self._batch(slice(start, min(start + self.options.batch_size, self.samples)))

    def __len__(self) -> int:
        return self.samples

    def take(self, rows: Sequence[int]) -> Any:
        """The batch of the samples with these numbers."""
        return self._batch(list(rows))

    def digest(self) -> str:
        """SHA-256 of everything that a batch depends on."""
        named = self.inputs if isinstance(self.inputs, Mapping) else {"": self.inputs}
        parts = [*named.items(), *([] if self.targets is None else [("targets", self.targets)])]
        found = hashlib.sha256(f"{self.samples} {self.options.mean} {self.options.std}".encode())
        for name, array in parts:
            found.update(f"{name} {array.dtype} {array.shape[1:]}".encode())
            for start in range(0, self.samples, ROWS_HASHED):
                found.update(array[start : min(start + ROWS_HASHED, self.samples)].tobytes())
        return found.hexdigest()

    def _batch(self, rows: slice | list[int]) -> Any:
        targets = None if self.targets is None else _integers(self.targets[rows])
        if isinstance(self.inputs, Mapping):
            batch: Any = {name: to_input(array[rows], self.options) for name, array in self.inputs.items()}
            return batch if targets is None else batch | {"labels": targets}
        values = to_input(self.inputs[rows], self.options)
        return values if targets is None else (values, targets)


def open_data(text: str, options: DataOptions, *, model: str) -> Any:
    """The data that `text` names.

    Args:
        text: as typed.
        options: of the command.
        model: the MODEL of the command, whose directory may hold a tokenizer.

    Raises:
        DataError: it does not exist, cannot be read, or does not hold samples.
    """
    from narrowcast.cli.image_folder import ImageFolder
    from narrowcast.cli.sources import is_object
    from narrowcast.cli.text_files import open_jsonl, open_text

    path = Path(text)
    if is_object(text):
        return _from_factory(text, options)
    if path.is_dir():
        return ImageFolder(path, options)
    if not path.is_file():
        raise DataError(f"data {text!r} does not exist; pass {DATA_HELP}")
    readers = {".npz": _open_npz, ".npy": _open_npy}
    suffix = path.suffix.lower()
    if suffix in readers:
        return readers[suffix](path, options)
    if suffix == ".txt":
        return open_text(path, options, model)
    if suffix == ".jsonl":
        return open_jsonl(path, options, model)
    raise DataError(f"data {text!r}: files ending in {suffix or 'nothing'!r} are not known; pass {DATA_HELP}")


def _from_factory(text: str, options: DataOptions) -> Any:
    """What a function without arguments returns, or the object itself where it is data and no function."""
    from narrowcast.cli.sources import import_object

    if options.limit:
        raise DataError("--limit works on files; let the factory return fewer samples")
    try:
        found = import_object(text)
    except ModelError as error:
        raise DataError(f"data: {error}") from None
    return found() if callable(found) else found


def _open_npy(path: Path, options: DataOptions) -> ArrayBatches:
    import numpy as np

    _check_header(path)
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    return ArrayBatches(_samples(path, path.stem, array), None, options)


def _open_npz(path: Path, options: DataOptions) -> ArrayBatches:
    """One of INPUTS, or the only array beside targets, by position; several arrays by their names."""
    import numpy as np

    names = _check_header(path)
    with np.load(path, allow_pickle=False) as archive:
        target = next((name for name in TARGETS if name in names), None)
        inputs = [name for name in names if name not in TARGETS]
        known = [name for name in inputs if name in INPUTS]
        chosen = known[:1] or inputs
        if not chosen:
            raise DataError(f"{path} holds no input, only {', '.join(names)}; call one array images, x or inputs")
        arrays = {name: _samples(path, name, archive[name]) for name in chosen}
        labels = None if target is None else _samples(path, target, archive[target])
    sizes = {
        name: len(array) for name, array in {**arrays, **({} if labels is None else {str(target): labels})}.items()
    }
    if len(set(sizes.values())) > 1:
        raise DataError(f"{path}: its arrays have different numbers of samples: {sizes}")
    return ArrayBatches(arrays[chosen[0]] if len(chosen) == 1 else arrays, labels, options)


def _check_header(path: Path) -> list[str]:
    from narrowcast.cli.headers import numpy_entries
    from narrowcast.errors import CheckpointError

    try:
        return [entry.name for entry in numpy_entries(path)]
    except CheckpointError as error:
        raise DataError(str(error)) from None


def _samples(path: Path, name: str, array: np.ndarray) -> np.ndarray:
    """`array` after a look at whether it can be samples."""
    if array.dtype.kind not in "fiub":
        raise DataError(f"{path}: array {name!r} is of {array.dtype}, not of numbers")
    if array.ndim == 0 or array.size == 0:
        raise DataError(f"{path}: array {name!r} has the shape {list(array.shape)}; it holds no samples")
    return array


def to_input(array: np.ndarray, options: DataOptions) -> Tensor:
    """An array as a model takes it.

    8-bit images [N, H, W, C] become float32 [N, C, H, W] in 0..1, normalised by mean and deviation; other 8-bit arrays
    of four dimensions are divided likewise; integers become int64; floats float32.
    """
    import numpy as np
    import torch

    if array.dtype == np.uint8 and array.ndim == 4:
        images = torch.from_numpy(np.ascontiguousarray(array))
        if array.shape[-1] in (1, 3, 4):
            images = images.permute(0, 3, 1, 2)
        return normalize(images.float() / 255, options)
    if array.dtype.kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    return torch.from_numpy(np.array(array, dtype=bool if array.dtype.kind == "b" else np.float32))


def normalize(images: Tensor, options: DataOptions) -> Tensor:
    """Images [N, C, H, W] minus mean, divided by deviation, channel by channel; contiguous.

    Raises:
        DataError: --mean or --std does not have one number per channel.
    """
    import torch

    for option, values in (("--mean", options.mean), ("--std", options.std)):
        if values and len(values) not in (1, images.shape[1]):
            raise DataError(f"{option} has {len(values)} numbers, the images have {images.shape[1]} channels")
        if values:
            each = torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)
            images = images - each if option == "--mean" else images / each
    return images.contiguous()


def _integers(array: np.ndarray) -> Tensor:
    import numpy as np
    import torch

    return torch.from_numpy(np.array(array, dtype=np.int64 if array.dtype.kind in "iub" else np.float32))
