"""The model's inputs and what becomes of them on their way through its blocks.

A `Stream` stands before one block at a time and holds that block's inputs for every kept call of the model: of the
float model, or of the model whose earlier blocks are quantized. It moves on by running the block that it stands
before, where the next block's inputs are known to follow from that, and otherwise by running the model up to the
next block. Both give the same tensors, bit for bit.

Memory: the inputs of one block for every kept call, and its outputs while it moves on. The kept calls are bounded: at
most 1024 rows (images, sequences), and no more than fit 2 GiB at the widest block; they are spread over the data.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from narrowcast.models import Blocks, ModelBlock
from narrowcast.models.modules import get_module

MOST_ROWS = 1024
MOST_BYTES = 2 << 30
# The inputs and outputs of a block are held by the float and by the quantized stream, and once more by a block solver.
_HELD = 3


@dataclass(frozen=True)
class Call:
    """One call of the model.

    Args:
        args, kwargs: what it was called with.
        rows: of the first tensor.
        runner: what runs the model instead, where the data never calls the model itself.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    rows: int = 1
    runner: Callable[[nn.Module], Any] | None = None

    def run(self, model: nn.Module) -> Any:
        """The model's answer."""
        if self.runner is not None:
            return self.runner(model)
        args, kwargs = fresh((self.args, self.kwargs))
        return model(*args, **kwargs)


def fresh(values: Any) -> Any:
    """Arguments of a call that may write to them: tensors cloned, caches and other objects copied."""
    plain = (bool, int, float, str, torch.dtype, torch.device, type(None))

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return leaf.clone()
        return leaf if isinstance(leaf, plain) or callable(leaf) else copy.deepcopy(leaf)

    return pytree.tree_map(copied, values)


@dataclass
class Recording:
    """Calls of the model, spread over all there were: data in an order (images by class) begins with a part of itself.

    Kept are calls whose numbers are multiples of a stride. Where they come to be too many the stride doubles, and every
    call that is kept from then on takes the place of the first that is no multiple of it.

    Args:
        calls: at most `MOST_ROWS` rows of them, at least one.
        total: how many there were.
    """

    calls: list[Call] = field(default_factory=list)
    total: int = 0
    _numbers: list[int] = field(default_factory=list)
    _stride: int = 1

    def add(self, make: Callable[[], Call]) -> None:
        """Take in the next call, made only if it is kept."""
        number, self.total = self.total, self.total + 1
        if number % self._stride:
            return
        self.calls.append(make())
        self._numbers.append(number)
        while len(self.calls) > 1 and sum(call.rows for call in self.calls) > MOST_ROWS:
            self._drop()

    def _drop(self) -> None:
        found = next((index for index, number in enumerate(self._numbers) if number % self._stride), None)
        if found is None:
            self._stride *= 2
            return
        del self.calls[found], self._numbers[found]


@contextmanager
def recorded(model: nn.Module, data: Any) -> Iterator[Recording]:
    """The calls of the model that are made while this is open; `data` itself where it never calls the model."""
    recording = Recording()

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim()]
        recording.add(lambda: Call(args, dict(kwargs), tensors[0].shape[0] if tensors else 1))

    handle = model.register_forward_pre_hook(record, with_kwargs=True, prepend=True)
    try:
        yield recording
    finally:
        handle.remove()
    if not recording.total and callable(data):
        recording.calls.append(Call(runner=data))
        recording.total = 1


def keep(recording: Recording, blocks: Blocks) -> tuple[list[Call], list[str]]:
    """Calls spread over the recorded ones that fit the memory, at least one, and a note where they are not all."""
    widest = max((block.row_bytes for block in blocks.blocks), default=0.0)
    most = min(MOST_ROWS, int(MOST_BYTES / (_HELD * widest))) if widest else MOST_ROWS
    calls = recording.calls
    count = len(calls)
    while count > 1 and sum(call.rows for call in _spread(calls, count)) > most:
        count -= 1
    kept = _spread(calls, count)
    if len(kept) == recording.total:
        return kept, []
    rows = sum(call.rows for call in kept)
    why = f"at most {MOST_ROWS}" if most == MOST_ROWS else f"{most} fit {MOST_BYTES >> 30} GiB at the widest block"
    return kept, [f"blocks were solved on {rows} rows, spread over the data ({why})"]


def _spread(calls: list[Call], count: int) -> list[Call]:
    return [calls[number * len(calls) // count] for number in range(count)]


Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""The arguments of a block."""


def reached_by(model: nn.Module, blocks: Sequence[ModelBlock], calls: Sequence[Call]) -> list[frozenset[int]]:
    """Which blocks every call reaches, found by running it: data may take different ways through a model."""
    entered: set[int] = set()
    handles = [
        get_module(model, block.path).register_forward_pre_hook(lambda m, a, index=index: entered.add(index))
        for index, block in enumerate(blocks)
    ]
    reached = []
    try:
        for call in calls:
            entered.clear()
            with torch.no_grad():
                call.run(model)
            whole = {index for index, block in enumerate(blocks) if block.path == ""}
            reached.append(frozenset(entered | whole))
    finally:
        for handle in handles:
            handle.remove()
    return reached


class _ReachedError(BaseException):
    """The model has been run far enough; no `except Exception` of the model's own code catches it."""


class Stream:
    """What one version of the model gives to one block after another.

    Args:
        model: gives the model, in which modules may be exchanged between calls.
        blocks: in the order in which they run.
        calls: of the model.
        reached: for every call, which blocks it reaches; see `reached_by`.
    """

    def __init__(
        self, model: Callable[[], nn.Module], blocks: Sequence[ModelBlock], calls: Sequence[Call],
        reached: Sequence[frozenset[int]],
    ) -> None:  # fmt: skip
        self.model, self.blocks, self.calls, self.reached = model, blocks, calls, reached
        self.at = -1
        self.inputs: list[Inputs | None] = []
        self._outputs: list[Any] | None = None

    def enter(self, index: int) -> None:
        """Stand before a block; None are the inputs of a call that does not reach it."""
        if self.at == index:
            return
        before = self.inputs if 0 <= self.at == index - 1 else [None] * len(self.calls)
        following: list[Inputs | None] = []
        for number, entry in enumerate(before):
            following.append(self._next(index, number, entry))
            before[number] = None  # no two blocks' inputs of one call at a time
        self.at, self.inputs, self._outputs = index, following, None

    def _next(self, index: int, number: int, entry: Inputs | None) -> Inputs | None:
        if index not in self.reached[number]:
            return None
        link, found = self.blocks[index].link, None
        if link is not None and entry is not None:
            found = link.follow(entry, self._outputs[number] if self._outputs is not None else self.run(number))
        return found if found is not None else _run_up_to(self.model(), self.blocks[index].path, self.calls[number])

    def run(self, number: int) -> Any:
        """What the block gives for one call; None where the call does not reach it."""
        entry = self.inputs[number]
        if entry is None:
            return None
        path = self.blocks[self.at].path
        with torch.no_grad():
            if path == "":
                return self.calls[number].run(self.model())
            args, kwargs = fresh(entry)
            return get_module(self.model(), path)(*args, **kwargs)

    def outputs(self) -> list[Any]:
        """What the block gives for every call; kept until the stream moves on."""
        if self._outputs is None:
            self._outputs = [self.run(number) for number in range(len(self.inputs))]
        return self._outputs

    def run_until(self, number: int, paths: Sequence[str]) -> None:
        """Run the block for one call, no further than all modules at `paths` have been called."""
        if self.inputs[number] is not None:
            _stopping(self.model(), paths, lambda: self.run(number))


def _stopping(model: nn.Module, paths: Sequence[str], run: Callable[[], Any]) -> None:
    waiting = set(paths)

    def after(path: str) -> None:
        waiting.discard(path)
        if not waiting:
            raise _ReachedError

    handles = [get_module(model, path).register_forward_pre_hook(lambda m, a, path=path: after(path)) for path in paths]
    try:
        run()
    except _ReachedError:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _run_up_to(model: nn.Module, path: str, call: Call) -> Inputs | None:
    """The inputs of the module at a path; None where the call does not get there."""
    if path == "":
        return call.args, call.kwargs
    found: list[Inputs] = []

    def reached(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _ReachedError

    handle = get_module(model, path).register_forward_pre_hook(reached, with_kwargs=True)
    try:
        with torch.no_grad():
            call.run(model)
    except _ReachedError:
        pass
    finally:
        handle.remove()
    return found[0] if found else None


@contextmanager
def without_cache(*models: nn.Module) -> Iterator[None]:
    """Transformers' decoders keep keys and values of every call unless told not to: nothing reads them here."""
    configs = {id(config): config for model in models if (config := getattr(model, "config", None)) is not None}
    switched = [config for config in configs.values() if getattr(config, "use_cache", None) is True]
    for config in switched:
        config.use_cache = False
    try:
        yield
    finally:
        for config in switched:
            config.use_cache = True
