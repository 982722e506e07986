"""The main job: plan, fold, observe, solve, install, judge; one call from a float model to a quantized one."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.core import sqnr_db
from narrowcast.errors import ContractError, ModelError
from narrowcast.export.checkpoint_tensors import source_hash
from narrowcast.models import FoldReport, TorchModel, expected_inputs, find_pairs, fold_, is_onnx, require_onnx
from narrowcast.models.modules import evaluation_mode, get_module, stored_bytes
from narrowcast.nn import QuantizedConv
from narrowcast.pipeline.calibrate import Calibration, calibrate, first_batch, rewindable
from narrowcast.pipeline.checks import (
    check_has_data,
    check_has_values,
    check_plan,
    check_resume,
    check_weights,
    refuse,
)
from narrowcast.pipeline.doctor import Doctor, refuse_severe, sort_findings, unseen
from narrowcast.pipeline.fuse import Flows, fuse, planned_convolutions, trace
from narrowcast.pipeline.judge import Verdict, first_tensor, judge_calls, slower_than_float
from narrowcast.pipeline.result import Quantized, totals_of
from narrowcast.pipeline.resume import Journal, fingerprint
from narrowcast.pipeline.sequential import solve_in_blocks, wants_blocks
from narrowcast.pipeline.shared_ranges import SharedRanges
from narrowcast.pipeline.solve import Job, solve
from narrowcast.pipeline.streams import Recording, recorded
from narrowcast.pipeline.transform import transform
from narrowcast.planning import Plan, make_plan, untie_for
from narrowcast.progress import progress_steps
from narrowcast.recipe import Recipe, load_recipe
from narrowcast.report import Finding, LayerChange, LayerOutcome, Report

# Float32 rounding of a network of this depth; a fold that changes more than this has changed the function.
_SAME_FUNCTION_DB = 60.0


def quantize(
    model: Any,
    recipe: str | Path | Mapping[str, Any] | Recipe,
    data: Any = None,
    *,
    strict: bool = False,
    min_coverage: float = 0.0,
    inplace: bool = False,
    progress: bool = True,
    resume: str | Path | None = None,
) -> Quantized:
    """Make a model small, and fast where its recipe computes in integers.

    Args:
        model: any PyTorch module; it is not changed unless `inplace`. Or an ONNX model: the path of an .onnx file, an
            `onnx.ModelProto` or an `onnx_ir.Model`.
        recipe: a preset name ("dynamic-int8"), a Recipe, a document, or a TOML or JSON file.
        data: calibration data: a DataLoader, an iterable of tensors, tuples or dicts, texts, or a callable that runs
            the model. Needed for static ranges; with it, weights are rounded with the inputs in mind, and the report
            has errors and speeds.
        strict: raise where a layer that the recipe wants quantized is not, or not as the recipe says, and where the
            data cannot be trusted (a severe finding of the calibration doctor).
        min_coverage: smallest share (0 to 1) of the weights of supported layers that must end up quantized.
        inplace: change `model` itself, and save the memory of a second set of weights.
        progress: show progress on standard error.
        resume: a directory in which every finished block is written down; a run that was interrupted goes on from
            there with the same result. Of use where the recipe's methods work block after block. Of an ONNX model the
            statistics of calibration are written there; a later run on the same model and data reuses them.

    Returns:
        The quantized model in evaluation mode, with its report; of an ONNX model one that ONNX Runtime answers for.

    Raises:
        RecipeError, ModelError, DataError, FormatError: bad input; the message says what, where and the remedy.
        CheckpointError: `resume` holds the blocks of another model, recipe or data, or cannot be written.
        ContractError: `strict` or `min_coverage` is not met; the message lists the layers.
    """
    if is_onnx(model):
        return _quantize_onnx(model, recipe, data, strict, min_coverage, inplace, progress, resume)
    started = time.perf_counter()
    begun = solve_model(
        model, load_recipe(recipe), data, strict=strict, min_coverage=min_coverage, inplace=inplace, progress=progress,
        resume=resume,
    )  # fmt: skip
    adapter, probe = begun.job.adapter, begun.probe
    outcomes, fusion_notes = fuse(adapter, begun.flows, begun.outcomes, probe)
    verdict = _judge_model(adapter, probe, inplace=inplace)
    totals = replace(
        totals_of(begun.job.plan, outcomes, verdict, probe), parameters=begun.before[0], bytes_before=begun.before[1],
        bytes_after=stored_bytes(adapter.model), seconds=time.perf_counter() - started,
    )  # fmt: skip
    notes = begun.notes + fusion_notes + slower_than_float(outcomes)
    name = begun.job.plan.recipe.name
    report = Report(name, type(model).__name__, outcomes, totals, notes, begun.changes, begun.findings)
    if strict:
        refuse([f"{row.layer}: fell back: {row.reason}" for row in outcomes if row.outcome == "fell back"])
    return Quantized(adapter.model, report, begun.job.plan.recipe, begun.source)


def _quantize_onnx(
    model: Any, recipe: Any, data: Any, strict: bool, min_coverage: float, inplace: bool, progress: bool, resume: Any
) -> Quantized:
    if inplace:
        raise ModelError("ONNX models are not changed in place; leave out inplace")
    require_onnx()
    road = importlib.import_module("narrowcast.pipeline.onnx_run")
    done: Quantized = road.quantize_onnx(
        model, recipe, data, strict=strict, min_coverage=min_coverage, progress=progress, resume=resume
    )
    return done


@dataclass(frozen=True)
class Begun:
    """A model whose quantized modules are installed and not yet fused, and how it came to be.

    Args:
        job: the adapter with the model, the plan, the solved weights and the installed modules.
        flows: how the model's parts call each other.
        probe: the first batch; None without data.
        outcomes: one per weight.
        notes: for the report; so are `changes` and `findings`.
        source: hash of the float model's tensors.
        before: parameters and bytes of the float model.
        norms: convolution path -> the convolution's weight and bias before its BatchNorm was folded, and the norm.
        floats: path of an installed module -> the float module that was there; empty unless asked for.
    """

    job: Job
    flows: Flows
    probe: Any
    outcomes: list[LayerOutcome]
    notes: list[str]
    changes: list[LayerChange]
    findings: list[Finding]
    source: str
    before: tuple[int, int]
    norms: dict[str, tuple[Tensor, Tensor | None, nn.Module]]
    floats: dict[str, nn.Module]


def solve_model(
    model: nn.Module, recipe: Recipe, data: Any, *, strict: bool = False, min_coverage: float = 0.0,
    inplace: bool = False, progress: bool = True, resume: str | Path | None = None, keep_floats: bool = False,
) -> Begun:  # fmt: skip
    """Plan, calibrate, solve and install: what quantizing and preparing for training share.

    The arguments are those of `quantize`, and so are the errors; `keep_floats` keeps the float modules that are
    replaced.
    """
    if not 0.0 <= min_coverage <= 1.0:
        raise ContractError(f"min_coverage is a share between 0 and 1, got {min_coverage}")
    adapter = _opened(model, recipe, inplace=inplace)
    batches = rewindable(data)
    before = (sum(p.numel() for p in adapter.model.parameters()), stored_bytes(adapter.model))
    source = source_hash(model)
    probe = None if data is None else first_batch(batches, adapter)
    folds = _find_folds(adapter, recipe, probe)
    plan = make_plan(adapter, recipe, folds, has_data=data is not None)
    check_has_data(plan, data)
    check_resume(plan, resume)
    check_plan(plan, strict=strict, min_coverage=min_coverage)
    check_weights(adapter, plan)
    doctor = None if probe is None else Doctor.of(adapter, plan, probe)
    if doctor is not None:
        batches = doctor.read(data, batches, strict=strict)
    means = _means_behind_norms(adapter, recipe, probe)
    norms = _norms(adapter, folds)
    notes = [*plan.notes, *_fold(adapter, folds, probe)]
    transformed = transform(adapter, plan, batches, probe)
    calibration, recording, findings = _calibrate(adapter, plan, batches, doctor, strict=strict, progress=progress)
    calibration.means = means
    notes += transformed.notes + calibration.observation.notes
    journal = _journal(resume, plan, source, calibration, recording)
    flows = trace(adapter, plan, probe)
    job = Job(adapter, plan, calibration, SharedRanges.of(adapter.model, flows.flows, planned_convolutions(plan)))
    floats = {path: get_module(adapter.model, path) for path in job.units()} if keep_floats else {}
    outcomes, more = _Solver(recording, journal, progress).run(job)
    adapter.detach_()
    notes += more + _settle_layout(adapter, probe)
    return Begun(job, flows, probe, outcomes, notes, transformed.changes, findings, source, before, norms, floats)


def _norms(adapter: TorchModel, folds: FoldReport) -> dict[str, tuple[Tensor, Tensor | None, nn.Module]]:
    """What folding is about to replace, by the path of the convolution."""
    found = {}
    for norm, path in folds.folded.items():
        convolution: Any = get_module(adapter.model, path)
        found[path] = (convolution.weight, convolution.bias, get_module(adapter.model, norm))
    return found


def _calibrate(
    adapter: TorchModel, plan: Plan, batches: Any, doctor: Doctor | None, *, strict: bool, progress: bool
) -> tuple[Calibration, Recording, list[Finding]]:
    """What one pass over the data shows, the calls of the model in it where blocks will want them, and findings."""
    if doctor is None:
        return Calibration(), Recording(), []
    with progress_steps("calibrating", 1, enabled=progress) as step:
        with recorded(adapter.model, batches) if wants_blocks(plan) else nullcontext(Recording()) as recording:
            calibration = calibrate(adapter, plan, batches)
        step("")
    findings = sort_findings(doctor.findings() + unseen(adapter, plan, calibration))
    if strict:
        refuse_severe(findings)
    return calibration, recording, findings


def _journal(
    resume: str | Path | None, plan: Plan, source: str, calibration: Calibration, recording: Recording
) -> Journal | None:
    if resume is None:
        return None
    return Journal(resume, fingerprint(plan.recipe, source, recording.calls, calibration))


@dataclass(frozen=True)
class _Solver:
    """How weights are solved: all from one pass where there is no recording, else block after block."""

    recording: Recording
    journal: Journal | None
    progress: bool

    def run(self, job: Job) -> tuple[list[LayerOutcome], list[str]]:
        """Quantize and install every module; returns outcomes and notes."""
        if not wants_blocks(job.plan) or not self.recording.calls:
            return solve(job, progress=self.progress), []
        return solve_in_blocks(job, self.recording, journal=self.journal, progress=self.progress)


def _opened(model: nn.Module, recipe: Recipe, *, inplace: bool) -> TorchModel:
    """The adapter, its heads untied where the recipe's transforms ask for it; raises where weights have no values."""
    adapter = TorchModel(model, inplace=inplace)
    untie_for(adapter, recipe)
    check_has_values(adapter)
    return adapter


def _find_folds(adapter: TorchModel, recipe: Recipe, probe: Any) -> FoldReport:
    if not recipe.fold_batchnorm:
        return FoldReport()
    return find_pairs(adapter.model, None if probe is None else lambda: probe.run(adapter.model))


def _means_behind_norms(adapter: TorchModel, recipe: Recipe, probe: Any) -> dict[str, Tensor]:
    """What BatchNorms say of the inputs of layers, where there is no data to say more.

    Transforms change what layers read, so behind them nothing is known.
    """
    if probe is not None or not recipe.correct_bias or recipe.transforms:
        return {}
    return expected_inputs(adapter.model)


def _fold(adapter: TorchModel, folds: FoldReport, probe: Any) -> list[str]:
    """Fold, and check on the first batch that the float function is the same; returns notes."""
    if not folds.folded:
        return []
    evidence = sorted(set(folds.evidence.values()))
    note = f"{len(folds.folded)} BatchNorms folded, pairs established by {', '.join(evidence)}"
    if probe is None:
        adapter.model = fold_(adapter.model, folds)
        return [f"{note}; not checked on data, because there is none"]
    with torch.no_grad():
        before = first_tensor(probe.run(adapter.model))
        adapter.model = fold_(adapter.model, folds)
        after = first_tensor(probe.run(adapter.model))
    if before is None or after is None:
        return [f"{note}; the output has no tensor to check it by"]
    same = sqnr_db(before, after)
    if same < _SAME_FUNCTION_DB:
        raise ModelError(
            f"folding {len(folds.folded)} BatchNorms changed the float output (SQNR {same:.1f} dB, expected at least "
            f"{_SAME_FUNCTION_DB:.0f}); set fold_batchnorm = false in the recipe"
        )
    return [f"{note}; float output unchanged to {same:.0f} dB"]


def _settle_layout(adapter: TorchModel, probe: Any) -> list[str]:
    """Run the first batch; where the model's own code cannot take channels-last outputs, switch to contiguous ones."""
    convolutions = [m for m in adapter.model.modules() if isinstance(m, QuantizedConv)]
    if probe is None:
        for module in convolutions:  # without a trial the layout that every model can take
            module.channels_last = False
        if any("conv2d_int8" in module.kernel for module in convolutions):
            return [
                "without data channels-last outputs could not be tried: convolutions return contiguous ones (slower)"
            ]
        return []
    with torch.no_grad():
        try:
            probe.run(adapter.model)
        except RuntimeError as error:
            if "view" not in str(error) or not convolutions:
                raise
            for module in convolutions:
                module.channels_last = False
            probe.run(adapter.model)
            return [
                "the model calls .view on convolution outputs, so they are contiguous instead of channels-last (slower)"
            ]
    return []


def _judge_model(adapter: TorchModel, probe: Any, *, inplace: bool) -> Verdict:
    if probe is None or inplace:
        return Verdict()
    with torch.no_grad(), evaluation_mode(adapter.original):
        return judge_calls(lambda: probe.run(adapter.original), lambda: probe.run(adapter.model), budget=1.0)
