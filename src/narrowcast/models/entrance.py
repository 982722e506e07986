"""Where a model's inputs enter it, found by running it once: which table reads which ids, which layer comes first.

No forward method is read: hooks compare what a module is given with what the model was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.models.layer_kinds import kind_of

_BATCHNORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_FIRST = (nn.Linear, nn.Conv1d, nn.Conv2d)


@dataclass(frozen=True)
class Table:
    """An embedding that looks up an input of the model as it is.

    Args:
        path: of the embedding.
        size: rows of the table.
        padding: its `padding_idx`, or None.
    """

    path: str
    size: int
    padding: int | None


@dataclass
class Entrance:
    """What the first batch met.

    Args:
        tables: name of an input -> the table that reads it.
        first: path of the first layer that multiplies; "" without one.
        largest: largest magnitude of that layer's input.
        norm: path of the BatchNorm that reads what `first` gives; "" where there is none.
        positions: path of a layer -> input vectors that its weight multiplied.
    """

    tables: dict[str, Table] = field(default_factory=dict)
    first: str = ""
    largest: float = 0.0
    norm: str = ""
    positions: dict[str, int] = field(default_factory=dict)


def find_entrance(model: nn.Module, inputs: Mapping[str, Tensor], run: Callable[[], Any]) -> Entrance:
    """Run the model once and look at who reads its inputs.

    Args:
        model: in evaluation mode.
        inputs: the tensors that `run` gives it, by name.
        run: one forward pass. Where it fails, what was seen until then is returned: the error is for the pass that
            needs the result.
    """
    seen = _Watch(inputs)
    with _hooks(seen, model), torch.no_grad():
        try:
            run()
        except (RuntimeError, IndexError, ValueError, TypeError, KeyError):
            return seen.entrance
    return seen.entrance


class _Watch:
    """The hooks of one forward pass."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self.inputs, self.entrance = inputs, Entrance()
        self._made: Tensor | None = None

    def before(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not args or not isinstance(args[0], Tensor):
            return
        x = args[0]
        if isinstance(module, nn.Embedding):
            name = next((name for name, value in self.inputs.items() if _same(value, x)), None)
            if name is not None:
                self.entrance.tables.setdefault(name, Table(path, module.num_embeddings, module.padding_idx))
        elif isinstance(module, _FIRST) and not self.entrance.first:
            self.entrance.first = path
            self.entrance.largest = float(x.detach().abs().max()) if x.numel() else 0.0
        elif isinstance(module, _BATCHNORMS) and self._made is x and module.running_mean is not None:
            self.entrance.norm = path

    def after(self, path: str, module: nn.Module, output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        y = y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y
        if not isinstance(y, Tensor):
            return
        if path == self.entrance.first and self._made is None:
            self._made = y
        kind = kind_of(module)
        if kind is not None and kind.takes_activation:
            count = y.numel() // max(y.shape[kind.channel_dim], 1)
            self.entrance.positions[path] = self.entrance.positions.get(path, 0) + count


@contextmanager
def _hooks(seen: _Watch, model: nn.Module) -> Iterator[None]:
    handles = []
    for path, module in model.named_modules():
        if kind_of(module) is None and not isinstance(module, (nn.Embedding, *_FIRST, *_BATCHNORMS)):
            continue

        def before(module: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
            seen.before(path, module, args)

        def after(module: nn.Module, args: tuple[Any, ...], output: Any, path: str = path) -> None:
            seen.after(path, module, output)

        handles.append(module.register_forward_pre_hook(before))
        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _same(given: Tensor, got: Tensor) -> bool:
    """Whether a module got the model's input itself or a view of all of it."""
    return given.data_ptr() == got.data_ptr() and given.numel() == got.numel() and given.dtype == got.dtype


class _Enough(Exception):  # noqa: N818  it is no error: it ends a forward pass whose rest is not needed
    """Raised inside of a forward pass."""


def norm_sums(model: nn.Module, path: str, run: Callable[[], Any]) -> Tensor:
    """Sums over what reaches a BatchNorm in one forward pass, which ends there.

    Args:
        model: in evaluation mode.
        path: of the BatchNorm.
        run: one forward pass.

    Returns:
        [3, channels] float64: values, squares, and how many values there are; zeros where the norm was not reached.
    """
    module = model.get_submodule(path)
    sums = torch.zeros(3, module.running_mean.numel(), dtype=torch.float64)  # type: ignore[operator, union-attr]

    def before(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0].detach().double().transpose(0, 1).flatten(1)
        sums.copy_(torch.stack([x.sum(1), x.square().sum(1), torch.full_like(x[:, 0], x.shape[1])]))
        raise _Enough

    handle = module.register_forward_pre_hook(before)
    try:
        with torch.no_grad(), suppress(_Enough):
            run()
    finally:
        handle.remove()
    return sums
