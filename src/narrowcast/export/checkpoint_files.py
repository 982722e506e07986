"""Writing a directory so that it is either there in full or not at all, and the one file that holds the tensors."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from narrowcast.errors import CheckpointError
from narrowcast.export.checkpoint_schema import DESCRIPTION, DTYPES, FILES, WEIGHTS

_ALIGNMENT = 64  # bytes: a cache line, so that no vector load of a mapped weight row straddles two
_LARGEST_HEADER = 100_000_000  # bytes, the limit of the safetensors format
_HASH_CHUNK = 1 << 22


def foreign_to_checkpoint(directory: Path) -> list[str] | None:
    """Names in a directory that are not a checkpoint's; None where it is no checkpoint."""
    if not (directory / DESCRIPTION).exists():
        return None
    return sorted(path.name for path in directory.iterdir() if path.name not in FILES or path.is_dir())


@contextmanager
def staged(
    directory: Path, *, foreign: Callable[[Path], list[str] | None] = foreign_to_checkpoint,
    what: str = "narrowcast checkpoint",
) -> Iterator[Path]:  # fmt: skip
    """A fresh directory beside `directory` that takes its place when the block ends, and vanishes when it raises.

    Args:
        directory: where the checkpoint is to be; absent, empty, or of the same kind, which is replaced.
        foreign: tells what in a directory is not of this kind; None where it is not of this kind at all.
        what: the kind, for messages.

    Yields:
        The directory to write into.

    Raises:
        CheckpointError: `directory` holds anything that narrowcast did not write, or the disk refuses.
    """
    target = directory.resolve()  # a link to a directory stays a link, the directory behind it is replaced
    refuse_foreign(target, foreign, what)
    token = secrets.token_hex(6)
    staging = target.with_name(f".{target.name}.{token}.new")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        for path in [*staging.rglob("*"), staging]:
            _flush(path)
        _take_place(staging, target, target.with_name(f".{target.name}.{token}.old"))
        _flush(target.parent)
    except OSError as error:
        raise CheckpointError(f"{directory}: cannot be written ({error}); nothing was left behind") from error
    finally:
        if staging.exists():
            shutil.rmtree(staging, ignore_errors=True)


def refuse_foreign(target: Path, foreign: Callable[[Path], list[str] | None], what: str) -> None:
    """Raise CheckpointError where a directory holds anything that would be lost; arguments as those of `staged`."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise CheckpointError(f"{target}: expected a directory or nothing, there is a file; choose another place")
    if next(target.iterdir(), None) is None:
        return
    found = foreign(target)
    if found is None:
        raise CheckpointError(f"{target}: is not empty and not a {what}; choose another directory")
    if found:
        raise CheckpointError(
            f"{target}: the {what} there would be replaced, but the directory also holds {found[:5]}; "
            "move them away or choose another directory"
        )


def _take_place(staging: Path, target: Path, aside: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    target.rename(aside)
    try:
        staging.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)  # the new checkpoint is in place; a left-over is only untidy


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The elements of a tensor in row-major order as bytes, without a copy where they already lie so."""
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().data


def write_weights(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file in which large tensors begin at a multiple of 64 bytes.

    The format allows no gaps between tensors. Those whose size is a multiple of 64 bytes come first, behind a
    header padded likewise, so all of them are aligned; the rest follows, wide elements before narrow ones.

    Args:
        path: the file to write.
        tensors: every tensor once, by name.

    Returns:
        The entry of the file in the description: bytes, sha256, header_sha256.
    """
    names = sorted(tensors, key=lambda name: _place(tensors[name], name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "written_by": "narrowcast"}}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPES[tensor.dtype][1],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        start = memoryview(len(text).to_bytes(8, "little") + text)
        for raw in chain([start], (tensor_bytes(tensors[name]) for name in names)):
            file.write(raw)
            digest.update(raw)
    return {
        "bytes": 8 + len(text) + offset,
        "sha256": digest.hexdigest(),
        "header_sha256": hashlib.sha256(text).hexdigest(),
    }


def _place(tensor: Tensor, name: str) -> tuple[bool, int, str]:
    size = tensor.numel() * tensor.element_size()
    return size % _ALIGNMENT != 0, -tensor.element_size(), name


def file_entry(path: Path) -> dict[str, Any]:
    """The entry of an ordinary file in the description: bytes, sha256."""
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_HASH_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def open_weights(path: Path, description: dict[str, Any]) -> Callable[[str], Tensor]:
    """Map the tensor file and check all of it that can be checked without reading the weights.

    Args:
        path: the safetensors file.
        description: validated; says which tensors there are.

    Returns:
        A function from the name of a tensor to the tensor, which is a view of the mapped file (copy on write).

    Raises:
        CheckpointError: missing, truncated or damaged, or its tensors are not the described ones.
    """
    entry = description["files"][WEIGHTS]
    _check_header(path, entry)
    try:
        opened = safe_open(path, framework="pt", device="cpu")
        names = set(opened.keys())  # type: ignore[no-untyped-call]
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not a valid safetensors file ({error}); copy or save it again") from error
    expected = description["tensors"].keys()
    if names != expected:
        odd = sorted(names ^ expected)[:5]
        raise CheckpointError(f"{path}: its tensors are not those of {DESCRIPTION}; {odd!r:.500} is in one only")
    tensors: dict[str, Tensor] = {}
    for name, wanted in description["tensors"].items():
        tensors[name] = _mapped(opened, name, wanted, path)
    return tensors.__getitem__


def _check_header(path: Path, entry: dict[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; the checkpoint is incomplete")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size != entry["bytes"]:
                raise CheckpointError(f"{path}: expected {entry['bytes']:,} bytes, got {size:,}; copy or save it again")
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length) if length <= min(size, _LARGEST_HEADER) else b""
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if hashlib.sha256(header).hexdigest() != entry.get("header_sha256"):
        raise CheckpointError(f"{path}: its header is not the one that {DESCRIPTION} describes; copy or save it again")


def _mapped(opened: Any, name: str, wanted: dict[str, Any], path: Path) -> Tensor:
    try:
        tensor: Tensor = opened.get_tensor(name)
    except (SafetensorError, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: tensor {name!r:.200} cannot be read ({error})") from error
    dtype = DTYPES[tensor.dtype][0] if tensor.dtype in DTYPES else str(tensor.dtype)
    got = {"dtype": dtype, "shape": list(tensor.shape)}
    for key, value in got.items():
        if value != wanted[key]:
            raise CheckpointError(f"{path}: tensor {name!r:.200} has {key} {value}, {DESCRIPTION} says {wanted[key]}")
    return tensor
