"""The document `narrowcast.json`: its version, its fields, and the proof that it is whole.

It is read from files that nobody vouches for, so every field is checked here before anything else sees it. The
document carries the checksum of its own canonical text; a damaged byte is therefore an error and never another model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from narrowcast.errors import CheckpointError

FORMAT = "narrowcast"
VERSION = 2
DESCRIPTION = "narrowcast.json"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "preprocessor_config.json",
    "processor_config.json",
)
# every name that a checkpoint directory may hold; a directory with anything else is never replaced
FILES = frozenset({DESCRIPTION, WEIGHTS, CONFIG, GENERATION, *TOKENIZER_FILES})

# stored: parameters and persistent buffers; of float modules also constant: other buffers, attribute: plain tensors
ROLES = ("stored", "constant", "attribute")

# torch dtype -> (name in the description, name in the safetensors header)
DTYPES = {
    dtype: (str(dtype).removeprefix("torch."), name)
    for dtype, name in {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
        torch.complex64: "C64",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint64: "U64",
        torch.uint32: "U32",
        torch.uint16: "U16",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }.items()
}
DTYPE_NAMES = [name for name, _ in DTYPES.values()]

_LARGEST_DOCUMENT = 64 << 20  # bytes: a report of 50,000 layers takes about half
_LARGEST_NAME = 1024
_LARGEST_RANK = 16
_LARGEST_SIZE = 1 << 48  # elements along one dimension
_LARGEST_DEPTH = 100_000  # layers that any config may ask for


def seal(description: dict[str, Any]) -> dict[str, Any]:
    """The description with the checksum of everything else in it.

    Args:
        description: JSON values; a "checksum" that is already there is replaced.

    Returns:
        A new dictionary.
    """
    rest = {key: value for key, value in description.items() if key != "checksum"}
    return {**rest, "checksum": _checksum(rest)}


def _checksum(rest: dict[str, Any]) -> str:
    canonical = json.dumps(rest, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def to_json(description: dict[str, Any]) -> bytes:
    """The text of the file `narrowcast.json`."""
    return (json.dumps(description, indent=1, allow_nan=False) + "\n").encode()


def read_json(path: Path, largest: int = _LARGEST_DOCUMENT) -> dict[str, Any]:
    """A JSON object from a file that may be hostile.

    Args:
        path: the file.
        largest: bytes beyond which it is not read.

    Returns:
        The object.

    Raises:
        CheckpointError: not a regular file, too large, not UTF-8, not one JSON object, or a name twice.
    """
    raw = read_small(path, largest)
    try:
        # ValueError: bad text, bad JSON, bad number; RecursionError: brackets nested without end
        value = json.loads(raw.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a valid JSON document ({error}); copy or save it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_small(path: Path, largest: int = _LARGEST_DOCUMENT) -> bytes:
    """The bytes of a regular file of at most `largest` bytes.

    Raises:
        CheckpointError: the file is missing, not a regular file, unreadable or too large.
    """
    try:
        if not path.exists():
            raise CheckpointError(f"{path}: there is no such file; pass a directory that nc.save wrote")
        if not path.is_file():
            raise CheckpointError(f"{path}: expected a regular file")
        with path.open("rb") as file:
            raw = file.read(largest + 1)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if len(raw) > largest:
        raise CheckpointError(f"{path}: larger than {largest:,} bytes, which no checkpoint needs")
    return raw


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return result


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not a JSON number")


def refuse_absurd_depth(config: Any, where: str) -> None:
    """Refuse a config that asks for more layers than any model has, before something loops over them.

    Args:
        config: JSON values.
        where: what the message names.

    Raises:
        CheckpointError: an integer under a name with "layer" in it is beyond 100,000.
    """
    pending = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending += value
        if not isinstance(value, dict):
            continue
        for name, entry in value.items():
            if type(entry) is int and "layer" in name and entry > _LARGEST_DEPTH:
                raise CheckpointError(f"{where}: {name} = {entry:,}, expected at most {_LARGEST_DEPTH:,}")
            pending.append(entry)


def validate(description: dict[str, Any], path: Path) -> dict[str, Any]:
    """The description itself, after every field has been checked.

    Args:
        description: the JSON object of the file.
        path: the file, for messages.

    Returns:
        `description`.

    Raises:
        CheckpointError: another format or version, a wrong checksum, a missing, unknown or malformed field.
    """
    if description.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a narrowcast checkpoint (format {description.get('format')!r:.80})")
    if type(description.get("version")) is not int or description["version"] != VERSION:
        got = description.get("version")
        raise CheckpointError(
            f"{path}: version {got!r:.80} of the checkpoint format, this narrowcast reads version {VERSION}; "
            "install the narrowcast that wrote it, or save it again"
        )
    missing, unknown = _FIELDS.keys() - description.keys(), description.keys() - _FIELDS.keys()
    if missing or unknown:
        raise CheckpointError(f"{path}: fields missing {sorted(missing)}, unknown {sorted(unknown)[:5]}")
    for field, is_valid in _FIELDS.items():
        if not is_valid(description[field]):
            raise CheckpointError(f"{path}: field {field!r} is malformed; save the checkpoint again")
    if seal(description)["checksum"] != description["checksum"]:
        raise CheckpointError(f"{path}: its checksum does not match: damaged or edited; copy or save it again")
    _check_references(description, path)
    return description


def _check_references(description: dict[str, Any], path: Path) -> None:
    tensors, aliases, modules = description["tensors"], description["aliases"], description["modules"]
    for name, target in aliases.items():
        if target not in tensors or name in tensors:
            raise CheckpointError(f"{path}: alias {name!r:.200} -> {target!r:.200}: not a second name of a tensor")
    for name, entry in modules.items():
        if "same_as" in entry and "kind" not in modules.get(entry["same_as"], {}):
            raise CheckpointError(
                f"{path}: module {name!r:.200} refers to {entry['same_as']!r:.200}, which is not there"
            )
        refuse_absurd_depth(entry, f"{path}: module {name!r:.200}")
    if WEIGHTS not in description["files"]:
        raise CheckpointError(f"{path}: field 'files' does not list {WEIGHTS}")


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LARGEST_NAME and all(value.split("."))


def _is_path(value: Any) -> bool:
    return value == "" or _is_name(value)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _is_module(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    if entry.keys() == {"same_as"}:
        return _is_path(entry["same_as"])
    return entry.keys() == {"kind", "config"} and isinstance(entry["kind"], str) and isinstance(entry["config"], dict)


def _is_tensor(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "role"}:
        return False
    shape = entry["shape"]
    if not isinstance(shape, list) or len(shape) > _LARGEST_RANK:
        return False
    sizes_are_sane = all(type(size) is int and 0 <= size <= _LARGEST_SIZE for size in shape)
    return sizes_are_sane and entry["dtype"] in DTYPE_NAMES and entry["role"] in ROLES


def _is_file(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.keys() - {"header_sha256"} != {"bytes", "sha256"}:
        return False
    digests = [entry["sha256"], entry.get("header_sha256", entry["sha256"])]
    return type(entry["bytes"]) is int and entry["bytes"] >= 0 and all(map(_is_digest, digests))


def _is_huggingface(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or value.keys() != {"class", "attention"}:
        return False
    return isinstance(value["class"], str) and value["class"].isidentifier() and value["attention"] in ("eager", "sdpa")


def _table(is_key: Callable[[Any], bool], is_value: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(is_key(k) and is_value(v) for k, v in value.items())


def _is_object_or_none(value: Any) -> bool:
    return value is None or isinstance(value, dict)


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "format": lambda value: value == FORMAT,
    "version": lambda value: type(value) is int,
    "modules": _table(_is_path, _is_module),
    "tensors": _table(_is_name, _is_tensor),
    "aliases": _table(_is_name, _is_name),
    "graphs": _table(_is_path, lambda value: isinstance(value, list)),
    "specs": _table(_is_name, lambda value: isinstance(value, str)),
    "recipe": _is_object_or_none,
    "report": _is_object_or_none,
    "versions": _table(lambda key: isinstance(key, str), lambda value: isinstance(value, str)),
    "source_sha256": lambda value: value is None or _is_digest(value),
    "huggingface": _is_huggingface,
    "files": _table(lambda key: key in FILES - {DESCRIPTION}, _is_file),
    "checksum": _is_digest,
}
