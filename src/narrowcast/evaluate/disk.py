"""Bytes a model takes on disk: of the real files where there are files, else of its state as one safetensors file."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt2", "*.onnx")
# names as safetensors writes them
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


def file_bytes(source: str | Path) -> tuple[int, str]:
    """Bytes of a model's files, and which were counted.

    Args:
        source: a directory or a file. Of a directory the weight files count, of the first kind that is there
            (safetensors before others), so a Hugging Face directory with its weights in several formats counts once;
            of a narrowcast checkpoint its description counts too, as it cannot be loaded without.

    Returns:
        (bytes, a description of what was counted).
    """
    path = Path(source)
    if path.is_file():
        return path.stat().st_size, "the file"
    for pattern in WEIGHT_FILES:
        found = sorted(path.glob(pattern))
        if found:
            description = path / "narrowcast.json"
            found += [description] if description.is_file() else []
            return sum(file.stat().st_size for file in found), ", ".join(file.name for file in found)
    return 0, "no weight files"


def state_bytes(model: nn.Module) -> tuple[int, str]:
    """Bytes of a model's state written as one safetensors file, each shared tensor once; nothing is written.

    Args:
        model: any module. State that is not tensors (torch.ao's packed weights) is measured as `torch.save` writes it.

    Returns:
        (bytes, a description of what was counted).
    """
    state = model.state_dict()
    if not all(isinstance(value, Tensor) and value.dtype in DTYPES for value in state.values()):
        counter = _Counter()
        torch.save(state, counter)  # type: ignore[arg-type]
        return counter.written, "the state as torch.save writes it, as not all of it is plain tensors"
    return safetensors_bytes(_each_once(state)), "the state as one safetensors file"


def _each_once(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without second names of the same memory, as tied weights have."""
    seen: dict[Any, str] = {}
    for name, value in state.items():
        memory = value.untyped_storage().data_ptr() if value.device.type != "meta" else id(value)
        unique = name if value.numel() == 0 or memory == 0 else None
        seen.setdefault((memory, value.storage_offset(), value.shape, value.stride(), unique), name)
    return {name: state[name] for name in seen.values()}


def safetensors_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Exact size of a safetensors file without metadata: 8 bytes, a JSON header padded to 8, the tensors.

    Args:
        tensors: by name; larger element types come first in the file, then names in order.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-_alignment(item[1]), item[0]))
    header, offset = {}, 0
    for name, value in ordered:
        end = offset + value.numel() * value.element_size()
        header[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + offset


def _alignment(value: Tensor) -> int:
    return value.element_size()


class _Counter(io.RawIOBase):
    """A file that forgets what is written and counts it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0
        self.position = 0

    def writable(self) -> bool:
        """It can be written."""
        return True

    def write(self, data: Any) -> int:
        """Counts."""
        size = memoryview(data).nbytes
        self.position += size
        self.written = max(self.written, self.position)
        return size

    def tell(self) -> int:
        """Bytes so far."""
        return self.position
