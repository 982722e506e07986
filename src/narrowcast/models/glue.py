"""What a model computes between two of its blocks, recorded in one pass and replayed on what the first of them gives.

Without it the model has to be run from its start to get at the inputs of a block behind a pooling or an activation
that is written out in `forward`, once for every block: time that grows with the square of the depth.

Only what follows from the block before, its inputs, and the model's own constants is replayed; whatever else reaches
the next block's inputs (the model's inputs, earlier blocks, values read into Python) makes the recording useless, and
it says so. Sizes are those of the recorded pass, so tensors of other shapes are not replayed either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# What tells Python a tensor's values, on which it may branch, or writes without returning what it has written.
_OPAQUE = frozenset(
    (
        "__bool__", "__int__", "__float__", "__index__", "__setitem__", "__delitem__", "item", "tolist", "numpy",
        "data_ptr",
    )
)  # fmt: skip


@dataclass(frozen=True)
class _Slot:
    """Stands for a tensor in a recorded step."""

    number: int


@dataclass(frozen=True)
class _Step:
    """One function that was called: arguments with slots in place of tensors, and the slots of what it gave."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int | None, ...]

    def writes(self) -> bool:
        """Whether it gives a tensor that it got."""
        slots = [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, _Slot)]
        return any(slot.number in self.results for slot in slots)


@dataclass(frozen=True)
class Glue:
    """Steps from the leaves of what a block got and gave to tensors that the next block gets.

    Args:
        steps: in their order.
        shapes: of the leaves, None where they are no tensors; the first slots are theirs.
    """

    steps: tuple[_Step, ...]
    shapes: tuple[tuple[int, ...] | None, ...]

    def fits(self, leaves: Sequence[Any]) -> bool:
        """Whether these leaves have the shapes of the recorded pass."""
        return self.shapes == _shapes(leaves)

    def replay(self, leaves: Sequence[Any]) -> dict[int, Any]:
        """The value of every slot; the leaves are not written to."""
        values: dict[int, Any] = dict(enumerate(leaves))
        if any(step.writes() for step in self.steps):
            values = {number: leaf.clone() if isinstance(leaf, Tensor) else leaf for number, leaf in values.items()}

        def value(slot: _Slot) -> Any:
            return values[slot.number]

        with torch.no_grad():
            for step in self.steps:
                args, kwargs = pytree.tree_map_only(_Slot, value, (step.args, step.kwargs))
                given = pytree.tree_leaves(step.function(*args, **kwargs))
                values |= {number: leaf for number, leaf in zip(step.results, given, strict=True) if number is not None}
        return values


class GlueRecorder(TorchFunctionMode):
    """Takes down every function of torch that is called between `begin` and `stop`, while it is entered.

    Args:
        model: its parameters and buffers are constants,
        changing: but for those of these modules.
    """

    def __init__(self, model: nn.Module, changing: Iterable[nn.Module]) -> None:
        super().__init__()
        theirs = {id(tensor) for module in changing for tensor in (*module.parameters(), *module.buffers())}
        self._constants = {id(tensor) for tensor in (*model.parameters(), *model.buffers())} - theirs
        self.stop()

    def begin(self, leaves: Sequence[Any]) -> None:
        """Start anew behind a block.

        Args:
            leaves: of what it got and gave.
        """
        self._active, self._opaque = True, False
        self._leaves = list(leaves)
        self._kept = list(leaves)  # as long as they live no other tensor has their id
        self._slots = {id(leaf): number for number, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        self._unknown: set[int] = set()
        self._steps: list[_Step] = []

    def stop(self) -> None:
        """Forget what was taken down, and take down no more."""
        self.begin(())
        self._active = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the function, and takes it down."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self._active:
            return result
        given = pytree.tree_leaves(result)
        if getattr(func, "__name__", "") in _OPAQUE or "out" in kwargs:
            self._opaque = True
        elif any(isinstance(leaf, Tensor) for leaf in given):
            self._take_down(func, args, kwargs, given)
        return result

    def _take_down(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], given: list[Any]) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        known = all(id(tensor) in self._slots or id(tensor) in self._constants for tensor in tensors)
        known &= not any(self._slots.get(id(tensor)) in self._unknown for tensor in tensors)
        args, kwargs = pytree.tree_map_only(Tensor, self._slot_or_constant, (args, kwargs))
        numbers = tuple(self._number(leaf) if isinstance(leaf, Tensor) else None for leaf in given)
        if known:
            self._steps.append(_Step(func, args, kwargs, numbers))
        else:
            self._unknown |= {number for number in numbers if number is not None}

    def _number(self, tensor: Tensor) -> int:
        if id(tensor) not in self._slots:
            self._slots[id(tensor)] = len(self._kept)
            self._kept.append(tensor)
        return self._slots[id(tensor)]

    def _slot_or_constant(self, tensor: Tensor) -> Any:
        number = self._slots.get(id(tensor))
        return tensor if number is None else _Slot(number)

    def slot(self, tensor: Any) -> int | None:
        """The slot of a tensor that replaying gives; None where it does not."""
        number = self._slots.get(id(tensor)) if isinstance(tensor, Tensor) else None
        return None if self._opaque or number is None or number in self._unknown else number

    def glue(self, wanted: dict[int, Tensor]) -> Glue | None:
        """What was taken down, if it gives these tensors by their slots when replayed, bit for bit; else None."""
        glue = Glue(tuple(self._steps), _shapes(self._leaves))
        values = glue.replay(self._leaves)
        return glue if all(_same(values[number], tensor) for number, tensor in wanted.items()) else None


def _shapes(leaves: Sequence[Any]) -> tuple[tuple[int, ...] | None, ...]:
    return tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else None for leaf in leaves)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
