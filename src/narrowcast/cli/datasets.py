"""Opening the DATA of a command line as something `narrowcast.data` reads: arrays, texts, images, or a factory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from narrowcast.errors import DataError, ModelError

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
LayoutOption = Annotated[
    str, typer.Option("--image-layout", metavar="NCHW|NHWC", help="Order of the axes that the model takes images in.")
]


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
        layout: "NCHW" or "NHWC".
    """

    batch_size: int = 32
    limit: int | None = None
    tokenizer: Path | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    side: int | None = None
    layout: str = "NCHW"


def data_options(
    batch_size: int, limit: int | None, tokenizer: Path | None, mean: str, std: str, side: int | None,
    layout: str = "NCHW",
) -> DataOptions:  # fmt: skip
    """The options, numbers read.

    Raises:
        DataError: --mean or --std is not a list of numbers, or a deviation is not positive.
    """
    deviations = _numbers("--std", std)
    if any(value <= 0 for value in deviations):
        raise DataError(f"--std {std!r}: standard deviations are greater than 0")
    return DataOptions(batch_size, limit, tokenizer, _numbers("--mean", mean), deviations, side, layout)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        values = (math.nan,)
    if not all(math.isfinite(value) for value in values):
        raise DataError(f"{option} {text!r} is not a list of numbers like 0.485,0.456,0.406")
    return values


def open_data(text: str, options: DataOptions, *, model: str) -> Any:
    """The data that `text` names.

    Args:
        text: as typed.
        options: of the command.
        model: the MODEL of the command, whose directory may hold a tokenizer.

    Raises:
        DataError: it does not exist, cannot be read, or does not hold samples.
    """
    from narrowcast.cli.sources import is_object
    from narrowcast.cli.text_files import open_jsonl, open_text
    from narrowcast.data import ImageFolder, Preprocessing, open_arrays

    path = Path(text)
    if is_object(text):
        return _from_factory(text, options)
    images = Preprocessing(options.side, options.mean, options.std, layout=options.layout)
    if path.is_dir():
        return ImageFolder(path, images, batch_size=options.batch_size, limit=options.limit)
    if not path.is_file():
        raise DataError(f"data {text!r} does not exist; pass {DATA_HELP}")
    suffix = path.suffix.lower()
    if suffix in (".npz", ".npy"):
        return open_arrays(path, images, batch_size=options.batch_size, limit=options.limit)
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
