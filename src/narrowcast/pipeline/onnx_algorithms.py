"""What works on torch modules, worked on an ONNX graph: transforms, and solving in order, through a twin of the graph.

The twin (`models/onnx_twin.py`) is a torch module with a module for every weight. Transforms rewrite its parameters,
which are written back to the graph; solvers run over it block after block, as over any module, and what they find is
written as the forms of ONNX Runtime.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

import torch
from torch import Tensor

from narrowcast.core import sqnr_db
from narrowcast.data import repeatable
from narrowcast.errors import DataError, ModelError, NarrowcastError
from narrowcast.models import Site, TorchModel
from narrowcast.models.channel_flow import tensors_in
from narrowcast.models.onnx_model import OnnxModel
from narrowcast.models.onnx_rewrite import write_back
from narrowcast.models.onnx_session import OnnxModule
from narrowcast.models.onnx_twin import Twin, make_twin
from narrowcast.observers import Observer
from narrowcast.pipeline.calibrate import calibrate
from narrowcast.pipeline.sequential import solve_in_blocks, wants_blocks
from narrowcast.pipeline.shared_ranges import Origin, SharedRanges
from narrowcast.pipeline.solve import Job, speaker
from narrowcast.pipeline.solve_weight import SolvedWeight, needs_of
from narrowcast.pipeline.streams import recorded
from narrowcast.pipeline.transform import Transformed, transform
from narrowcast.pipeline.transform_stage import common_start
from narrowcast.planning import LayerPlan, Plan

# Rounding of a float32 network; what changes more has changed the function.
_SAME_FUNCTION_DB = 60.0


@dataclass
class OnTwin:
    """What solving on a twin gave.

    Args:
        solved: by name of the weight.
        inputs: by name of the weight, the treatment of its input as the report says it.
        biases: by name of a node, its corrected bias.
        ranges: by name of a value, scale and zero point of its codes.
        notes: for the report.
    """

    solved: dict[str, SolvedWeight] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    ranges: dict[str, tuple[float, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def transform_onnx(adapter: OnnxModel, plan: Plan, data: Any, probe: Any) -> Transformed:
    """Apply the transforms of the plan's recipe to the graph. The errors are those of `transform`, and name nodes.

    Args:
        adapter: its graph is changed.
        plan: of the same adapter.
        data: calibration data; None when there is none.
        probe: its first batch; None without data.

    Raises:
        ModelError: ONNX Runtime's answers are others than before, or the graph cannot be computed in torch.
    """
    if not plan.recipe.transforms:
        return Transformed()
    twin = _checked_twin(adapter, probe)
    work = TorchModel(twin.module)
    before = [] if probe is None else _answers(adapter, probe)
    with _readable(twin):
        done = transform(work, _on_twin(plan, twin), data, probe)
    nodes = write_back(adapter, twin, work.model)
    notes = [twin.readable(note) for note in done.notes]
    if probe is not None:
        notes.append(_same_in_runtime(before, _answers(adapter, probe), nodes))
    changes = [replace(change, layer=twin.readable(change.layer)) for change in done.changes]
    return Transformed(notes, changes)


def _answers(adapter: OnnxModel, probe: Any) -> list[Tensor]:
    return _floats(probe.run(OnnxModule(adapter.graph, adapter.name)))


def _same_in_runtime(before: list[Tensor], after: list[Tensor], nodes: list[str]) -> str:
    same = _sameness(before, after)
    if same < _SAME_FUNCTION_DB:
        raise ModelError(
            f"the transforms changed what ONNX Runtime answers (SQNR {same:.1f} dB, expected at least "
            f"{_SAME_FUNCTION_DB:.0f}): {', '.join(nodes[:8])}; leave the transforms out, or name pairs that keep the "
            "function"
        )
    return f"transforms: {len(nodes)} nodes rewritten; ONNX Runtime's answers are unchanged to {same:.0f} dB"


@contextmanager
def _readable(twin: Twin) -> Iterator[None]:
    """Errors that name modules of the twin name nodes instead."""
    try:
        yield
    except NarrowcastError as error:
        raise type(error)(twin.readable(str(error))) from None


def _on_twin(plan: Plan, twin: Twin) -> Plan:
    """The plan of the weights that the twin has, with the paths of its modules."""
    rows = [_row_on_twin(row, twin) for row in plan.layers if all(site.path in twin.paths for site in row.layer.sites)]
    entries = tuple(_with_paths(entry, plan, twin) for entry in plan.recipe.transforms)
    return replace(plan, layers=rows, recipe=replace(plan.recipe, transforms=entries))


def _row_on_twin(row: LayerPlan, twin: Twin) -> LayerPlan:
    moved = _moved(row, twin)
    if not _no_gradient(moved, twin):
        return moved
    return replace(moved, method={"gptq": {}} if row.chosen else {"rtn": {}})


def _moved(row: LayerPlan, twin: Twin) -> LayerPlan:
    sites = tuple(Site(twin.paths[site.path], "weight", site.type) for site in row.layer.sites)
    return replace(row, layer=replace(row.layer, sites=sites))


def _no_gradient(row: LayerPlan, twin: Twin) -> str:
    """Why a weight of the twin cannot be solved with its block although its solver wants that; "" where it can."""
    opaque = [name for site in row.layer.sites for name in twin.opaque[site.path.partition(".")[0]]]
    if "block" not in needs_of(row) or not opaque:
        return ""
    return f"its block has {opaque[0]}, which only ONNX Runtime computes, so no gradient passes"


def _with_paths(entry: Any, plan: Plan, twin: Twin) -> Any:
    """A transform whose pairs name modules of the twin: patterns are of names of nodes or layers."""
    ((name, options),) = entry.items()
    if not options.get("pairs"):
        return entry
    known = [(row.layer.name, site.path) for row in plan.layers for site in row.layer.sites]
    names = twin.paths | {layer: twin.paths[node] for layer, node in known if node in twin.paths}
    pairs = [pair for first, second in options["pairs"] for pair in _matched(first, second, names)]
    return {name: {**options, "pairs": pairs}}


def _matched(first: str, second: str, names: dict[str, str]) -> list[tuple[str, str]]:
    producers = {path: name for name, path in names.items() if fnmatchcase(name, first)}
    readers = {path: name for name, path in names.items() if fnmatchcase(name, second)}
    if not producers or not readers:
        return [(next(map(escape, producers), first), next(map(escape, readers), second))]
    found = []
    for path, name in producers.items():
        others = [other for other in readers if other != path] or list(readers)
        nearest = max(others, key=lambda other: common_start(readers[other], name))
        found.append((escape(path), escape(nearest)))
    return found


def twin_for_solving(adapter: OnnxModel, plan: Plan, data: Any, probe: Any) -> tuple[Twin | None, list[str]]:
    """The twin on which weights are to be solved block after block; None where one pass over the data does.

    Args:
        adapter: of the graph.
        plan: of the same adapter.
        data: calibration data; None when there is none.
        probe: its first batch; None without data.

    Returns:
        The twin, and notes: why there is none although solvers ask for more than magnitudes.

    Raises:
        DataError: the recipe asks for blocks, and the data can be read only once.
        ModelError: the recipe asks for blocks, and the twin does not answer what ONNX Runtime does.
    """
    if data is None or not wants_blocks(plan):
        return None, []
    must = plan.recipe.sequential is True or any("block" in needs_of(r) and not r.chosen for r in plan.layers)
    if not must and plan.recipe.sequential is False:
        return None, []
    try:
        if not repeatable(data):
            raise DataError(
                "solving block after block reads the calibration data once more than calibration does, and a generator "
                "can be read only once; pass a list or a DataLoader"
            )
        return _checked_twin(adapter, probe), []
    except (DataError, ModelError) as error:
        if must:
            raise
        return None, [f"layers are solved from one pass over the data and not block after block: {error}"]


def _checked_twin(adapter: OnnxModel, probe: Any) -> Twin:
    """A twin that answers what ONNX Runtime does.

    Raises:
        ModelError: it does not.
    """
    twin = make_twin(adapter.graph, adapter.uses())
    if probe is None:
        return twin
    try:
        with torch.no_grad():
            same = _sameness(_answers(adapter, probe), _floats(probe.run(twin.module)))
        why = f"SQNR {same:.1f} dB, expected at least {_SAME_FUNCTION_DB:.0f}" if same < _SAME_FUNCTION_DB else ""
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, ModelError) as error:
        why = f"{type(error).__name__}: {twin.readable(str(error)):.200}"
    if why:
        raise ModelError(
            f"the graph of {adapter.name} computed in torch does not give what ONNX Runtime gives ({why}), so neither "
            "transforms nor solving block after block work on it; leave transforms out, and set sequential = false"
        )
    return twin


def _floats(answer: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(answer) if tensor.is_floating_point() and tensor.numel()]


def _sameness(before: list[Tensor], after: list[Tensor]) -> float:
    """SQNR of the output that differs most, in decibel."""
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return -math.inf
    finite = [(a, b) for a, b in zip(before, after, strict=True) if bool(torch.isfinite(a).all())]
    return min((sqnr_db(a, b) for a, b in finite), default=math.inf)


def solve_on_twin(
    adapter: OnnxModel, twin: Twin, plan: Plan, data: Any, observers: dict[str, Observer], *, progress: bool
) -> OnTwin:
    """Solve the weights that a twin of the graph has, block after block.

    Args:
        adapter: nothing is written to its graph.
        twin: of its graph.
        plan: of the same adapter.
        data: calibration data, read once more.
        observers: of static ranges, by the name of the value; they have seen all data.
        progress: whether to show it.

    Raises:
        ModelError, DataError, FormatError: a solver refuses; the message names the layer.
    """
    work, rows = TorchModel(twin.module), _on_twin(plan, twin)
    done = OnTwin()
    with _readable(twin):
        with recorded(work.model, data) as recording:
            calibration = calibrate(work, rows, data)
        sources = {path: adapter.placement.source(str(twin.made[path].input.name)) for path in calibration.ranges}
        for path, source in sources.items():
            calibration.ranges[path] = copy.deepcopy(observers[source])
        job = Job(work, rows, calibration, _shared(work, sources))
        _, notes = solve_in_blocks(job, recording, journal=None, progress=progress)
    done.notes += [twin.readable(note) for note in notes]
    for row in rows.layers:
        if row.weight is not None:
            _take(done, job, row, twin, sources)
    for row in plan.layers:
        if why := _barred(row, twin):
            done.solved[row.layer.name] = replace(done.solved[row.layer.name], fallback=why)
    return done


def _barred(row: LayerPlan, twin: Twin) -> str:
    """Why rounding to nearest takes the place of the solver that the recipe names; "" where it does not."""
    if row.chosen or any(site.path not in twin.paths for site in row.layer.sites):
        return ""
    return _no_gradient(_moved(row, twin), twin)


def _shared(work: TorchModel, sources: dict[str, str]) -> SharedRanges:
    """Layers whose input has the codes of one value share these codes."""
    shared = SharedRanges()
    for path, source in sources.items():
        site = next(site for layer in work.layers() for site in layer.sites if site.path == path)
        channels = work.weight(next(lay for lay in work.layers() if site in lay.sites)).shape[1]
        width = channels // work.kernel_elements(site) * work.input_groups(site)
        shared.origins[path] = [[Origin(source, width)]]
    return shared


def _take(done: OnTwin, job: Job, row: LayerPlan, twin: Twin, sources: dict[str, str]) -> None:
    """What has become of one weight."""
    name = row.layer.name
    done.solved[name] = job.solved[name]
    done.inputs[name] = job.modules[speaker(row.layer)][0].treatment[1]
    for site in row.layer.sites:
        built = job.modules[site.path][0]
        if built.corrected:
            bias: Any = built.module.bias
            done.biases[str(twin.made[site.path].consumed[0].name)] = bias.detach()
        activation = built.treatment[0]
        if activation.mode == "static" and site.path in sources:
            assert activation.scale is not None and activation.zero_point is not None
            done.ranges.setdefault(sources[site.path], (float(activation.scale[0]), int(activation.zero_point[0])))
