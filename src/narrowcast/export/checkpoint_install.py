"""Putting a checkpoint into a model: everything is built and compared first, the model is touched only at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_hooks

from narrowcast.errors import CheckpointError
from narrowcast.export.checkpoint_tensors import Slot, slots, visits
from narrowcast.nn import (
    MODULES,
    ConvShape,
    FoldedBatchNorm,
    InstalledModule,
    MultiheadAttention,
    QuantizedConv,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedModule,
    QuantizedRecurrent,
    RecurrentShape,
)

_SHOWN = 6
# what a float module has that one of these can have been made from
_MARKS: dict[type[InstalledModule], str] = {FoldedBatchNorm: "running_mean", MultiheadAttention: "embed_dim"}


def build_modules(description: dict[str, Any]) -> dict[str, InstalledModule]:
    """Every installed module of a checkpoint, on the meta device, nested ones inside their parents.

    Args:
        description: validated.

    Returns:
        Path -> module, for the outermost modules only; one object under several paths where the model shared it.

    Raises:
        CheckpointError: an unknown kind, a config that its kind refuses, or a path into nothing.
    """
    entries = description["modules"]
    built: dict[str, InstalledModule] = {}
    with bounded_construction(len(description["tensors"])):
        for path, entry in entries.items():
            if "kind" in entry:
                built[path] = _build(path, entry)
    for path, entry in entries.items():
        if "same_as" in entry:
            built[path] = built[entry["same_as"]]
    outermost: dict[str, InstalledModule] = {}
    for path in sorted(built, key=lambda path: (path != "", path.count("."))):
        outer = next((start for start in _prefixes(path) if start in outermost), None)
        if outer is None:
            outermost[path] = built[path]
        else:
            _attach(outermost[outer], path[len(outer) + 1 if outer else 0 :], built[path], path)
    return outermost


def _build(path: str, entry: dict[str, Any]) -> InstalledModule:
    kind = entry["kind"]
    if kind not in MODULES:
        raise CheckpointError(f"module {path!r:.200}: unknown kind {kind!r:.80}, expected one of {sorted(MODULES)}")
    try:
        module = MODULES[kind].from_config(entry["config"])
        given_back = module.config()
    except CheckpointError:
        raise
    except Exception as error:  # the config is untrusted: a wrong type or number can fail anywhere in a constructor
        raise CheckpointError(
            f"module {path!r:.200}: {kind} cannot be made from its config ({type(error).__name__}: {error!s:.300})"
        ) from error
    if _as_json(given_back) != entry["config"]:
        raise CheckpointError(f"module {path!r:.200}: the config is not one that {kind} writes")
    if any(not tensor.is_meta for tensor in [*module.parameters(), *module.buffers()]):
        raise CheckpointError(f"module {path!r:.200}: {kind}.from_config made tensors outside the meta device")
    return module


def _as_json(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_as_json(entry) for entry in value]
    if isinstance(value, dict):
        return {key: _as_json(entry) for key, entry in value.items()}
    return value


def _prefixes(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[:count]) for count in range(len(parts))]


def _attach(outer: nn.Module, inside: str, module: InstalledModule, path: str) -> None:
    *parents, name = inside.split(".")
    owner: nn.Module | None = outer
    for part in parents:
        owner = None if owner is None else owner._modules.get(part)
    if owner is None or name not in owner._modules:
        raise CheckpointError(f"module {path!r:.200} lies inside a module that has no such part")
    problem = _contradiction(owner._modules[name], module)
    if problem is not None:
        raise CheckpointError(f"module {path!r:.200} does not fit the module it lies in: {problem}")
    setattr(owner, name, module)


@contextmanager
def bounded_construction(tensors: int) -> Iterator[None]:
    """While this lasts, building more modules than a model of `tensors` tensors can have is an error.

    A few bytes of a hostile config could otherwise ask for a billion layers.

    Args:
        tensors: how many tensors the checkpoint holds.

    Raises:
        CheckpointError: from within, when the limit is passed.
    """
    remaining = [20_000 + 64 * tensors]

    def count(*_: Any) -> None:
        remaining[0] -= 1
        if remaining[0] < 0:
            raise CheckpointError(f"a config asks for far more modules than its {tensors:,} tensors can fill")

    handles = [
        torch_hooks.register_module_module_registration_hook(count),
        torch_hooks.register_module_parameter_registration_hook(count),
        torch_hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Installation:
    """What is to be done to a model, all of it checked.

    Args:
        modules: (parent, name in the parent, module); the root of the model has no entry.
        tensors: (slot, name of its tensor in the file).
        root: the model after installation.
    """

    modules: list[tuple[nn.Module, str, InstalledModule]]
    tensors: list[tuple[Slot, str]]
    root: nn.Module

    def apply_(self, tensor: Callable[[str], Tensor]) -> None:
        """Fill the new modules, derive what their kernels need, and only then change the model.

        Args:
            tensor: name in the file -> tensor.
        """
        parameters: dict[str, nn.Parameter] = {}
        inside = self._inside_new()
        for slot, name in self.tensors:
            if id(slot.owner) in inside:
                _fill(slot, tensor(name), name, parameters)
        for part in inside.values():
            if isinstance(part, InstalledModule):
                _prepare(part)
        for parent, name, module in self.modules:
            setattr(parent, name, module)
        for slot, name in self.tensors:
            if id(slot.owner) not in inside:
                _fill(slot, tensor(name), name, parameters)

    def _inside_new(self) -> dict[int, nn.Module]:
        new = [module for _, _, module in self.modules]
        if isinstance(self.root, InstalledModule):
            new.append(self.root)
        return {id(part): part for module in new for part in module.modules()}


def _prepare(module: InstalledModule) -> None:
    try:
        module.prepare_()
    except (RuntimeError, ValueError, ArithmeticError) as error:  # stored values that the kernel's packing refuses
        raise CheckpointError(f"a {module.kind} cannot be prepared from its stored tensors ({error!s:.300})") from error


def _fill(slot: Slot, tensor: Tensor, name: str, parameters: dict[str, nn.Parameter]) -> None:
    if slot.attribute in slot.owner._parameters:
        trained = slot.tensor.requires_grad and (tensor.is_floating_point() or tensor.is_complex())
        tensor = parameters.setdefault(name, nn.Parameter(tensor, requires_grad=trained))
    setattr(slot.owner, slot.attribute, tensor)  # not the dictionary: nn.LSTM keeps a second list up to date


def plan_installation(into: nn.Module, description: dict[str, Any], new: dict[str, InstalledModule]) -> Installation:
    """Compare a checkpoint with a model.

    Args:
        into: the model, unchanged here.
        description: validated.
        new: outermost installed modules by path.

    Returns:
        What to do.

    Raises:
        CheckpointError: the model is of another architecture; the message names the first places that differ.
    """
    problems: list[str] = []
    modules = _replacements(into, new, problems)
    found = list(slots(into, new))
    tensors = _sources(found, description, problems)
    _refuse(problems)
    return Installation(modules, tensors, new.get("", into))


def _refuse(problems: list[str]) -> None:
    if not problems:
        return
    more = f"\n  and {len(problems) - _SHOWN:,} more" if len(problems) > _SHOWN else ""
    listed = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
    raise CheckpointError(
        f"the checkpoint does not fit the model it is to be loaded into:{listed}{more}\n"
        "pass into= a model of the architecture that was saved; it has not been changed"
    )


def _replacements(
    into: nn.Module, new: dict[str, InstalledModule], problems: list[str]
) -> list[tuple[nn.Module, str, InstalledModule]]:
    modules: dict[tuple[int, str], tuple[nn.Module, str, InstalledModule]] = {}
    kept: dict[tuple[int, str], str] = {}
    missing = set(new) - {""}
    for visit in visits(into, new):
        for name, child in visit.module._modules.items():
            path = f"{visit.path}.{name}" if visit.path else name
            place = (id(visit.module), name)
            if path not in new:
                kept[place] = path
                continue
            missing.discard(path)
            if modules.setdefault(place, (visit.module, name, new[path]))[2] is not new[path]:
                problems.append(f"{path}: the model shares this module, the checkpoint holds two different ones")
            problem = _contradiction(child, new[path])
            if problem is not None:
                problems.append(f"{path}: {problem}")
    shared = sorted(kept[place] for place in kept.keys() & modules)
    problems += [f"{path}: the model shares this module, the checkpoint does not" for path in shared]
    problems += [f"{path}: nothing in the model, {new[path].kind} in the checkpoint" for path in sorted(missing)]
    return list(modules.values())


def _sources(found: list[Slot], description: dict[str, Any], problems: list[str]) -> list[tuple[Slot, str]]:
    stored, aliases = description["tensors"], description["aliases"]
    sources: list[tuple[Slot, str]] = []
    chosen: dict[tuple[int, str], str] = {}
    for slot in found:
        name = aliases.get(slot.name, slot.name)
        if name not in stored:
            if slot.role == "stored" or slot.tensor.is_meta:
                problems.append(f"{slot.name}: the model has this tensor, the checkpoint does not")
            continue
        problem = _mismatch(slot, stored[name])
        if problem is not None and slot.role == "attribute" and not slot.tensor.is_meta:
            continue  # a plain attribute that the model computed for itself, a cache most likely
        if problem is not None:
            problems.append(f"{slot.name}: {problem}")
        elif chosen.setdefault((id(slot.owner), slot.attribute), name) != name:
            problems.append(f"{slot.name}: the model shares this tensor, the checkpoint holds two different ones")
        sources.append((slot, name))
    wanted = {slot.name for slot in found}
    extra = [n for n in [*stored, *aliases] if n not in wanted and stored[aliases.get(n, n)]["role"] == "stored"]
    problems += [f"{name:.200}: the checkpoint has this tensor, the model does not" for name in extra]
    return sources


def _mismatch(slot: Slot, wanted: dict[str, Any]) -> str | None:
    """Why the described tensor cannot stand in a slot; a float module takes the floating dtype it was saved with."""
    shape, dtype = list(slot.tensor.shape), slot.tensor.dtype
    if shape != wanted["shape"]:
        return f"shape {shape} in the model, {wanted['shape']} in the checkpoint"
    saved: torch.dtype = getattr(torch, wanted["dtype"])
    both_floating = dtype.is_floating_point and saved.is_floating_point
    if saved == dtype or (both_floating and not isinstance(slot.owner, InstalledModule)):
        return None
    return f"dtype {dtype} in the model, {saved} in the checkpoint"


def _contradiction(old: nn.Module | None, new: InstalledModule) -> str | None:
    """Why `new` cannot have been made from a module like `old`."""
    if old is None:
        return f"nothing in the model, {new.kind} in the checkpoint"
    if isinstance(old, InstalledModule):
        same = type(old) is type(new) and old.config().get("shape") == new.config().get("shape")
        return None if same else f"{old} in the model, {new} in the checkpoint"
    mark = new.weight_names[0] if isinstance(new, QuantizedModule) else _MARKS.get(type(new), "training")
    first = getattr(old, mark, None)
    if first is None or hasattr(old, "num_embeddings") != isinstance(new, QuantizedEmbedding):
        return f"{type(old).__name__} in the model, {new.kind} in the checkpoint"
    if isinstance(new, QuantizedModule):
        got, expected = _geometry(old, first, new)
    else:
        expected = {name: value for name, value in new.config().items() if type(value) is int and hasattr(old, name)}
        got = {name: getattr(old, name) for name in expected}
    return None if got == expected else f"{type(old).__name__} of {got} in the model, {expected} in the checkpoint"


def _geometry(old: nn.Module, weight: Tensor, new: QuantizedModule) -> tuple[Any, Any]:
    """(of the model's module, of the checkpoint's module), comparable."""
    if isinstance(new, QuantizedConv) and isinstance(old, nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d):
        return ConvShape.of(old), new.shape
    if isinstance(new, QuantizedRecurrent) and isinstance(old, nn.LSTM | nn.GRU):
        return RecurrentShape.of(old), new.shape
    shape = new.stored(new.weight_names[0]).shape
    if isinstance(new, QuantizedLinear | QuantizedEmbedding):
        is_transposed = isinstance(new, QuantizedLinear) and not isinstance(old, nn.Linear)  # Hugging Face's Conv1D
        return list(weight.shape)[:: -1 if is_transposed else 1], list(shape)
    return f"{weight.numel():,} weights", f"{shape[0] * shape[1]:,} weights"
