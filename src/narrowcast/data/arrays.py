"""Arrays in memory or in .npz and .npy files, read batch by batch; of mapped files only the rows in use are read."""

from __future__ import annotations

import hashlib
import struct
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib import format as numpy_format
from torch import Tensor

from narrowcast.data.preprocessing import Preprocessing
from narrowcast.errors import DataError

INPUTS = ("images", "x", "inputs", "input")
TARGETS = ("labels", "label", "targets", "target", "y")
_ROWS_HASHED = 1024
# Of a local header in a zip file: its length, and where the lengths of name and extra field are.
_LOCAL_HEADER, _LENGTHS = 30, 26


class ArrayBatches:
    """Batches of arrays that lie in memory or in a mapped file, cut and converted one at a time, as often as wanted.

    Args:
        inputs: one array, or several by the names of the model's inputs; all [samples, ...].
        targets: [samples, ...], or None.
        preprocessing: of 8-bit images.
        batch_size: samples per batch.
        limit: samples to use; None uses all.
    """

    def __init__(
        self, inputs: Any, targets: np.ndarray | None = None, preprocessing: Preprocessing | None = None,
        *, batch_size: int = 32, limit: int | None = None,
    ) -> None:  # fmt: skip
        self.inputs, self.targets = inputs, targets
        self.preprocessing, self.batch_size = preprocessing or Preprocessing(), batch_size
        first = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
        self.samples = min(len(first), limit or len(first))

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, self.samples, self.batch_size):
            yield self._batch(slice(start, min(start + self.batch_size, self.samples)))

    def __len__(self) -> int:
        return self.samples

    def take(self, rows: Sequence[int]) -> Any:
        """The batch of the samples with these numbers."""
        return self._batch(list(rows))

    def digest(self) -> str:
        """SHA-256 of everything that a batch depends on."""
        named = self.inputs if isinstance(self.inputs, Mapping) else {"": self.inputs}
        parts = [*named.items(), *([] if self.targets is None else [("targets", self.targets)])]
        found = hashlib.sha256(f"{self.samples} {self.preprocessing}".encode())
        for name, array in parts:
            found.update(f"{name} {array.dtype} {array.shape[1:]}".encode())
            for start in range(0, self.samples, _ROWS_HASHED):
                found.update(array[start : min(start + _ROWS_HASHED, self.samples)].tobytes())
        return found.hexdigest()

    def _batch(self, rows: slice | list[int]) -> Any:
        targets = None if self.targets is None else _as_target(self.targets[rows])
        if isinstance(self.inputs, Mapping):
            batch: Any = {name: self.preprocessing.of_array(array[rows]) for name, array in self.inputs.items()}
            return batch if targets is None else batch | {"labels": targets}
        values = self.preprocessing.of_array(self.inputs[rows])
        return values if targets is None else (values, targets)


def _as_target(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.int64 if array.dtype.kind in "iub" else np.float32))


@dataclass(frozen=True)
class MappedArray:
    """An array in a file, of which only rows that are asked for are read.

    It is mapped anew for every row or slice: pages of a mapping that stays count as memory of the process.

    Args:
        path: of the file.
        dtype: of the numbers.
        shape: [samples, ...].
        offset: of the first number, in bytes.
        order: "C" or "F".
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    order: Any

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        whole = np.memmap(self.path, self.dtype, mode="r", offset=self.offset, shape=self.shape, order=self.order)
        return np.array(whole[rows])


def open_arrays(
    path: str | Path, preprocessing: Preprocessing | None = None, *, batch_size: int = 32, limit: int | None = None
) -> ArrayBatches:
    """The samples of a .npy or .npz file.

    One array beside targets is the model's only or first input, whatever it is called, and so is the one called
    images, x, inputs or input; several others go by the names of the model's inputs. Arrays called labels, label,
    targets, target or y are targets. A .npy file and the arrays of an uncompressed .npz are mapped, not read.

    Raises:
        DataError: the file is missing or damaged, or does not hold samples.
    """
    path = Path(path)
    found = _arrays_of(path)
    target = next((name for name in TARGETS if name in found), None) if path.suffix.lower() == ".npz" else None
    inputs = [name for name in found if target is None or name not in TARGETS]
    chosen = [name for name in inputs if name in INPUTS][:1] or inputs
    if not chosen:
        raise DataError(f"{path} holds no input, only {', '.join(found)}; call one array images, x or inputs")
    arrays = {name: _samples(path, name, found[name]) for name in chosen}
    labels = None if target is None else _samples(path, target, found[target])
    named = arrays if labels is None else arrays | {str(target): labels}
    sizes = {name: len(array) for name, array in named.items()}
    if len(set(sizes.values())) > 1:
        raise DataError(f"{path}: its arrays have different numbers of samples: {sizes}")
    inputs_given = arrays[chosen[0]] if len(chosen) == 1 else arrays
    return ArrayBatches(inputs_given, labels, preprocessing, batch_size=batch_size, limit=limit)


def _samples(path: Path, name: str, array: Any) -> Any:
    """`array` after a look at whether it can be samples."""
    if array.dtype.kind not in "fiub":
        raise DataError(f"{path}: array {name!r} is of {array.dtype}, not of numbers")
    if array.ndim == 0 or array.size == 0:
        raise DataError(f"{path}: array {name!r} has the shape {list(array.shape)}; it holds no samples")
    return array


def _arrays_of(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DataError(f"{path} does not exist or is not a file")
    try:
        if path.suffix.lower() != ".npz":
            with path.open("rb") as file:
                return {path.stem: _mapped(path, path.stem, file, path.stat().st_size, 0)}
        with zipfile.ZipFile(path) as archive:
            return {
                member.filename.removesuffix(".npy"): _member(path, archive, member)
                for member in archive.infolist()
                if member.filename.endswith(".npy")
            }
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, NotImplementedError, struct.error) as error:
        raise DataError(f"{path} is not a readable numpy file: {error}") from None


def _member(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Any:
    """One array of an archive: mapped where it lies there as it is, read where it is compressed."""
    name = member.filename.removesuffix(".npy")
    with archive.open(member) as file:
        if member.compress_type != zipfile.ZIP_STORED:
            shape, fortran, dtype = _header(path, name, file, member.file_size)
            array = np.frombuffer(file.read(prod(shape) * dtype.itemsize), dtype)
            return array.reshape(shape, order="F" if fortran else "C")
        with path.open("rb") as whole:
            whole.seek(member.header_offset)
            lengths = struct.unpack_from("<HH", whole.read(_LOCAL_HEADER), _LENGTHS)
        return _mapped(path, name, file, member.file_size, member.header_offset + _LOCAL_HEADER + sum(lengths))


def _mapped(path: Path, name: str, file: Any, size: int, start: int) -> Any:
    """The array whose header `file` begins with, and which begins at `start` of the file at `path`."""
    shape, fortran, dtype = _header(path, name, file, size)
    if prod(shape) == 0:  # nothing cannot be mapped
        return np.empty(shape, dtype)
    return MappedArray(path, dtype, shape, start + file.tell(), "F" if fortran else "C")


def _header(path: Path, name: str, file: Any, size: int) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and dtype, after a look at whether so many bytes are there.

    Raises:
        DataError: the array holds Python objects, or the file is shorter or longer than it says.
    """
    version = numpy_format.read_magic(file)
    read = numpy_format.read_array_header_1_0 if version == (1, 0) else numpy_format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject:
        raise DataError(f"{path}: array {name!r} holds Python objects, a pickle; save numbers only")
    count = prod(shape) * dtype.itemsize
    if file.tell() + count != size:
        raise DataError(f"{path}: array {name!r} is {count} bytes by its header, the file has {size - file.tell()}")
    return shape, fortran, dtype
