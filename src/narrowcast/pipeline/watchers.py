"""What runs past the layers of a block: hooks that show it, and watchers that keep what solvers ask for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from narrowcast.models.modules import get_module
from narrowcast.models.patches import evenly
from narrowcast.observers import ChannelMagnitude, Drift, GroupedHessian, Hessian
from narrowcast.pipeline.calibrate import Calibration, Evidence, evidence_key, sees_input, thinned
from narrowcast.pipeline.solve import Job

# Input vectors kept of one layer where a solver asks for some of them.
_KEPT_INPUTS = 4096

Inside = Callable[[str, tuple[Any, ...], Mapping[str, Any]], object]
"""Called with the path of a module and the arguments of its call."""


class Hooks:
    """Shows the input of some modules while they run.

    Args:
        model: that holds them.
        paths: of the modules.
        see: called with a module's path and its first argument, the values of a packed sequence.
        inside: called with all arguments of a call.
    """

    def __init__(
        self, model: nn.Module, paths: Sequence[str], see: Callable[[str, Any], object], inside: Inside | None = None
    ) -> None:
        self._model, self._paths, self._see, self._inside = model, paths, see, inside
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for path in self._paths:

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = path) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                self._see(path, x.data if isinstance(x, PackedSequence) else x)
                if self._inside is not None:
                    self._inside(path, args, kwargs)

            module = get_module(self._model, path)
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()


class Watcher:
    """Keeps what the solvers of one module ask for.

    Args:
        job: gives the model and the observers of static ranges, which go on from what the float pass saw.
        path: of the module.
        wanted: needs of the solvers, and "range".
        calls: how many calls share the room for kept inputs.
    """

    def __init__(self, job: Job, path: str, wanted: frozenset[str], calls: int) -> None:
        self.adapter, self.path, self.wanted = job.adapter, path, wanted
        self.ranges = job.calibration.channel_ranges.get(path) or job.calibration.ranges.get(path)
        sites = [s for row in job.units()[path] for s in row.layer.sites if s.path == path]
        self.grouped = job.adapter.input_groups(sites[0]) > 1
        self.channel_dim = job.adapter.channel_dim(path)
        self.magnitude = ChannelMagnitude()
        self.drift = Drift()
        self.drifted = False
        self.vectors = _Vectors(wanted, calls, grouped=self.grouped)
        hidden = [s for s in sites if not sees_input(s.parameter) and job.adapter.sees_inside(s)]
        self.inner = {s.parameter: (evidence_key(s), ChannelMagnitude(), _Vectors(wanted, calls)) for s in hidden}

    def see(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Take in one input of the module, and the same one in the float model where that is known."""
        last = x.detach().movedim(self.channel_dim, -1)
        if "range" in self.wanted and self.ranges is not None:
            self.ranges.update(last)
        if self.wanted <= {"range"}:
            return
        thinned(self.magnitude.update)(last)
        rows = self.adapter.input_rows(self.path, x.detach())
        self.vectors.see(rows)
        if exact is not None and exact.shape == x.shape and not self.grouped:
            self.drift.update(self.adapter.input_rows(self.path, exact)[0], rows[0])
            self.drifted = True

    def see_inside(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take in what one call shows the weights that do not multiply the module's input."""
        if not self.inner or self.wanted <= {"range"}:
            return
        found = self.adapter.inner_inputs(self.path, args, kwargs)
        for parameter, (_, magnitude, vectors) in self.inner.items():
            magnitude.update(found[parameter])
            vectors.see(found[parameter].detach()[None])

    def finish_(self, calibration: Calibration) -> None:
        """Put what was seen where solvers find it; nothing where the module never ran."""
        drift = self.drift.result() if self.drifted else None
        parts = [(self.path, self.magnitude, self.vectors, drift)]
        parts += [(key, magnitude, vectors, None) for key, magnitude, vectors in self.inner.values()]
        for key, magnitude, vectors, moved in parts:
            if vectors.samples:
                calibration.magnitudes[key] = magnitude
                calibration.evidence[key] = vectors.evidence(moved)


class _Vectors:
    """The Hessian of what a weight multiplies, and some of it."""

    def __init__(self, wanted: frozenset[str], calls: int, *, grouped: bool = False) -> None:
        self.wanted, self.grouped = wanted, grouped
        self.room = max(1, -(-_KEPT_INPUTS // calls))
        self.hessian = GroupedHessian() if grouped else Hessian()
        self.inputs: list[Tensor] = []
        self.samples = 0

    def see(self, rows: Tensor) -> None:
        """Take in [groups, vectors, columns]."""
        self.samples += rows.shape[1]
        if "hessian" in self.wanted:
            self.hessian.update(rows if self.grouped else rows[0])
        if "inputs" in self.wanted and not self.grouped:
            self.inputs.append(evenly(rows[0], self.room).float().clone())

    def evidence(self, drift: Tensor | None) -> Evidence:
        """What solvers get."""
        hessian = None
        if "hessian" in self.wanted:
            hessian = self.hessian.result()
            hessian = hessian if self.grouped else hessian[None]
        inputs = torch.cat(self.inputs) if self.inputs else None
        return Evidence(self.samples, hessian, inputs, drift)
