"""What an observer remembers as plain data, and back: so that statistics can be written down and continued.

Every observer of this room, and whatever else keeps tensors, numbers, texts and containers of them in its attributes,
is taken as it is; nothing is imported or executed when a state is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_PLAIN = (bool, int, float, str, type(None))


def state_of(thing: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON can hold it.

    Args:
        thing: an object of narrowcast, a tensor, a plain value, or a list, tuple or dictionary of those.
        name: under which its tensors go.
        tensors: added to.

    Raises:
        TypeError: it holds something else.
    """
    if isinstance(thing, _PLAIN):
        return {"plain": thing}
    if isinstance(thing, Tensor):
        tensors[name] = thing.detach().clone().contiguous()
        return {"tensor": name}
    if isinstance(thing, list | tuple):
        parts = [state_of(part, f"{name}.{index}", tensors) for index, part in enumerate(thing)]
        return {"tuple" if isinstance(thing, tuple) else "list": parts}
    if isinstance(thing, dict) and all(isinstance(key, str) for key in thing):
        return {"dict": {key: state_of(part, f"{name}.{key}", tensors) for key, part in thing.items()}}
    if type(thing).__module__.startswith("narrowcast."):
        return {"object": {key: state_of(part, f"{name}.{key}", tensors) for key, part in vars(thing).items()}}
    raise TypeError(f"{name} is a {type(thing).__name__}, which has no state to write down")


def restore_(thing: Any, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """The value that a state describes; an object takes it in place.

    Args:
        thing: what is there now: an object of the same class where the state is one, anything else otherwise.
        state: of `state_of`.
        tensors: by name.

    Raises:
        KeyError, TypeError, ValueError: it is no such state.
    """
    ((kind, value),) = state.items()
    if kind == "plain":
        return value
    if kind == "tensor":
        return tensors[value].clone()
    if kind in ("list", "tuple"):
        parts = [restore_(None, part, tensors) for part in value]
        return tuple(parts) if kind == "tuple" else parts
    if kind == "dict":
        return {key: restore_(None, part, tensors) for key, part in value.items()}
    if kind != "object" or not type(thing).__module__.startswith("narrowcast.") or set(value) != set(vars(thing)):
        raise ValueError(f"a state of {kind} does not fit a {type(thing).__name__}")
    for key, part in value.items():
        setattr(thing, key, restore_(getattr(thing, key), part, tensors))
    return thing
