"""The main job for ONNX files: the same plan, observers, solvers and report, written as what ONNX Runtime runs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from narrowcast.core import PerGroup, QuantizedTensor, QuantSpec, choose_scale
from narrowcast.errors import ContractError, RecipeError
from narrowcast.models import FoldReport
from narrowcast.models.onnx_file import hash_of, stored_size
from narrowcast.models.onnx_model import OnnxModel, Written
from narrowcast.models.onnx_portable import Portable
from narrowcast.models.onnx_verdict import Kernel, graph_that_runs, kernels_of, node_verdicts, other_operators
from narrowcast.nn import Activation
from narrowcast.observers import Best, ChannelMagnitude, Observer, make_observer
from narrowcast.observers.grouped_hessian import GroupedHessian
from narrowcast.pipeline.calibrate import Calibration, Evidence, activations_of, first_batch, rewindable, thinned
from narrowcast.pipeline.checks import check_has_data, check_plan, check_weights, refuse
from narrowcast.pipeline.judge import Verdict, judge_calls
from narrowcast.pipeline.onnx_check import check_conversion
from narrowcast.pipeline.onnx_in_order import OnTwin, solve_on_twin, twin_for_solving
from narrowcast.pipeline.onnx_outcome import outcomes
from narrowcast.pipeline.onnx_ranges import ChannelRanges, settle_ranges, static_sites, watch_channels
from narrowcast.pipeline.onnx_statistics import Statistics
from narrowcast.pipeline.onnx_transform import transform_onnx
from narrowcast.pipeline.result import Quantized, totals_of
from narrowcast.pipeline.solve_weight import SolvedWeight, needs_of, solve_weight, why_unseen
from narrowcast.planning import LayerPlan, Plan, make_plan
from narrowcast.progress import progress_steps
from narrowcast.recipe import Recipe, load_recipe
from narrowcast.report import Report
from narrowcast.transforms import analytic_correction, fold_input_scales

_STATIC = QuantSpec.parse("uint8/tensor")
# Below this many positions the mean of an input says more of the sample than of the layer.
_SMALLEST_SAMPLE = 64


class ChannelMean:
    """Streaming mean of every channel; channels are the last dimension of the batches."""

    def __init__(self) -> None:
        self.positions = 0
        self._sum: Tensor | None = None

    def update(self, batch: Tensor) -> None:
        """Take in [..., channels] float."""
        rows = batch.reshape(-1, batch.shape[-1]).double()
        self.positions += rows.shape[0]
        self._sum = rows.sum(0) if self._sum is None else self._sum + rows.sum(0)

    def result(self) -> Tensor | None:
        """[channels] float64; None where too little was seen."""
        if self._sum is None or self.positions < _SMALLEST_SAMPLE:
            return None
        return self._sum / self.positions


@dataclass
class _Job:
    """What is known and done so far; the names are those of `pipeline.solve.Job`."""

    adapter: OnnxModel
    plan: Plan
    calibration: Calibration = field(default_factory=Calibration)
    values: dict[str, Observer] = field(default_factory=dict)
    observers: dict[str, str] = field(default_factory=dict)
    means: dict[str, ChannelMean] = field(default_factory=dict)
    solved: dict[str, SolvedWeight] = field(default_factory=dict)
    inputs: dict[str, str] = field(default_factory=dict)
    corrected: set[str] = field(default_factory=set)
    on_twin: OnTwin = field(default_factory=OnTwin)
    by_channel: ChannelRanges = field(default_factory=ChannelRanges)

    def static_paths(self) -> list[str]:
        """Nodes whose input gets a static range."""
        return [site.path for row in self.plan.layers for site in static_sites(self.adapter, row)]


def open_onnx(model: Any, recipe: Recipe) -> OnnxModel:
    """The adapter of an ONNX model for a recipe.

    Raises:
        ModelError: it cannot be read.
        RecipeError: the recipe asks for what ONNX files do not get.
    """
    if any("rotate" in entry for entry in recipe.transforms):
        raise RecipeError(
            f"recipe {recipe.name!r} has the transform rotate, which knows the decoders of transformers and no ONNX "
            "files; leave it out, or quantize the PyTorch model and export it"
        )
    for rule in recipe.rules:
        if rule.input is not None and rule.input.outliers:
            raise RecipeError(f"rule {rule}: ONNX files have no form for outlier channels; leave out 'outliers:...'")
    specs = [rule.weight for rule in recipe.rules if rule.weight is not None]
    blocked = any(spec.format.bits < 8 or isinstance(spec.granularity, PerGroup) for spec in specs)
    return OnnxModel(
        model, fold_batchnorm=recipe.fold_batchnorm, blocked=blocked, portable=Portable(recipe.portable),
        token_ranges=recipe.token_ranges,
    )  # fmt: skip


def plan_onnx(model: Any, recipe: Recipe) -> Plan:
    """What `quantize_onnx` would do."""
    return make_plan(open_onnx(model, recipe), recipe, FoldReport())


def quantize_onnx(
    model: Any, recipe: str | Path | Mapping[str, Any] | Recipe, data: Any = None, *, strict: bool = False,
    min_coverage: float = 0.0, progress: bool = True, resume: str | Path | None = None,
) -> Quantized:  # fmt: skip
    """Quantize an ONNX model; arguments, result and errors are those of `nc.quantize`.

    `resume` is a directory of calibration statistics: an interrupted pass goes on there, a finished one is reused.

    Returns:
        `.model` answers like the float model, by ONNX Runtime; `nc.save` writes it as an .onnx file.
    """
    started = time.perf_counter()
    if not 0.0 <= min_coverage <= 1.0:
        raise ContractError(f"min_coverage is a share between 0 and 1, got {min_coverage}")
    loaded = load_recipe(recipe)
    adapter = open_onnx(model, loaded)
    batches = rewindable(data)
    before = stored_size(adapter.graph)
    probe = None if data is None else first_batch(batches, adapter)
    job = _Job(adapter, make_plan(adapter, loaded, FoldReport(), has_data=data is not None))
    check_has_data(job.plan, data)
    check_plan(job.plan, strict=strict, min_coverage=min_coverage)
    check_weights(adapter, job.plan)
    check_conversion(adapter, probe)
    transformed = transform_onnx(adapter, job.plan, data, probe)
    twin, why = twin_for_solving(adapter, job.plan, data, probe)
    _observe(job, batches, () if twin is None else twin.paths, resume, progress=progress)
    if twin is not None:
        job.on_twin = solve_on_twin(adapter, twin, job.plan, data, job.values, job.by_channel, progress=progress)
    job.on_twin.notes += why
    _solve(job, progress=progress)
    adapter.finish()
    runs, unchecked = graph_that_runs(adapter.graph, adapter.original.graph)
    kernels = kernels_of(runs, adapter.codes)
    rows = outcomes(job, kernels)
    verdict = _judge(adapter, probe)
    totals = replace(
        totals_of(job.plan, rows, verdict, probe), parameters=sum(row.parameters for row in rows), bytes_before=before,
        bytes_after=stored_size(adapter.graph), seconds=time.perf_counter() - started,
    )  # fmt: skip
    notes = [*adapter.notes, *transformed.notes, *job.on_twin.notes, *job.calibration.observation.notes]
    notes += [*unchecked, *_winners(job.values), *_notes(kernels), *_left_in_float(runs)]
    report = Report(loaded.name, adapter.name, rows, totals, notes, transformed.changes)
    if strict:
        refuse([f"{row.layer}: fell back: {row.reason}" for row in rows if row.outcome == "fell back"])
    return Quantized(adapter.model, report, loaded)


def _winners(values: Mapping[str, Observer]) -> list[str]:
    """How often each observer of a choice won: rows of layers name only those of layers' inputs."""
    won = Counter(item.candidates()[0].observer for item in values.values() if isinstance(item, Best))
    if not won:
        return []
    listed = ", ".join(f"{name} {count}" for name, count in won.most_common())
    return [f"ranges of {won.total()} values by the least squared error over the calibration data: {listed}"]


def _notes(kernels: Mapping[str, Kernel]) -> list[str]:
    stored = [path for path, kernel in kernels.items() if "DequantizeLinear" in kernel.through]
    if not stored:
        return []
    return [
        f"{len(stored)} weights ({stored[0]}, ...) are dequantized at every run: the file is smaller, and slower than "
        "float32"
    ]


def _left_in_float(graph: Any) -> list[str]:
    """What computes in float in the graph that ONNX Runtime runs, besides the weights that have rows of their own."""
    counted = Counter((row.kernel, row.reason) for row in node_verdicts(graph) if not row.integer and not row.bits)
    notes = [f"{count} {kernel} stay float: {reason}" for (kernel, reason), count in counted.items()]
    others = other_operators(graph)
    if others:
        listed = ", ".join(f"{count} {op}" for op, count in others.items())
        notes.append(f"operators without weights that compute in float in ONNX Runtime: {listed}")
    return notes


def _observe(
    job: _Job, batches: Any, solved_later: Collection[str], resume: str | Path | None, *, progress: bool
) -> None:
    """One pass over the data with what the plan needs of it; a Hessian too, of nodes that are not solved later."""
    adapter, calibration = job.adapter, job.calibration
    if batches is None:
        return
    watchers: dict[str, list[Any]] = {}
    texts: dict[str, str] = {}
    squares: dict[str, GroupedHessian] = {}
    values: dict[str, list[Any]] = {}
    for row in job.plan.layers:
        for site in row.layer.sites if row.weight is not None else ():
            if not adapter.takes_activation(site):
                continue
            path = site.path
            calibration.magnitudes[path], job.means[path] = ChannelMagnitude(), ChannelMean()
            watchers[path] = [thinned(calibration.magnitudes[path].update), job.means[path].update]
            if static_sites(adapter, row):
                _ask(job, texts, adapter.input_value(path), row)
            if "hessian" in needs_of(row) and path not in solved_later and adapter.shows_rows(path):
                squares[path] = _watch_rows(adapter, path, values)
    names = adapter.place_ranges(job.static_paths())
    asked = {adapter.placement.source(name): text for name, text in texts.items()}
    for name in names:
        text = job.observers[name] = asked.get(name) or next(iter(texts.values()))
        observer = job.values[name] = make_observer(text)
        values.setdefault(name, []).append(observer.update)
    job.by_channel = watch_channels(adapter, job.plan, values)
    items = _learners(job, squares)
    statistics = None if resume is None else Statistics(resume, hash_of(adapter.graph), items)
    with progress_steps("calibrating", 1, enabled=progress) as step:
        calibration.observation = adapter.observe(batches, watchers, values, statistics)
        step("")
    if statistics is not None:
        calibration.observation.notes += statistics.finish(calibration.observation)
    for path, hessian in squares.items():
        if hessian.samples:
            calibration.evidence[path] = Evidence(hessian.samples, hessian.result())
    for path in job.static_paths():
        calibration.ranges[path] = job.values[adapter.placement.source(adapter.input_value(path))]
    job.plan, note = settle_ranges(adapter, job.plan, calibration, job.by_channel)
    adapter.notes += [note] if note else []


def _ask(job: _Job, texts: dict[str, str], name: str, row: LayerPlan) -> None:
    """Note which observer a layer wants for its input; a value has one range, and the first layer's wish counts."""
    assert row.input is not None
    first = texts.setdefault(name, row.input.observer)
    if first != row.input.observer:
        job.adapter.notes.append(
            f"{row.layer.name}: its input {name!r} is another layer's too, which asks for {first} and not for "
            f"{row.input.observer}; one value has one range, by {first}"
        )


def _learners(job: _Job, hessians: Mapping[str, GroupedHessian]) -> dict[str, Any]:
    """Everything that learns from the pass, by a name that says what it is."""
    named: dict[str, Mapping[str, Any]] = {
        "magnitude": job.calibration.magnitudes,
        "mean": job.means,
        "hessian": hessians,
        "channels": job.by_channel.observed,
    }
    items = {f"{kind} {path}": item for kind, found in named.items() for path, item in found.items()}
    for name, item in job.values.items():  # by their own names: a later run may ask for one of them alone
        parts = item.parts() if isinstance(item, Best) else {job.observers[name]: item}
        items |= {f"range {name} {text}": part for text, part in parts.items()}
    return items


def _watch_rows(adapter: OnnxModel, path: str, values: dict[str, list[Any]]) -> GroupedHessian:
    """A Hessian of the vectors that one weight multiplies."""
    hessian = GroupedHessian()

    def watch(x: Tensor) -> None:
        hessian.update(adapter.input_rows(path, x))

    values.setdefault(adapter.input_value(path), []).append(watch)
    return hessian


def _solve(job: _Job, *, progress: bool) -> None:
    """Solve every planned weight, and write all of its uses."""
    adapter = job.adapter
    rows = [row for row in job.plan.layers if row.weight is not None]
    ranges = {name: _scale_and_zero(observer.range()) for name, observer in job.values.items()} | job.on_twin.ranges
    ranges |= job.by_channel.units.ranges
    with progress_steps("quantizing", len(rows), enabled=progress) as step:
        for row in rows:
            consumers = [site for site in row.layer.sites if adapter.takes_activation(site)]
            speaker = (consumers or list(row.layer.sites))[0].path
            found = job.by_channel.activation(adapter, speaker) if static_sites(adapter, row) else None
            (activation, text), *_ = [found] if found else activations_of(adapter, row, speaker, job.calibration)
            job.inputs[row.layer.name] = job.on_twin.inputs.get(row.layer.name, text)
            solved = job.on_twin.solved.get(row.layer.name) or _solve_alone(job, row, activation)
            job.solved[row.layer.name] = solved
            for site in row.layer.sites:
                _write(job, row, site.path, solved, activation if site in consumers else Activation(), ranges)
            job.solved[row.layer.name] = replace(solved, record=_without_values(solved.record))  # it is written
            step(row.layer.name)
    adapter.put_ranges(job.static_paths(), ranges, job.by_channel.needless_clips())


def _solve_alone(job: _Job, row: LayerPlan, activation: Activation) -> SolvedWeight:
    """A weight that was not solved on a twin."""
    why = job.on_twin.rounded.get(row.layer.name, "") or _no_rows(job, row)
    asked = replace(row, method={"rtn": {}}) if why else row
    solved = solve_weight(job.adapter, asked, job.calibration, activation)
    if not why:
        return solved
    return replace(solved, notes=(*solved.notes, why)) if row.chosen else replace(solved, fallback=why)


def _no_rows(job: _Job, row: LayerPlan) -> str:
    """Why a solver that needs input vectors has none; "" where it has, needs none, or `solve_weight` says it."""
    adapter = job.adapter
    if "hessian" not in needs_of(row) or why_unseen(adapter, row.layer, job.calibration):
        return ""
    if any(adapter.takes_activation(site) and adapter.shows_rows(site.path) for site in row.layer.sites):
        return ""
    return "the vectors that it multiplies cannot be taken from its input, and it is in no block that was solved"


def _write(
    job: _Job, row: LayerPlan, path: str, solved: SolvedWeight, activation: Activation,
    ranges: Mapping[str, tuple[float, int]],
) -> None:  # fmt: skip
    adapter = job.adapter
    ratio, static = activation.ratio(), path in job.calibration.ranges
    if static:
        scale, zero = ranges[adapter.placement.source(adapter.input_value(path))]
        activation = Activation(_STATIC, torch.tensor([scale]), torch.tensor([zero], dtype=torch.uint8))
    solved = replace(solved, record=adapter.fitting(path, solved.record, activation))
    bias = _corrected_bias(job, row, path, solved, ratio)
    if bias is not None:
        job.corrected.add(row.layer.name)
    record = solved.record
    if static:
        record, bias = job.by_channel.divided(adapter, path, record, adapter.bias(path) if bias is None else bias)
    adapter.install(path, Written(record, activation, bias))


def _corrected_bias(job: _Job, row: LayerPlan, path: str, solved: SolvedWeight, ratio: Tensor | None) -> Tensor | None:
    """The node's bias with the mean error of the weight taken out; None where there is none or it is not known.

    The stored weight has taken in the ratio of its inputs' scales, [channels]; None for 1.
    """
    if path in job.on_twin.biases or row.layer.name in job.on_twin.solved:
        return job.on_twin.biases.get(path)
    adapter, mean = job.adapter, job.means.get(path)
    channels = None if mean is None else mean.result()
    site = next(site for site in row.layer.sites if site.path == path)
    had = adapter.bias(path)
    if had is None and adapter.use(site).bias is None and site.type.startswith("Conv"):
        had = torch.zeros(row.layer.shape[0])  # a convolution may get one, as in torch
    if channels is None or had is None or not job.plan.recipe.correct_bias:
        return None
    stored, weight, groups = solved.record.dequantize(), adapter.weight(row.layer), adapter.input_groups(site)
    if ratio is not None:
        weight, channels = fold_input_scales(weight, ratio, groups), channels / ratio
    return had + analytic_correction(weight, stored, channels, groups)


def _without_values(record: QuantizedTensor) -> QuantizedTensor:
    """The same record without the memory of its tensors."""
    tensors: dict[str, Any] = {name: part.to("meta") for name, part in vars(record).items() if isinstance(part, Tensor)}
    return replace(record, **tensors)


def _scale_and_zero(bounds: tuple[float, float]) -> tuple[float, int]:
    scale, zero = choose_scale(torch.tensor([[bounds[0]]]), torch.tensor([[bounds[1]]]), _STATIC)
    assert zero is not None
    return float(scale), int(zero)


def _judge(adapter: OnnxModel, probe: Any) -> Verdict:
    """Whole-model error and speed on the first batch; raises where ONNX Runtime cannot run what was made."""
    if probe is None:
        return Verdict()
    return judge_calls(lambda: probe.run(adapter.original), lambda: probe.run(adapter.model), budget=1.0)
