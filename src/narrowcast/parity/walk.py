"""One pass over the data: both models run batch by batch, and every common layer is compared as it runs.

The reference runs first. As each of its layers is entered, the artefact's layer is called alone on a copy of the same
inputs; as it is left, the two outputs are compared and only the reference's is kept, until the artefact has run the
same batch. So memory holds the outputs of one batch at most, however much data there is.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from narrowcast.data import Batch
from narrowcast.errors import ModelError, NarrowcastError
from narrowcast.parity.bounds import Bound, bound_for
from narrowcast.parity.difference import Tally
from narrowcast.parity.pairs import Pair
from narrowcast.parity.runtime import Runtime
from narrowcast.parity.tensors import check_alike, copied, half_inputs, tensors_of


class Watched:
    """What is known of one layer.

    Args:
        pair: the layer on both sides.
    """

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.alone, self.in_model = Tally(), Tally()
        self.bound: Bound | None = None
        self.ran = [0, 0]


class Walk:
    """The pass over the data.

    Args:
        reference, artefact: both sides.
        pairs: the common layers.
        asked: the bound that the caller states for every layer, or None.
    """

    def __init__(self, reference: Runtime, artefact: Runtime, pairs: Mapping[str, Pair], asked: Bound | None) -> None:
        self.reference, self.artefact = reference, artefact
        self.layers = {name: Watched(pair) for name, pair in pairs.items()}
        self.output, self.asked = Tally(), asked
        self.order: list[str] = []  # of layers that ran
        self.batches = self.samples = 0
        self._runtime = type(reference) is type(artefact)
        self._kernels = self._runtime and reference.kernels == artefact.kernels
        self._calling = False  # a layer alone: sides may share modules, whose hooks must not count that call
        self._alone: dict[str, deque[tuple[list[Tensor], Tensor | None] | Exception]] = defaultdict(deque)
        self._expected: dict[str, deque[list[Tensor]]] = defaultdict(deque)

    def bound_of(self, pair: Pair, *, half: bool = False) -> Bound | None:
        """What a layer alone may differ by, from the arithmetic of both sides; None where no bound can be stated."""
        ours, theirs = pair.reference.arithmetic, pair.artefact.arithmetic
        return bound_for(ours, theirs, same_runtime=self._runtime, same_kernels=self._kernels, half=half)

    def step(self, batch: Batch) -> None:
        """Compare both models on one batch."""
        ours = {name: layer.pair.reference for name, layer in self.layers.items()}
        theirs = {name: layer.pair.artefact for name, layer in self.layers.items()}
        with self.reference.watching(ours, _Reference(self)):
            expected = self._run("reference", self.reference, batch)
        outputs = [tensor.clone() for tensor in tensors_of(expected)]
        del expected
        with self.artefact.watching(theirs, _Artefact(self)):
            got = tensors_of(self._run("artefact", self.artefact, batch))
        self._compare(f"the output of batch {self.batches}", self.output, outputs, got, self.asked)
        self._check_counts()
        self.batches += 1
        self.samples += batch.samples

    def _run(self, side: str, runtime: Runtime, batch: Batch) -> Any:
        try:
            return runtime.run(batch)
        except NarrowcastError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
            raise ModelError(
                f"batch {self.batches} does not run through the {side}, {runtime.name}: {_first_line(error)}; check "
                "the shape, dtype and names of the inputs, and that both models take the same ones"
            ) from error

    def entered(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The reference enters a layer: call the artefact's on the same inputs."""
        if self._calling:
            return
        layer = self.layers[name]
        if layer.bound is None:
            layer.bound = self.asked or self.bound_of(layer.pair, half=half_inputs(args))
        unit = layer.pair.artefact
        self._calling = True
        try:
            output = self.artefact.call(unit, *copied((args, kwargs)))
        except (RuntimeError, TypeError, ValueError, IndexError, NarrowcastError) as error:
            self._alone[name].append(error)  # it may be the inputs' fault: then the reference refuses them as well
            return
        finally:
            self._calling = False
        products = None
        if layer.bound and layer.bound.of_products:
            products = self.artefact.products(unit, args)
            products = self.reference.products(layer.pair.reference, args) if products is None else products
        self._alone[name].append((tensors_of(copied(output)), products))

    def left(self, name: str, output: Any) -> None:
        """The reference leaves a layer: compare, and keep its output for the artefact's run."""
        if self._calling or not self._alone[name]:  # the end of a layer may run without its beginning
            return
        layer = self.layers[name]
        if name not in self.order:  # by leaving: a group of layers comes behind what it is made of
            self.order.append(name)
        expected = [tensor.detach().clone() for tensor in tensors_of(output)]
        expected = self.artefact.handed(layer.pair.artefact, expected)
        called = self._alone[name].popleft()
        if isinstance(called, Exception):
            raise ModelError(
                f"layer {name!r} of the artefact ({layer.pair.artefact.type}) does not take what the reference's "
                f"({layer.pair.reference.type}) gets in batch {self.batches}: {_first_line(called)}; the two are of "
                "different structure, so compare a model with what was made of that very model"
            ) from called
        got, products = self.reference.handed(layer.pair.reference, called[0]), called[1]
        where = f"layer {name!r}, alone, in batch {self.batches}"
        self._compare(where, layer.alone, expected, got, layer.bound, products)
        self._expected[name].append(expected)
        layer.ran[0] += 1

    def arrived(self, name: str, output: Any) -> None:
        """The artefact leaves a layer in its own run."""
        layer = self.layers[name]
        layer.ran[1] += 1
        if self._expected[name]:
            where = f"layer {name!r} in batch {self.batches}"
            got = self.reference.handed(layer.pair.reference, tensors_of(output))
            self._compare(where, layer.in_model, self._expected[name].popleft(), got, None)

    def _compare(
        self, where: str, tally: Tally, expected: list[Tensor], got: list[Tensor], bound: Bound | None,
        products: Tensor | None = None,
    ) -> None:  # fmt: skip
        check_alike(where, expected, got)
        for index, (ours, theirs) in enumerate(zip(expected, got, strict=True)):
            fitting = products if index == 0 and products is not None and products.shape == ours.shape else None
            tally.add(ours, theirs, bound, self.batches, fitting)

    def _check_counts(self) -> None:
        """Refuse a layer that ran on both sides, but not equally often; drop what waits for none."""
        self._expected.clear()
        self._alone.clear()
        for name, layer in self.layers.items():
            ours, theirs = layer.ran
            if ours and theirs and ours != theirs:
                raise ModelError(
                    f"layer {name!r} ran {ours} times in the reference and {theirs} times in the artefact up to batch "
                    f"{self.batches}; the two are of different structure, so compare a model with what was made of "
                    "that very model"
                )


class _Reference:
    """Watches the reference's run."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.walk.entered(name, args, kwargs)

    def leave(self, name: str, output: Any) -> None:
        self.walk.left(name, output)


class _Artefact:
    """Watches the artefact's run."""

    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """What enters is the artefact's own affair: only outputs are compared in its run."""

    def leave(self, name: str, output: Any) -> None:
        self.walk.arrived(name, output)


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}" if text else type(error).__name__
