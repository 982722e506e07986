"""Saving a quantized model and loading it: one safetensors file, one JSON document, nothing that runs code.

What is on disk is independent of any kernel; each module derives its execution layout from it. Loading maps the
tensor file and hands out views of the mapping, so the weights are never held twice.
"""

from __future__ import annotations

import json
import math
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from narrowcast.errors import CheckpointError, FormatError
from narrowcast.export import checkpoint_huggingface as huggingface
from narrowcast.export.checkpoint_files import file_entry, file_sha256, open_weights, staged, write_weights
from narrowcast.export.checkpoint_graphs import describe_graphs, read_flows, restore_graphs_
from narrowcast.export.checkpoint_install import bounded_construction, build_modules, plan_installation
from narrowcast.export.checkpoint_schema import (
    CONFIG,
    DESCRIPTION,
    DTYPES,
    FORMAT,
    GENERATION,
    VERSION,
    WEIGHTS,
    read_json,
    seal,
    to_json,
    validate,
)
from narrowcast.export.checkpoint_tensors import check_storable, separate_aliases, slots, source_hash, visits
from narrowcast.export.onnx_save import is_onnx_module, save_onnx
from narrowcast.nn import MODULES, InstalledModule, QuantizedModule, mark_portable_

__all__ = ["load", "read_description", "save", "source_hash"]


def save(quantized: Any, directory: str | Path, *, form: str = "qdq") -> None:
    """Write a quantized model to a directory, or an ONNX model to an .onnx file, in full or not at all.

    Args:
        quantized: what `nc.quantize` returned: `.model`, `.report`, `.recipe`.
        directory: absent, empty, or an earlier checkpoint, which is replaced in one step; of an ONNX model the path
            of the .onnx file.
        form: of an ONNX model, "qdq" or "qoperator"; see docs/onnx.md.

    Raises:
        CheckpointError: the directory holds something else, the disk refuses, or the model has a part that cannot
            be stored; the message names it, and what was there before is still there.
        FormatError: a form that is not known, or another than "qdq" of a PyTorch model.
    """
    model = getattr(quantized, "model", None)
    if not isinstance(model, nn.Module) or not hasattr(quantized, "report"):
        raise CheckpointError(f"save takes what nc.quantize returned, got {type(quantized).__name__}")
    if is_onnx_module(model):
        save_onnx(model, quantized.recipe, Path(directory), form)
        return
    if form != "qdq":
        raise FormatError(
            f"form={form!r} is for ONNX models; a PyTorch model gets it by nc.export or narrowcast export"
        )
    modules = _modules(model)
    found = list(slots(model))
    for slot in found:
        check_storable(slot)
    tensors, aliases = separate_aliases(found)
    roles = {slot.name: slot.role for slot in found}
    description = {
        "format": FORMAT,
        "version": VERSION,
        "modules": modules,
        "tensors": {name: _tensor_entry(tensor, roles[name]) for name, tensor in tensors.items()},
        "aliases": aliases,
        "graphs": describe_graphs(model),
        "specs": _specs(model),
        "recipe": _record(quantized, "recipe"),
        "report": _record(quantized, "report"),
        "versions": _versions(),
        "source_sha256": _source(quantized),
        "huggingface": huggingface.describe(model),
    }
    with staged(Path(directory)) as staging:
        files = {WEIGHTS: write_weights(staging / WEIGHTS, tensors)}
        if description["huggingface"] is not None:
            files |= {path.name: file_entry(path) for path in huggingface.write_files(model, staging)}
        sealed = seal({**description, "files": files})
        (staging / DESCRIPTION).write_bytes(to_json(sealed))
        validate(sealed, staging / DESCRIPTION)


def _tensor_entry(tensor: torch.Tensor, role: str) -> dict[str, Any]:
    return {"dtype": DTYPES[tensor.dtype][0], "shape": list(tensor.shape), "role": role}


def _modules(model: nn.Module) -> dict[str, Any]:
    modules: dict[str, Any] = {}
    for visit in visits(model):
        module = visit.module
        if not isinstance(module, InstalledModule):
            if type(module).get_extra_state is not nn.Module.get_extra_state:
                raise CheckpointError(
                    f"module {visit.path!r} ({type(module).__name__}) keeps extra state that is not tensors; "
                    "checkpoints hold tensors and JSON only"
                )
            continue
        if visit.first_path != visit.path:
            modules[visit.path] = {"same_as": visit.first_path}
            continue
        if MODULES.get(module.kind) is not type(module):
            raise CheckpointError(f"module {visit.path!r}: kind {module.kind!r} is not in narrowcast.nn.MODULES")
        modules[visit.path] = {"kind": module.kind, "config": _config(module, visit.path)}
    return modules


def _config(module: InstalledModule, path: str) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(json.dumps(module.config(), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"module {path!r}: its config is not plain JSON ({error})") from error
    return config


def _specs(model: nn.Module) -> dict[str, str]:
    return {
        f"{visit.path}.{name}" if visit.path else name: str(visit.module.stored(name).spec)
        for visit in visits(model)
        if isinstance(visit.module, QuantizedModule) and visit.first_path == visit.path
        for name in visit.module.weight_names
    }


def _plain(value: Any) -> Any:
    """JSON values; numbers that JSON cannot write (an SQNR that is infinite because nothing was lost) become null."""
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _record(quantized: Any, name: str) -> Any:
    record = getattr(quantized, name, None)
    return None if record is None else _plain(record.to_dict())


def _source(quantized: Any) -> str | None:
    digest: str | None = getattr(quantized, "source_sha256", None)
    return digest


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.partition(" ")[0], "torch": torch.__version__}
    for name in ("narrowcast", "safetensors", "transformers"):
        if name in sys.modules:
            try:
                versions[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                versions[name] = "not installed as a package"
    return versions


def read_description(directory: str | Path) -> dict[str, Any]:
    """The document of a checkpoint, every field checked.

    Args:
        directory: what `save` wrote.

    Returns:
        The contents of `narrowcast.json`.

    Raises:
        CheckpointError: there is no checkpoint, or the document is damaged, of another version or malformed.
    """
    path = Path(directory) / DESCRIPTION
    return validate(read_json(path), path)


def load(directory: str | Path, into: nn.Module | None = None, *, verify: bool = False) -> nn.Module:
    """The model of a checkpoint, ready to answer, its weights mapped from the file.

    Args:
        directory: what `save` wrote.
        into: the float model's architecture, with or without values (meta device); its modules are replaced in
            place. None for a checkpoint of a transformers model, whose class is then built from its config.
        verify: also compare every file with its checksum, which reads all weights. Without it everything but the
            values of the weights is checked.

    Returns:
        `into` itself (or the new model) in eval mode, on the CPU.

    Raises:
        CheckpointError: a file is missing, damaged or hostile, or `into` is of another architecture, in which case
            it has not been changed.
    """
    directory = Path(directory)
    description = read_description(directory)
    if verify:
        _verify(directory, description)
    tensor = open_weights(directory / WEIGHTS, description)
    new = build_modules(description)
    flows = read_flows(description)
    if into is None:
        into = new[""] if "" in new else _build(directory, description)
    installation = plan_installation(into, description, new)
    installation.apply_(tensor)
    restore_graphs_(installation.root, flows)
    mark_portable_(installation.root, (description["recipe"] or {}).get("portable") is True)
    return installation.root.eval()


def _verify(directory: Path, description: dict[str, Any]) -> None:
    for name, entry in description["files"].items():
        _check_file(directory / name, entry)


def _check_file(path: Path, entry: dict[str, Any]) -> None:
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file; the checkpoint is incomplete")
    try:
        got = file_sha256(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    if got != entry["sha256"]:
        raise CheckpointError(f"{path}: SHA-256 {got}, expected {entry['sha256']}; damaged: copy or save it again")


def _build(directory: Path, description: dict[str, Any]) -> nn.Module:
    if description["huggingface"] is None:
        raise CheckpointError(
            f"{directory}: was not saved from a class that transformers exports; pass the model's architecture as into="
        )
    for name in (CONFIG, GENERATION):
        if name in description["files"]:
            _check_file(directory / name, description["files"][name])
    with bounded_construction(len(description["tensors"])):
        return huggingface.build(directory, description["huggingface"])
