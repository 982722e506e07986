"""What is in a file of tensors, read from its header alone: safetensors, .npy and .npz.

Every number in a header is checked against the file before it is believed; nothing is unpickled, no tensor is loaded.
Files that can only be read by unpickling are refused with the remedy.
"""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from narrowcast.errors import CheckpointError, ModelError

HEADER_LIMIT = 100_000_000  # bytes; the safetensors library's own limit
TENSOR_LIMIT = 1_000_000
RANK_LIMIT = 64

# Bits of one element of every dtype that safetensors knows.
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E5M2FNUZ": 8, "F8_E4M3FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "F64": 64, "I64": 64, "U64": 64,
    "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
_READABLE = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "BOOL": "bool", "U8": "uint8",
    "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32", "I64": "int64", "U64": "uint64",
    "F8_E4M3": "float8_e4m3", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0",
}  # fmt: skip
PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".th")


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file.

    Args:
        name: its key.
        dtype: as torch and numpy spell it.
        shape: its dimensions.
        bytes: what it takes in the file.
        file: name of the file, where there are several.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    file: str = ""

    @property
    def is_float(self) -> bool:
        """Whether the elements are floating-point numbers."""
        return "float" in self.dtype


def refuse_pickle(path: Path) -> None:
    """Stop before a file that only unpickling could read, because unpickling runs code that the file brings.

    Raises:
        ModelError: the file name ends like a pickle.
    """
    if path.suffix.lower() in PICKLES:
        raise ModelError(
            f"{path} is a pickle, which can run any code when it is opened, so narrowcast never opens one; "
            "write it again as safetensors (safetensors.torch.save_file(state_dict, 'model.safetensors')) or give the "
            "model as package.module:factory"
        )


def safetensors_entries(path: Path) -> tuple[list[TensorEntry], dict[str, str]]:
    """The tensors of a safetensors file in file order, and its metadata.

    Raises:
        CheckpointError: the file is missing, truncated or inconsistent; the message says where.
    """
    header, size, start = _safetensors_header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ is not a table of texts; the file is damaged")
    if len(header) > TENSOR_LIMIT:
        raise CheckpointError(f"{path}: {len(header)} tensors are more than the {TENSOR_LIMIT} that are plausible")
    entries = (_entry(path, name, value, size - start) for name, value in header.items())
    placed = sorted(entries, key=lambda item: item[:2])
    position = 0
    for begin, end, entry in placed:
        if begin != position:
            kind = "overlaps the one before it" if begin < position else f"leaves a gap of {begin - position} bytes"
            raise CheckpointError(f"{path}: tensor {entry.name!r} {kind}; the file is damaged")
        position = end
    if position != size - start:
        raise CheckpointError(
            f"{path}: its header describes {position} bytes of tensors, the file has {size - start}; "
            "it is truncated or was written by something else"
        )
    return [entry for _, _, entry in placed], {str(key): value for key, value in metadata.items()}


def _safetensors_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """(parsed header, bytes of the file, offset of the first tensor)."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is not a file")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            raise CheckpointError(
                f"{path} is no safetensors file or is truncated: it has {size} bytes and announces a header of {length}"
            )
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}); the file is damaged") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a {type(header).__name__}, not a table of tensors")
    return header, size, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key stands twice")
    return table


def _entry(path: Path, name: str, value: Any, available: int) -> tuple[int, int, TensorEntry]:
    """(first byte, end, tensor) of one header entry, every number checked."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= set(value):
        raise CheckpointError(f"{where} lacks dtype, shape or data_offsets; the file is damaged")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in _BITS:
        raise CheckpointError(f"{where} has the unknown dtype {str(dtype)[:40]!r}; known: {', '.join(sorted(_BITS))}")
    if not _are_counts(shape) or len(shape) > RANK_LIMIT or not _are_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has a shape or offsets that are not whole numbers; the file is damaged")
    begin, end = offsets
    bits = prod(shape) * _BITS[dtype]
    if not begin <= end <= available:
        raise CheckpointError(f"{where} ends at byte {end} of {available}; the file is truncated or damaged")
    if bits != (end - begin) * 8:
        raise CheckpointError(f"{where}: {dtype} {shape} is {bits // 8} bytes, its offsets give {end - begin}")
    return begin, end, TensorEntry(name, _READABLE.get(dtype, dtype.lower()), tuple(shape), end - begin, path.name)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def directory_files(directory: Path) -> list[Path]:
    """The safetensors files of a Hugging Face directory, by its index where it has one.

    Raises:
        CheckpointError: the index is damaged or names a file outside the directory or one that is missing.
        ModelError: there are weights, but only as pickles.
    """
    from narrowcast.export.checkpoint_schema import read_json

    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise CheckpointError(f"{index}: weight_map is not a table of file names")
        files = [directory / name for name in sorted(set(names.values()))]
        for file in files:
            if file.parent != directory or not file.is_file():
                raise CheckpointError(f"{index} names {file.name!r}, which is not a file in {directory}")
        return files
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        for pickle in sorted(path for path in directory.iterdir() if path.suffix in PICKLES):
            refuse_pickle(pickle)
    return files


def numpy_entries(path: Path) -> list[TensorEntry]:
    """The arrays of a .npy or .npz file.

    Raises:
        CheckpointError: the file is missing, damaged, or an array holds Python objects.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist or is not a file")
    try:
        return list(_numpy_entries(path))
    except (ValueError, EOFError, OSError, zipfile.BadZipFile, NotImplementedError) as error:
        raise CheckpointError(f"{path} is not a readable numpy file: {error}") from None


def _numpy_entries(path: Path) -> Iterator[TensorEntry]:
    if path.suffix == ".npy":
        with path.open("rb") as file:
            yield _numpy_entry(path, path.stem, file, path.stat().st_size)
        return
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                with archive.open(member) as file:
                    yield _numpy_entry(path, member.filename.removesuffix(".npy"), file, member.file_size)


def _numpy_entry(path: Path, name: str, file: Any, size: int) -> TensorEntry:
    from numpy.lib import format as numpy_format

    version = numpy_format.read_magic(file)
    read = numpy_format.read_array_header_1_0 if version == (1, 0) else numpy_format.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise CheckpointError(f"{path}: array {name!r} holds Python objects, a pickle; save numbers only")
    count = prod(shape) * dtype.itemsize
    if file.tell() + count != size:
        there = size - file.tell()
        raise CheckpointError(f"{path}: array {name!r} is {count} bytes by its header, the file has {there}")
    return TensorEntry(name, str(dtype), tuple(int(side) for side in shape), count, path.name)
