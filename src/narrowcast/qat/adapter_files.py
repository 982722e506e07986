"""Adapters in files of their own: the two that PEFT writes, so that either side reads "requantize" adapters."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from narrowcast.errors import CheckpointError
from narrowcast.pipeline.run import Quantized
from narrowcast.qat.adapters import adapted_of, adapters_of, attach_adapters

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_OWN = "narrowcast"
VERSION = 1


def save_adapters(model: nn.Module, directory: str | Path) -> None:
    """Write the adapters of a model, without its base.

    Args:
        model: what `attach_adapters` returned.
        directory: where `adapter_model.safetensors` and `adapter_config.json` go; other files in it stay. PEFT reads
            adapters of "requantize" onto the float model.

    Raises:
        ModelError: the model has no adapters.
        CheckpointError: the directory cannot be written.
    """
    inner, attached = adapted_of(model)
    tensors, settings = {}, attached.settings
    for path, layer in adapters_of(inner):
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = layer.lora_A.detach().float().cpu().contiguous()
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = layer.lora_B.detach().float().cpu().contiguous()
    document = {
        # PEFT refuses the types that it does not know: such adapters mean nothing on a float model
        "peft_type": "LORA" if settings.merge == "requantize" else f"NARROWCAST_{settings.merge.upper()}",
        "r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout, "bias": "none",
        "task_type": None, "base_model_name_or_path": None, "inference_mode": True,
        "target_modules": [path for path, _ in adapters_of(inner)],
        _OWN: {"version": VERSION, "merge": settings.merge, "base_sha256": base_hash(inner)},
    }  # fmt: skip
    target = Path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
        beside = target / f".{WEIGHTS}.{os.getpid()}"
        save_file(tensors, beside, metadata={"format": "pt"})
        beside.replace(target / WEIGHTS)
        beside = target / f".{CONFIG}.{os.getpid()}"
        beside.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        beside.replace(target / CONFIG)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory}: adapters cannot be written ({error})") from error


def load_adapters(quantized: Quantized | nn.Module, directory: str | Path, *, inplace: bool = False) -> nn.Module:
    """A quantized model with the adapters of a directory, to answer with, train on or merge.

    Args:
        quantized: the model that they were trained over.
        directory: what `save_adapters` wrote.
        inplace: as in `attach_adapters`.

    Returns:
        As `attach_adapters`, but in evaluation mode.

    Raises:
        CheckpointError: a file is missing, damaged or of a later version, the adapters do not fit the model, or they
            were trained over other integers.
        ModelError: as `attach_adapters`.
    """
    source = Path(directory)
    document = _document(source / CONFIG)
    tensors = _tensors(source / WEIGHTS)
    try:
        own, layers = document[_OWN], list(document["target_modules"])
        settings = {"rank": document["r"], "alpha": document["lora_alpha"], "dropout": document["lora_dropout"]}
        version, merge, trained_over = own["version"], own["merge"], own["base_sha256"]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{source / CONFIG}: lacks {error}; was it written by nc.qat.save_adapters?") from error
    if version != VERSION:
        raise CheckpointError(f"{source / CONFIG}: version {version!r}, this narrowcast reads {VERSION}; update it")
    wanted = {f"{_PREFIX}{path}.lora_{part}.weight" for path in layers for part in "AB"}
    if wanted != tensors.keys():
        raise CheckpointError(
            f"{source / WEIGHTS}: other tensors than {CONFIG} lists: {sorted(wanted ^ tensors.keys())}"
        )
    model = attach_adapters(quantized, **settings, merge=merge, layers=layers, inplace=inplace)
    if base_hash(model) != trained_over:
        raise CheckpointError(f"{source}: its adapters were trained over other integers; load the model that they were")
    with torch.no_grad():
        for path, layer in adapters_of(model):
            for part, parameter in (("A", layer.lora_A), ("B", layer.lora_B)):
                given = tensors[f"{_PREFIX}{path}.lora_{part}.weight"]
                if given.shape != parameter.shape or not bool(torch.isfinite(given).all()):
                    raise CheckpointError(
                        f"{source / WEIGHTS}: lora_{part} of {path!r} is {tuple(given.shape)}, expected finite "
                        f"numbers of shape {tuple(parameter.shape)}"
                    )
                parameter.copy_(given)
    return model.eval()


def base_hash(model: nn.Module) -> str:
    """SHA-256 over the stored tensors under the adapters of a model."""
    digest = hashlib.sha256()
    for path, layer in adapters_of(model):
        for name, tensor in layer.base.state_dict().items():
            digest.update(f"{path}.{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: expected a JSON object")
    return document


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
