"""Finding and exchanging modules by path."""

from __future__ import annotations

from torch import nn


def get_module(model: nn.Module, path: str) -> nn.Module:
    """The module at a path; "" is the model itself."""
    return model.get_submodule(path) if path else model


def paths_of(model: nn.Module, module: nn.Module) -> list[str]:
    """Every path at which this very module stands; shared modules stand at several."""
    return [path for path, candidate in model.named_modules(remove_duplicate=False) if candidate is module]


def replace_everywhere_(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put `new` wherever `old` stands. Changes `model`; returns it, or `new` where `old` is the model itself."""
    if model is old:
        return new
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new
    return model
