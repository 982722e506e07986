"""A block of a model as a block solver sees it: other weights in, its output out, differentiable.

The float module of the block is called with its weights exchanged (`torch.func.functional_call`), so the model itself
never changes and no gradient reaches the caller's parameters. Inputs of layers are rounded as their installed modules
will round them (`input_rounding.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from narrowcast.core import QuantSpec
from narrowcast.errors import DataError
from narrowcast.methods import InputTraining, Seen
from narrowcast.models import TorchModel
from narrowcast.nn import Activation
from narrowcast.pipeline.input_rounding import rounding_hook
from narrowcast.pipeline.judge import first_tensor
from narrowcast.pipeline.streams import Inputs, fresh


@dataclass(frozen=True)
class LayerUse:
    """One layer of the block.

    Args:
        path: of its module, relative to the block's.
        parameter: name of the weight in it.
        spec: format of the weight.
        activation: treatment of its input.
        ratio: [1 or out, columns] what its weight was multiplied by to take in static scales; None for 1.
        adjustable: whether the scale of its static input is its own, so that a solver may multiply it.
    """

    path: str
    parameter: str
    spec: QuantSpec
    activation: Activation
    ratio: Tensor | None = None
    adjustable: bool = False


@dataclass(frozen=True)
class _Batch:
    """Calls of the block that can run as one: rows of the same shapes, everything else the same.

    Args:
        leaves: of (args, kwargs); those with rows have all rows.
        spec: structure of them.
        rowed: positions of the leaves that have rows; empty where the call cannot be cut.
        target: the float block's output.
        first: number of its first sample.
        samples: rows, or 1 where it cannot be cut.
    """

    leaves: list[Any]
    spec: pytree.TreeSpec
    rowed: tuple[int, ...]
    target: Tensor
    first: int
    samples: int

    def part(self, rows: list[int]) -> tuple[Inputs, Tensor]:
        """Inputs and target of some of its samples."""
        if not self.rowed:
            args, kwargs = fresh(pytree.tree_unflatten(self.leaves, self.spec))
            return (args, kwargs), self.target
        chosen = torch.tensor(rows)
        leaves = [leaf[chosen] if index in self.rowed else leaf for index, leaf in enumerate(self.leaves)]
        args, kwargs = fresh(pytree.tree_unflatten(leaves, self.spec))
        return (args, kwargs), self.target[chosen]


class ModuleBlock:
    """Implements `narrowcast.methods.Block`.

    Args:
        adapter: knows how weights lie in modules.
        module: the float module of the block.
        uses: the layers to solve and those solved already, by name of the weight.
        weights: of those to solve, as they are solved: static scales taken in.
        fixed: what those solved already have become.
        seen: what calibration saw at the input of each.
        inputs: of the block, with the blocks before it quantized, for every call that reaches it.
        targets: the float block's output for the same calls.
    """

    def __init__(
        self, adapter: TorchModel, module: nn.Module, uses: Mapping[str, LayerUse], weights: Mapping[str, Tensor],
        fixed: Mapping[str, Tensor], seen: Mapping[str, Seen], inputs: Sequence[Inputs], targets: Sequence[Any],
    ) -> None:  # fmt: skip
        self.weights: Mapping[str, Tensor] = dict(weights)
        self.seen: Mapping[str, Seen] = dict(seen)
        self.specs: Mapping[str, QuantSpec] = {name: uses[name].spec for name in weights}
        self.adjustable = frozenset(name for name in weights if uses[name].adjustable)
        self.rounds_inputs = any(use.activation.mode == "static" for use in uses.values())
        self._adapter, self._module, self._uses, self._fixed = adapter, module, uses, dict(fixed)
        named = dict(module.named_parameters(remove_duplicate=False))
        self._frozen = {name: value.detach() for name, value in named.items()}
        self._tied = {name: [n for n, other in named.items() if other is value] for name, value in named.items()}
        self._batches = self._batched(inputs, targets)
        self.samples = sum(batch.samples for batch in self._batches)

    def output(
        self, weights: Mapping[str, Tensor], indices: Sequence[int], training: InputTraining | None = None
    ) -> Tensor:
        """See `methods.Block`: [rows, ...], or [tokens, features] where samples differ in length."""
        return _joined([self._call(weights, inputs, training) for inputs, _ in self._parts(indices)])

    def target(self, indices: Sequence[int]) -> Tensor:
        """See `methods.Block`: of the shape of `output`."""
        return _joined([target for _, target in self._parts(indices)])

    def _parts(self, indices: Sequence[int]) -> list[tuple[Inputs, Tensor]]:
        parts = []
        for batch in self._batches:
            rows = [i - batch.first for i in indices if batch.first <= i < batch.first + batch.samples]
            if rows:
                parts.append(batch.part(rows))
        return parts

    def _call(self, weights: Mapping[str, Tensor], inputs: Inputs, training: InputTraining | None = None) -> Tensor:
        tensors = dict(self._frozen)
        for name, matrix in {**self._fixed, **weights}.items():
            use = self._uses[name]
            owner = self._module.get_submodule(use.path) if use.path else self._module
            plain = matrix if use.ratio is None else matrix / use.ratio
            full = f"{use.path}.{use.parameter}" if use.path else use.parameter
            shaped = self._adapter.as_parameter(owner, use.parameter, plain).to(self._frozen[full].dtype)
            tensors |= dict.fromkeys(self._tied[full], shaped)
        with self._rounded_inputs(training):
            output = first_tensor(functional_call(self._module, tensors, inputs[0], inputs[1], tie_weights=False))
        if output is None:
            raise DataError("the block gives no tensor; solve its layers by a method that works layer by layer")
        return output

    @contextmanager
    def _rounded_inputs(self, training: InputTraining | None) -> Iterator[None]:
        handles = []
        for name, use in {use.path: (name, use) for name, use in self._uses.items()}.values():
            module = self._module.get_submodule(use.path) if use.path else self._module
            if use.activation.mode != "float":
                hook = rounding_hook(name, use.activation, use.spec, training)
                handles.append(module.register_forward_pre_hook(hook))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _batched(self, inputs: Sequence[Inputs], targets: Sequence[Any]) -> list[_Batch]:
        """The calls, those that can run as one joined; every batch is tried before it is relied on."""
        pools: list[_Pool] = []
        for call, given in zip(inputs, targets, strict=True):
            target = first_tensor(given)
            if target is None:
                raise DataError("the block gives no tensor; solve its layers by a method that works layer by layer")
            leaves, spec = pytree.tree_flatten(call)
            rowed = _rowed(leaves, target)
            pool = next((pool for pool in pools if rowed and pool.takes(leaves, spec, rowed, target)), None)
            if pool is None:
                pools.append(_Pool(spec, rowed, [leaves], [target]))
            else:
                pool.calls.append(leaves)
                pool.targets.append(target)
        batches: list[_Batch] = []
        for pool in pools:
            first = batches[-1].first + batches[-1].samples if batches else 0
            batches += self._cut(pool, first)
        return batches

    def _cut(self, pool: _Pool, first: int) -> list[_Batch]:
        """One batch of all rows where they do not depend on each other, else every call as it is."""
        layouts = [torch.contiguous_format]
        if any(isinstance(module, nn.Conv2d) for module in self._module.modules()):
            # a training step of an inverted residual takes a third less time than on contiguous images; not for all
            # modules: `view` behind a convolution may refuse
            layouts.insert(0, torch.channels_last)
        for layout in layouts:
            joined = pool.joined(first, layout)
            if self._can_be_cut(joined, pool):
                return [joined]
        return pool.whole(first)

    def _can_be_cut(self, joined: _Batch, pool: _Pool) -> bool:
        """Whether its rows do not depend on each other, established by running the first and the last alone."""
        if joined.samples == 1:
            return True
        last = joined.samples - 1
        try:
            with torch.no_grad():
                pair = self._call(self.weights, joined.part([0, last])[0])
                alone = torch.cat([self._call(self.weights, joined.part([row])[0]) for row in (0, last)])
                whole = self._call(self.weights, fresh(pytree.tree_unflatten(pool.calls[0], pool.spec)))
        except (RuntimeError, ValueError, IndexError, TypeError):
            return False  # what seems to hold one row per sample is something else
        return _same(pair, alone) and _same(whole[:1], alone[:1])


@dataclass
class _Pool:
    """Calls that may be joined; see `_Batch`."""

    spec: pytree.TreeSpec
    rowed: tuple[int, ...]
    calls: list[list[Any]]
    targets: list[Tensor]

    def takes(self, leaves: list[Any], spec: pytree.TreeSpec, rowed: tuple[int, ...], target: Tensor) -> bool:
        """Whether one more call goes with these."""
        mine = self.calls[0]
        if spec != self.spec or rowed != self.rowed or target.shape[1:] != self.targets[0].shape[1:]:
            return False
        return all(
            mine[i].shape[1:] == leaf.shape[1:] and mine[i].dtype == leaf.dtype
            if i in rowed
            else mine[i] is leaf or _equal(mine[i], leaf)
            for i, leaf in enumerate(leaves)
        )

    def joined(self, first: int, layout: torch.memory_format) -> _Batch:
        """All rows as one batch; tensors of four dimensions in a memory layout."""

        def cat(parts: list[Tensor]) -> Tensor:
            whole = torch.cat(parts)
            return whole.contiguous(memory_format=layout) if whole.dim() == 4 else whole

        leaves = list(self.calls[0])
        for i in self.rowed:
            leaves[i] = cat([call[i] for call in self.calls])
        target = cat(self.targets) if self.rowed else self.targets[0]
        return _Batch(leaves, self.spec, self.rowed, target, first, target.shape[0] if self.rowed else 1)

    def whole(self, first: int) -> list[_Batch]:
        """Every call as one sample."""
        pairs = zip(self.calls, self.targets, strict=True)
        return [_Batch(call, self.spec, (), target, first + i, 1) for i, (call, target) in enumerate(pairs)]


def _rowed(leaves: list[Any], target: Tensor) -> tuple[int, ...]:
    """The leaves that seem to hold one row per sample; none where the target does not."""
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    if not tensors or target.dim() == 0 or target.shape[0] != leaves[tensors[0]].shape[0]:
        return ()
    return tuple(i for i in tensors if leaves[i].shape[0] == target.shape[0])


def _same(one: Tensor, other: Tensor) -> bool:
    # the same numbers up to float rounding, and the codes of inputs that it may tip
    return one.shape == other.shape and bool((one - other).norm() <= 1e-2 * one.norm() + 1e-6)


def _equal(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        return mine.shape == theirs.shape and mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    return isinstance(mine, bool | int | float | str) and type(mine) is type(theirs) and bool(mine == theirs)


def _joined(parts: list[Tensor]) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(parts)
    return torch.cat([part.flatten(0, -2) for part in parts])
