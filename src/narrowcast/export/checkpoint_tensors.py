"""Which tensors a model consists of, under which names, and which of them are the same tensor twice."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from narrowcast.errors import CheckpointError
from narrowcast.export.checkpoint_files import tensor_bytes
from narrowcast.export.checkpoint_schema import DTYPES
from narrowcast.nn import InstalledModule


@dataclass(frozen=True)
class Slot:
    """One place in a model where a tensor belongs.

    Args:
        name: dotted name, as in a state dict.
        owner: the module that holds it.
        attribute: its name in the owner.
        role: "stored", "constant" or "attribute"; see `checkpoint_schema.ROLES`.
        tensor: what is there now.
    """

    name: str
    owner: nn.Module
    attribute: str
    role: str
    tensor: Tensor


@dataclass(frozen=True)
class Visit:
    """One module on the way through a model.

    Args:
        path: dotted name.
        module: the module, or the one that replaces it.
        first_path: `path`, or for an installed module that was met before the path it was met under.
    """

    path: str
    module: nn.Module
    first_path: str


def visits(model: nn.Module, replacements: Mapping[str, nn.Module] | None = None) -> Iterator[Visit]:
    """Every module under every path it has, parents first; an installed module is entered once.

    Args:
        model: the root.
        replacements: path -> module that is met instead of the one that is there.
    """
    replacements = replacements or {}
    first: dict[int, str] = {}
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        module = replacements.get(path, module)
        if isinstance(module, InstalledModule):
            met_before = id(module) in first
            yield Visit(path, module, first.setdefault(id(module), path))
            if met_before:
                continue
        else:
            yield Visit(path, module, path)
        children = [(name, child) for name, child in module._modules.items() if child is not None]
        pending += [(f"{path}.{name}" if path else name, child) for name, child in reversed(children)]


def slots(model: nn.Module, replacements: Mapping[str, nn.Module] | None = None) -> Iterator[Slot]:
    """Every place of a model that holds a tensor worth keeping, in the order of `visits`.

    Tensors that an installed module derived (its buffers that are not persistent) are no such places.
    """
    for visit in visits(model, replacements):
        if visit.first_path != visit.path:
            continue
        for attribute, role, tensor in _own_tensors(visit.module):
            name = f"{visit.path}.{attribute}" if visit.path else attribute
            yield Slot(name, visit.module, attribute, role, tensor)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    if isinstance(module, InstalledModule):
        # the hook of state dicts: a convolution unpacks its codes in it
        state: dict[str, Tensor] = {}
        module._save_to_state_dict(state, "", True)
        yield from ((name, "stored", tensor) for name, tensor in state.items())
        return
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield name, "stored", parameter
    for name, buffer in module._buffers.items():
        if buffer is not None:
            yield name, "constant" if name in module._non_persistent_buffers_set else "stored", buffer
    for name, value in vars(module).items():
        if isinstance(value, Tensor) and "." not in name:
            yield name, "attribute", value


def check_storable(slot: Slot) -> None:
    """Refuse a tensor that a safetensors file cannot hold.

    Raises:
        CheckpointError: the tensor has no data, is a subclass with parts of its own, sparse, or of a rare dtype.
    """
    tensor, problem = slot.tensor, None
    if is_lazy(tensor):
        problem = "is not initialised yet; run the model once first"
    elif tensor.is_meta:
        problem = "is on the meta device and has no values; load the model's weights first"
    elif is_traceable_wrapper_subclass(tensor) or tensor.layout != torch.strided:
        problem = f"is a {type(tensor).__name__} of layout {tensor.layout}; only plain dense tensors are stored"
    elif tensor.dtype not in DTYPES:
        problem = f"has dtype {tensor.dtype}, which checkpoints do not hold"
    if problem is not None:
        raise CheckpointError(f"tensor {slot.name!r} {problem}")


def separate_aliases(found: list[Slot]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split the tensors of a model into distinct ones and further names for them.

    Args:
        found: all slots, checked; the list keeps every tensor alive, so equal addresses mean equal memory.

    Returns:
        tensors: name -> tensor, every one once.
        aliases: further name -> name in `tensors`.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    owner: dict[object, str] = {}
    for slot in found:
        tensor = slot.tensor
        memory = (tensor.data_ptr(), tensor.stride()) if tensor.numel() else id(tensor)
        name = owner.setdefault((memory, tensor.dtype, tensor.shape, tensor.device), slot.name)
        if name == slot.name:
            tensors[name] = tensor
        else:
            aliases[slot.name] = name
    return tensors, aliases


def source_hash(model: nn.Module) -> str:
    """SHA-256 of a model's stored tensors: names, dtypes, shapes and bytes, in the order of the names.

    Args:
        model: any module whose weights are in memory.

    Returns:
        64 hexadecimal digits; equal for equal weights, whatever the order of the modules.

    Raises:
        CheckpointError: a tensor has no data.
    """
    digest = hashlib.sha256()
    stored = {slot.name: slot for slot in slots(model) if slot.role == "stored"}
    for name in sorted(stored):
        check_storable(stored[name])
        tensor = stored[name].tensor
        digest.update(f"{name} {DTYPES[tensor.dtype][0]} {list(tensor.shape)}\n".encode("utf-8", "backslashreplace"))
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
