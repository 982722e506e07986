"""Solving the weights of an ONNX graph block after block, on a twin in torch, as over any module."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from torch import Tensor

from narrowcast.core import PerChannel, PerTensor
from narrowcast.data import repeatable
from narrowcast.errors import DataError, ModelError
from narrowcast.models import TorchModel
from narrowcast.models.onnx_layers import Use
from narrowcast.models.onnx_model import OnnxModel
from narrowcast.models.onnx_twin import Twin
from narrowcast.observers import Observer
from narrowcast.pipeline.calibrate import calibrate
from narrowcast.pipeline.onnx_on_twin import checked_twin, plan_on_twin, readable_errors, why_no_gradient, with_paths
from narrowcast.pipeline.onnx_ranges import ChannelRanges
from narrowcast.pipeline.sequential import solve_in_blocks, wants_blocks
from narrowcast.pipeline.shared_ranges import Origin, SharedRanges
from narrowcast.pipeline.solve import Job, speaker
from narrowcast.pipeline.solve_weight import SolvedWeight, needs_of
from narrowcast.pipeline.streams import recorded
from narrowcast.planning import LayerPlan, Plan


@dataclass
class OnTwin:
    """What solving on a twin gave.

    Args:
        solved: by name of the weight.
        inputs: by name of the weight, the treatment of its input as the report says it.
        biases: by name of a node, its corrected bias.
        ranges: by name of a value, scale and zero point of its codes.
        rounded: by name of a weight that is to be rounded to nearest as the graph has it, why.
        notes: for the report.
    """

    solved: dict[str, SolvedWeight] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    ranges: dict[str, tuple[float, int]] = field(default_factory=dict)
    rounded: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


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
        return checked_twin(adapter, probe), []
    except (DataError, ModelError) as error:
        if must:
            raise
        return None, [f"layers are solved from one pass over the data and not block after block: {error}"]


def solve_on_twin(
    adapter: OnnxModel, twin: Twin, plan: Plan, data: Any, observers: dict[str, Observer], by_channel: ChannelRanges,
    *, progress: bool,
) -> OnTwin:  # fmt: skip
    """Solve the weights that a twin of the graph has, block after block.

    Args:
        adapter: nothing is written to its graph.
        twin: of its graph.
        plan: of the same adapter.
        data: calibration data, read once more.
        observers: of static ranges, by the name of the value; they have seen all data.
        by_channel: the ranges per channel that were chosen.
        progress: whether to show it.

    Raises:
        ModelError, DataError, FormatError: a solver refuses; the message names the layer.
    """
    work, rows = TorchModel(twin.module), plan_on_twin(plan, twin)
    done = OnTwin()
    with readable_errors(twin):
        with recorded(work.model, data) as recording:
            calibration = calibrate(work, rows, data)
        static = [*calibration.ranges, *calibration.channel_ranges]
        sources = {path: adapter.placement.source(str(twin.made[path].input.name)) for path in static}
        for path in calibration.ranges:
            calibration.ranges[path] = copy.deepcopy(observers[sources[path]])
        shared = _shared(work, sources)
        _decide(shared, adapter, twin, by_channel, calibration.channel_ranges)
        job = Job(work, rows, calibration, shared)
        _, notes = solve_in_blocks(job, recording, journal=None, progress=progress)
    done.notes += [twin.readable(note) for note in notes]
    for row in rows.layers:
        if row.weight is not None:
            _take(done, job, row, twin, sources)
    for row in plan.layers:
        if row.layer.name in done.solved and (why := _barred(row, twin)):
            done.solved[row.layer.name] = replace(done.solved[row.layer.name], fallback=why)
    return done


def _barred(row: LayerPlan, twin: Twin) -> str:
    """Why rounding to nearest takes the place of the solver that the recipe names; "" where it does not."""
    if row.chosen or any(site.path not in twin.paths for site in row.layer.sites):
        return ""
    return why_no_gradient(with_paths(row, twin), twin)


def _shared(work: TorchModel, sources: dict[str, str]) -> SharedRanges:
    """Layers whose input has the codes of one value share these codes."""
    shared = SharedRanges()
    for path, source in sources.items():
        site = next(site for layer in work.layers() for site in layer.sites if site.path == path)
        channels = work.weight(next(lay for lay in work.layers() if site in lay.sites)).shape[1]
        width = channels // work.kernel_elements(site) * work.input_groups(site)
        shared.origins[path] = [[Origin(source, width)]]
    return shared


def _decide(
    shared: SharedRanges, adapter: OnnxModel, twin: Twin, by_channel: ChannelRanges, paths: Iterable[str]
) -> None:
    """Inputs with a range per channel get those that were chosen for their value."""
    for path in paths:
        name = str(twin.made[path].input.name)
        found = by_channel.activation(adapter, str(twin.made[path].consumed[0].name))
        assert found is not None and found[0].scale is not None and found[0].zero_point is not None
        number = found[0].spec.format.name if found[0].spec is not None else ""
        shared.chosen[adapter.placement.source(name), number] = found[0].scale, found[0].zero_point


def _turned(solved: SolvedWeight, use: Use | None) -> SolvedWeight | None:
    """The codes with their columns as the graph has them; None where groups of columns would not be the same.

    Torch's matrix of a transposed convolution has every kernel turned round, the matrix of the graph has not.
    """
    shape = () if use is None or use.op != "ConvTranspose" else tuple(use.weight.const_value.shape)[2:]
    if prod(shape) == 1:
        return solved
    if not isinstance(solved.record.spec.granularity, PerChannel | PerTensor):
        return None
    codes = solved.record.codes
    turned = codes.reshape(codes.shape[0], -1, *shape).flip(*range(2, 2 + len(shape))).reshape(codes.shape)
    return replace(solved, record=replace(solved.record, codes=turned))


def _take(done: OnTwin, job: Job, row: LayerPlan, twin: Twin, sources: dict[str, str]) -> None:
    """What has become of one weight."""
    name = row.layer.name
    solved = _turned(job.solved[name], twin.made[row.layer.sites[0].path].use)
    if solved is None:
        done.rounded[name] = "in torch other columns of a ConvTranspose share scales, so nothing solved there fits"
        return
    done.solved[name] = solved
    done.inputs[name] = job.modules[speaker(row.layer)][0].treatment[1]
    for site in row.layer.sites:
        built = job.modules[site.path][0]
        if built.corrected:
            bias: Any = built.module.bias
            done.biases[str(twin.made[site.path].consumed[0].name)] = bias.detach()
        activation = built.treatment[0]
        if activation.mode == "static" and site.path in sources and activation.ratio() is None:
            assert activation.scale is not None and activation.zero_point is not None
            done.ranges.setdefault(sources[site.path], (float(activation.scale[0]), int(activation.zero_point[0])))
