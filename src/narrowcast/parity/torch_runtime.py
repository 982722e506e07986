"""The torch side: modules watched by hooks, called alone, on the kernels that were asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.data import Batch
from narrowcast.kernels import capability, running_on
from narrowcast.models.modules import get_module
from narrowcast.nn import QuantizedLinear
from narrowcast.nn.trained import TrainedModule
from narrowcast.parity.bounds import all_products
from narrowcast.parity.runtime import Runtime, Unit, Watcher
from narrowcast.parity.torch_units import find_units, stored_tensors, torch_unit


class TorchRuntime(Runtime):
    """A torch module.

    Args:
        name: for people.
        model: in evaluation mode.
        kernels: "reference", a tier's name, or None for those in use.
    """

    def __init__(self, name: str, model: nn.Module, kernels: str | None) -> None:
        self.name, self.model = name, model
        self.asked, self.kernels = kernels, kernels or capability().isa
        self._running = False

    def names(self) -> set[str]:
        """See `Runtime`."""
        return {path for path, _ in self.model.named_modules()}

    def units(self) -> dict[str, Unit]:
        """See `Runtime`."""
        return find_units(self.model)

    def unit(self, name: str, end: str) -> Unit:
        """See `Runtime`."""
        return torch_unit(self.model, name, end)

    @contextmanager
    def watching(self, units: Mapping[str, Unit], watcher: Watcher) -> Iterator[None]:
        """See `Runtime`; hooks, which are taken off again."""
        handles = []
        for name, unit in units.items():
            first, last = get_module(self.model, name), get_module(self.model, unit.end or name)
            handles.append(first.register_forward_pre_hook(self._entering(name, watcher), with_kwargs=True))
            handles.append(last.register_forward_hook(self._leaving(name, watcher)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str, watcher: Watcher) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._running:
                watcher.enter(name, args, kwargs)

        return hook

    def _leaving(self, name: str, watcher: Watcher) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._running:
                watcher.leave(name, output)

        return hook

    def run(self, batch: Batch) -> Any:
        """See `Runtime`."""
        self._running = True
        try:
            with torch.no_grad(), running_on(self.asked):
                return batch.run(self.model)
        finally:
            self._running = False

    def call(self, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `Runtime`; hooks of either side stay silent meanwhile, since sides may share modules."""
        running, self._running = self._running, False
        try:
            with torch.no_grad(), running_on(self.asked):
                output = get_module(self.model, unit.name)(*args, **kwargs)
                return get_module(self.model, unit.end)(output) if unit.end else output
        finally:
            self._running = running

    def products(self, unit: Unit, args: tuple[Any, ...]) -> Tensor | None:
        """See `Runtime`; known of linear layers."""
        module = get_module(self.model, unit.name)
        module = module.built() if isinstance(module, TrainedModule) else module
        if not isinstance(module, QuantizedLinear) or not args:
            return None
        with torch.no_grad():
            return all_products(args[0], module.weight)

    def stored(self, unit: Unit) -> dict[str, Tensor]:
        """See `Runtime`."""
        return stored_tensors(get_module(self.model, unit.name))
