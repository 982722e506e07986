"""Installing: module by module, each judged on a sample of its input as it is replaced."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from narrowcast.core import PerChannel
from narrowcast.methods import Rtn
from narrowcast.models import Layer, Site, TorchModel
from narrowcast.models.modules import get_module
from narrowcast.nn import Activation, QuantizedModule
from narrowcast.nn.settled_bias import settle_bias_
from narrowcast.pipeline.calibrate import Calibration, activations_of
from narrowcast.pipeline.judge import Verdict, first_tensor, judge_module
from narrowcast.pipeline.shared_ranges import SharedRanges
from narrowcast.pipeline.solve_weight import SolvedWeight, needs_of, solve_weight
from narrowcast.planning import LayerPlan, Plan
from narrowcast.progress import progress_steps
from narrowcast.report import LayerOutcome
from narrowcast.transforms import ChannelError, analytic_correction

Treatment = tuple[Activation, str]
"""What happens to a module's input, and how the report says it."""


@dataclass(frozen=True)
class Built:
    """One module that could be installed, its input's treatment, its error on the sample, what corrected its bias."""

    module: QuantizedModule
    solved: dict[str, SolvedWeight]
    treatment: Treatment
    error: float
    corrected: str = ""


@dataclass
class Job:
    """The model, what is to become of it, what is known, and what has been done so far.

    Args:
        adapter: with the float modules that are not yet replaced.
        plan: what is to become of every weight.
        calibration: what the data said.
        shared: images that several convolutions read.
        solved: by name of the weight.
        modules: what was installed, by path.
    """

    adapter: TorchModel
    plan: Plan
    calibration: Calibration
    shared: SharedRanges
    solved: dict[str, SolvedWeight] = field(default_factory=dict)
    modules: dict[str, tuple[Built, Verdict]] = field(default_factory=dict)

    def units(self) -> dict[str, list[LayerPlan]]:
        """The planned weights of every module that is to be replaced, by its path."""
        units: dict[str, list[LayerPlan]] = {}
        for row in self.plan.layers:
            if row.weight is not None:
                for site in row.layer.sites:
                    units.setdefault(site.path, []).append(row)
        return units

    def outcomes(self) -> list[LayerOutcome]:
        """One outcome per weight of the plan."""
        return [_outcome(self, row) for row in self.plan.layers]


def solve(job: Job, *, progress: bool) -> list[LayerOutcome]:
    """Quantize every planned weight and install the modules; returns one outcome per weight of the plan."""
    units = job.units()
    with progress_steps("quantizing", len(units), enabled=progress) as step:
        for path, rows in units.items():
            install_(job, path, rows)
            step(path)
    return job.outcomes()


def treatments_of(job: Job, path: str, rows: list[LayerPlan]) -> list[Treatment]:
    """The treatments of a module's input that are worth trying, best guess first."""
    site = next(site for site in rows[0].layer.sites if site.path == path)
    row = rows[0] if job.adapter.takes_activation(site) else replace(rows[0], input=None)
    return job.shared.adapt(path, activations_of(job.adapter, row, path, job.calibration))


def choose_treatment(job: Job, path: str, rows: list[LayerPlan]) -> Treatment:
    """The treatment of a module's input with the least error when its weights are rounded to nearest."""
    treatments = treatments_of(job, path, rows)
    if len(treatments) == 1:
        return treatments[0]
    expected = _expected(job, path)
    tried = [_build(job, path, rows, treatment, expected, rtn=True) for treatment in treatments]
    return min(tried, key=lambda built: built.error).treatment


def install_(job: Job, path: str, rows: list[LayerPlan], treatment: Treatment | None = None) -> None:
    """Build the module for every treatment of its input that is worth trying, and install the best.

    Args:
        job: changed: its model, its solved weights and modules. Weights that are solved already are taken as they are.
        path: of the module.
        rows: its planned weights.
        treatment: the only one to take; None tries.
    """
    if treatment is None and any(needs_of(row) for row in rows if row.layer.name not in job.solved):
        treatment = choose_treatment(job, path, rows)  # slow solvers run once
    tried = [treatment] if treatment is not None else treatments_of(job, path, rows)
    expected = _expected(job, path)
    best = min((_build(job, path, rows, entry, expected) for entry in tried), key=lambda built: built.error)
    if path in job.shared.origins:
        job.shared.choose(path, best.module.input_ranges())
    float_module = get_module(job.adapter.model, path)
    job.adapter.install(path, best.module)
    job.solved |= best.solved
    sample = job.calibration.observation.samples.pop(path, None)
    job.modules[path] = (best, judge_module(float_module, best.module, sample))


def _expected(job: Job, path: str) -> Tensor | None:
    """What the float module gives for the sample that calibration kept."""
    sample = job.calibration.observation.samples.get(path)
    if sample is None:
        return None
    with torch.no_grad():
        return first_tensor(get_module(job.adapter.model, path)(*sample.args, **sample.kwargs))


def _build(
    job: Job, path: str, rows: list[LayerPlan], treatment: Treatment, expected: Tensor | None, *, rtn: bool = False
) -> Built:
    adapter, calibration = job.adapter, job.calibration
    known, method = ({}, Rtn()) if rtn else (job.solved, None)
    solved = {
        row.layer.name: known.get(row.layer.name) or solve_weight(adapter, row, calibration, treatment[0], method)
        for row in rows
    }
    records = {s.parameter: solved[r.layer.name].record for r in rows for s in r.layer.sites if s.path == path}
    module = adapter.build(path, records, treatment[0])
    sample = calibration.observation.samples.get(path)
    site = next(site for site in rows[0].layer.sites if site.path == path)
    if sample is None or expected is None:
        how = _correct_bias_by_mean_(job, site, rows[0], module, solved)
        settle_bias_(module)
        return Built(module, solved, treatment, 0.0, how)
    channel_dim = adapter.output_channel_dim(site) if job.plan.recipe.correct_bias else None
    with torch.no_grad():
        got = first_tensor(module(*sample.args, **sample.kwargs))
        assert got is not None
        error, corrected = _correct_bias_(module, expected, got, channel_dim)
    settle_bias_(module)
    return Built(module, solved, treatment, error, "bias corrected" if corrected else "")


def _correct_bias_by_mean_(job: Job, site: Site, row: LayerPlan, module: Any, solved: dict[str, SolvedWeight]) -> str:
    """Correct the bias by what BatchNorms say of the inputs; returns how the report says it."""
    mean = job.calibration.means.get(site.path)
    if mean is None or not job.plan.recipe.correct_bias or job.adapter.output_channel_dim(site) is None:
        return ""
    weight, stored = job.adapter.weight(row.layer), solved[row.layer.name].record.dequantize()
    correction = analytic_correction(weight, stored, mean, job.adapter.input_groups(site))
    module.bias = correction if module.bias is None else module.bias + correction
    return "bias corrected by BatchNorm's means"


def _correct_bias_(module: Any, expected: Tensor, got: Tensor, channel_dim: int | None) -> tuple[float, bool]:
    """Correct the module's bias where it has one; returns the squared error that is left, and whether it was done."""
    error = ChannelError.of(expected, got, -1 if channel_dim is None else channel_dim)
    correction = None if channel_dim is None else error.correction()
    if correction is not None:
        module.bias = correction if module.bias is None else module.bias + correction
    return error.total(correction), correction is not None


def _outcome(job: Job, row: LayerPlan) -> LayerOutcome:
    layer, calibration = row.layer, job.calibration
    base = LayerOutcome(
        layer.name, layer.type, "kept", row.reason, parameters=layer.parameters, bits_per_weight=row.bits_per_weight,
        bytes_before=layer.bytes, bytes_after=row.bytes_after, macs=_macs(layer, calibration),
    )  # fmt: skip
    if row.weight is None:
        return replace(base, outcome="folded") if row.reason.startswith("folded into") else base
    path = speaker(layer)
    built, verdict = job.modules[path]
    solved = job.solved[layer.name]
    fallen = "; ".join(part for part in (_fallen_back(row, path, calibration), _other_method(row, solved)) if part)
    chosen = f"rounded to nearest: {solved.fallback}" if row.chosen and solved.fallback else ""
    reasons = [part for part in (row.reason, fallen or _never_ran(layer, calibration) or chosen) if part]
    return replace(
        base, outcome="fell back" if fallen else "quantized", reason="; ".join(reasons), spec=str(row.weight),
        input=built.treatment[1], method=", ".join(part for part in (solved.method, built.corrected) if part),
        weight_sqnr_db=solved.sqnr_db, output_sqnr_db=verdict.sqnr_db, kernel=built.module.kernel,
        seconds=solved.seconds, float_ms=verdict.float_ms, quantized_ms=verdict.quantized_ms,
        errors=list(solved.errors), notes=list(solved.notes),
    )  # fmt: skip


def speaker(layer: Layer) -> str:
    """Path of the use that speaks for a weight: of tied ones the consumer that multiplies."""
    return next((s.path for s in layer.sites if s.type != "Embedding"), layer.sites[0].path)


def _other_method(row: LayerPlan, solved: SolvedWeight) -> str:
    if row.chosen:  # rounding to nearest is part of the default
        return ""
    return f"{solved.fallback}: rtn instead of {next(iter(row.method))}" if solved.fallback else ""


def _fallen_back(row: LayerPlan, path: str, calibration: Calibration) -> str:
    """Why a layer is not what the recipe says; "" when it is."""
    if row.fallback:
        return row.fallback
    if row.input is not None and row.input.outliers and not calibration.ran(path):
        return "it never ran in calibration, so its outlier channels are not known; all of them are quantized"
    if row.input is None or not row.input.observer:
        return ""
    if not calibration.ran(path):
        return "it never ran in calibration, so it has no static range; its range is found at run time"
    if path not in calibration.channel_ranges and isinstance(row.input.spec.granularity, PerChannel):
        return "tied weights cannot take in the scales of several inputs; one range for all channels"
    return ""


def _macs(layer: Layer, calibration: Calibration) -> int | None:
    """Multiply-accumulates with this weight over the whole pass; None without data."""
    observation = calibration.observation
    if not observation.batches:
        return None
    return sum(observation.positions.get(site.path, 0) for site in layer.sites) * layer.parameters


def _never_ran(layer: Layer, calibration: Calibration) -> str:
    observation = calibration.observation
    if not observation.batches or any(observation.calls.get(site.path) for site in layer.sites):
        return ""
    return "it never ran in calibration"
