"""Finding and exchanging modules by path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a path; "" is the model itself."""
    return model.get_submodule(path) if path else model


def replace_everywhere_(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` wherever `old` stands. Changes `model`; returns it, or `new` where `old` is the model itself."""
    if model is old:
        return new
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
    return model


def stored_bytes(model: nn.Module) -> int:
    """Bytes of everything that is stored with a model: parameters and persistent buffers, shared ones once."""
    sizes = {}
    for tensor in model.state_dict(keep_vars=True).values():
        key = id(tensor) if tensor.is_meta else (tensor.data_ptr(), tensor.numel(), tensor.dtype)
        sizes[key if tensor.numel() else id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(sizes.values())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
