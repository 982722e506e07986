"""The ONNX side: layers found in the graph, seen by outputs that are added to it in memory, and cut out to run alone.

What a convolution hands on as codes is looked at as codes, and the other side's output is rounded to the same codes: a
float between them would be computed by another kernel than the one that runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from narrowcast.data import Batch
from narrowcast.errors import KernelError
from narrowcast.kernels.reference_linear import FUSED
from narrowcast.parity.bounds import Arithmetic
from narrowcast.parity.runtime import Runtime, Unit, Watcher


class OnnxRuntime(Runtime):
    """An ONNX graph that ONNX Runtime runs.

    Args:
        name: for people.
        model: an `OnnxModule`.
        kernels: must be None: only narrowcast's ops have a choice.

    Raises:
        KernelError: kernels are asked for.
    """

    def __init__(self, name: str, model: Any, kernels: str | None) -> None:
        if kernels is not None:
            raise KernelError(f"{name} runs in ONNX Runtime, which has no kernels {kernels!r}; leave out the choice")
        self.name, self.model = name, model
        self.kernels = f"ONNX Runtime {importlib.import_module('onnxruntime').__version__}"
        self._room = importlib.import_module("narrowcast.models.onnx_parts")
        self._excerpts = importlib.import_module("narrowcast.models.onnx_excerpts")
        self._sessions = importlib.import_module("narrowcast.models.onnx_session")
        self._noted = self._room.notes_of(model.graph, self._room.LAYERS)
        self._found = self._room.find_parts(model.graph)
        self._beside_graph = False
        self._parts: dict[str, Any] = {part.layer: part for part in self._found}
        self._alone: dict[tuple[str, str, tuple[int, ...]], Any] = {}
        self._watched: tuple[Mapping[str, Unit], Watcher] | None = None
        self._seen: tuple[tuple[str, ...], Any] | None = None

    def meet(self, other: Runtime) -> list[str]:
        """See `Runtime`: layers have the names of their weights; beside another graph else of their outputs."""
        if isinstance(other, OnnxRuntime):
            self._beside_graph = True
            known = {part.layer for part in other._found}
            self._parts = {part.layer if part.layer in known else part.output: part for part in self._found}
        found = importlib.import_module("narrowcast.models.onnx_warnings").warnings_of(self.model.graph)
        if hidden := self._room.hidden_layers(self.model.graph):
            found = [*found, f"{hidden} products are inside of If or Loop nodes: not compared by themselves"]
        return list(found)

    def names(self) -> set[str]:
        """See `Runtime`."""
        values = {str(value.name) for node in self.model.graph.graph for value in node.outputs}
        return set(self._parts) | (values if self._beside_graph else set())

    def units(self) -> dict[str, Unit]:
        """See `Runtime`."""
        return {name: self._unit(name, self._end(name)) for name in self._parts}

    def unit(self, name: str, end: str) -> Unit:
        """See `Runtime`."""
        return self._unit(name, end)

    def _end(self, name: str) -> str:
        part = self._parts[name]
        if self._beside_graph:
            return "" if part.end == part.output else str(part.end)
        return str(self._noted.get(part.layer, {}).get("end", ""))

    def _unit(self, name: str, end: str) -> Unit:
        part = self._parts[name]
        behind = self._noted.get(part.layer, {}).get("behind", "none")
        return Unit(name, part.op, Arithmetic(part.kind, part.formats, behind, step=_step(part)), end)

    @contextmanager
    def watching(self, units: Mapping[str, Unit], watcher: Watcher) -> Iterator[None]:
        """See `Runtime`; the graph on disk and the caller's model stay as they are."""
        self._watched = units, watcher
        try:
            yield
        finally:
            self._watched = None

    def run(self, batch: Batch) -> Any:
        """See `Runtime`."""
        if self._watched is None:
            return batch.run(self.model)
        units, watcher = self._watched
        look = _Looking(lambda args, kwargs: self._look(units, args, kwargs))
        answers: dict[str, Tensor] = batch.run(look)
        for name, unit in units.items():
            part = self._parts[name]
            given = _unpadded(_meant(answers[part.given], part.given_codes), part.padding)
            watcher.enter(name, (given, *(answers[value] for value in part.beside)), {})
            watcher.leave(name, self._output(part, unit, answers[self._shown(part, unit)]))
        outputs = tuple(answers[name] for name in self.model.output_names)
        return outputs[0] if len(outputs) == 1 else outputs

    def _look(self, units: Mapping[str, Unit], args: Any, kwargs: Any) -> dict[str, Tensor]:
        """All outputs of the graph, and what goes into and comes out of these layers."""
        names: dict[str, Any] = {}
        for name, unit in units.items():
            part = self._parts[name]
            names[self._shown(part, unit)] = part.handed_codes if part.handed else None
            names.setdefault(part.given, part.given_codes)
            for value in part.beside:
                names.setdefault(value, None)
        key = tuple(names)
        if self._seen is None or self._seen[0] != key:
            graph = self._excerpts.showing(self.model.graph, names)
            self._seen = key, self._sessions.OnnxModule(graph, self.name)
        shown = self._seen[1]
        got = shown.answer(*args, **kwargs)
        got = got if isinstance(got, tuple) else (got,)
        feeds = self._sessions.feeds_of(shown.session, shown.input_names, args, kwargs)
        inputs = {name: torch.from_numpy(array) for name, array in feeds.items()}
        return inputs | dict(zip(shown.output_names, got, strict=True))

    def _shown(self, part: Any, unit: Unit) -> str:
        """Name of the value at which a layer's output is looked at."""
        if part.handed:
            return str(part.handed)
        return unit.end if self._beside_graph and unit.end else str(part.end)

    def _output(self, part: Any, unit: Unit, value: Tensor) -> Tensor:
        if part.handed:
            return _meant(value, part.handed_codes)
        return FUSED[unit.arithmetic.behind](value)

    def call(self, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `Runtime`."""
        part = self._parts[unit.name]
        x, *beside = (*args, *kwargs.values())
        if part.given_codes is not None:
            x = self._codes(x, part)
        ranks = tuple(value.dim() for value in (x, *beside))
        key = (unit.name, self._shown(part, unit), ranks)
        if key not in self._alone:
            graph = self._excerpts.cut(self.model.graph, part, self._shown(part, unit), ranks)
            self._alone[key] = self._sessions.OnnxModule(graph, f"{unit.name} of {self.name}")
        return self._output(part, unit, self._alone[key].answer(x, *beside))

    def _codes(self, x: Tensor, part: Any) -> Tensor:
        """The input as the product reads it, rounded as the other side does: torch's kernels multiply by 1 / scale."""
        sides = [size for pair in reversed(part.padding) for size in pair]
        x = functional.pad(x, sides) if sides else x
        scale, zero = _spread(part.given_codes, x.dim())
        steps = x / scale if self._beside_graph else x * (1.0 / scale)
        signed = part.given_codes.signed
        low, high = (-128, 127) if signed else (0, 255)
        return (steps.round() + zero).clamp(low, high).to(torch.int8 if signed else torch.uint8)

    def handed(self, unit: Unit, outputs: list[Tensor]) -> list[Tensor]:
        """See `Runtime`: what rounding to 8 bits leaves of it."""
        part = self._parts[unit.name]
        if not part.handed or len(outputs) != 1:
            return outputs
        scale, zero = _spread(part.handed_codes, outputs[0].dim())
        low, high = (-128, 127) if part.handed_codes.signed else (0, 255)
        codes = ((outputs[0].float() / scale).round() + zero).clamp(low, high)
        return [(codes - zero) * scale]

    def products(self, unit: Unit, args: tuple[Any, ...]) -> Tensor | None:
        """See `Runtime`; not known."""
        return None

    def stored(self, unit: Unit) -> dict[str, Tensor]:
        """See `Runtime`: the codes of convolutions and products, as matrices [out, in * kernel]."""
        part = self._parts[unit.name]
        array = self._room.stored_codes(self.model.graph, part)
        return {} if array is None else {"weight codes": torch.from_numpy(array)}


class _Looking(nn.Module):
    """Calls a function like a module, as batches want it."""

    def __init__(self, look: Callable[[Any, Any], dict[str, Tensor]]) -> None:
        super().__init__()
        self.look = look

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        return self.look(args, kwargs)


def _spread(codes: Any, rank: int) -> tuple[Tensor, Tensor]:
    """Scale and zero points as tensors that an image or a row is divided by."""
    shape = [1] * rank
    if codes.scale.size > 1:
        shape[codes.axis] = codes.scale.size
    scale = torch.from_numpy(codes.scale.copy()).view(shape)
    return scale, torch.from_numpy(codes.zero.copy()).float().expand(codes.scale.size).view(shape)


def _meant(value: Tensor, codes: Any) -> Tensor:
    """Codes as the values that they mean; floats as they are."""
    if codes is None:
        return value
    scale, zero = _spread(codes, value.dim())
    return (value.float() - zero) * scale


def _unpadded(value: Tensor, padding: tuple[tuple[int, ...], ...]) -> Tensor:
    for axis, (before, after) in enumerate(padding):
        value = value.narrow(axis, before, value.shape[axis] - before - after)
    return value


def _step(part: Any) -> float:
    """The largest step of the codes that a layer hands on; 0 where it hands on floats."""
    return 0.0 if not part.handed else float(part.handed_codes.scale.max())
