"""The main job: plan, fold, observe, solve, install, judge; one call from a float model to a quantized one."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.core import sqnr_db
from narrowcast.errors import ContractError, DataError, ModelError, RecipeError
from narrowcast.export.checkpoint_tensors import source_hash
from narrowcast.models import FoldReport, TorchModel, expected_inputs, find_pairs, fold_
from narrowcast.models.modules import evaluation_mode, stored_bytes
from narrowcast.nn import QuantizedConv
from narrowcast.pipeline.calibrate import Calibration, calibrate, first_batch, rewindable
from narrowcast.pipeline.doctor import Doctor, refuse_severe, sort_findings, unseen
from narrowcast.pipeline.fuse import fuse, planned_convolutions, trace
from narrowcast.pipeline.judge import Verdict, first_tensor, judge_calls, slower_than_float
from narrowcast.pipeline.resume import Journal, fingerprint
from narrowcast.pipeline.sequential import solve_in_blocks, wants_blocks
from narrowcast.pipeline.shared_ranges import SharedRanges
from narrowcast.pipeline.solve import Job, solve
from narrowcast.pipeline.solve_weight import check_finite, needs_of
from narrowcast.pipeline.streams import Recording, recorded
from narrowcast.pipeline.transform import transform
from narrowcast.planning import LayerPlan, Plan, make_plan, untie_for
from narrowcast.progress import progress_steps
from narrowcast.recipe import Recipe, load_recipe
from narrowcast.report import Finding, LayerOutcome, Report, Totals

# Float32 rounding of a network of this depth; a fold that changes more than this has changed the function.
_SAME_FUNCTION_DB = 60.0


@dataclass(frozen=True)
class Quantized:
    """The result of `quantize`.

    Args:
        model: the quantized module; call it like the float one.
        report: what became of every weight.
        recipe: the recipe that was followed.
        source_sha256: hash of the float model's tensors, which says what this was made from.
    """

    model: nn.Module
    report: Report
    recipe: Recipe
    source_sha256: str = ""


def quantize(
    model: nn.Module,
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
        model: any PyTorch module; it is not changed unless `inplace`.
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
            there with the same result. Of use where the recipe's methods work block after block.

    Returns:
        The quantized model in evaluation mode, with its report.

    Raises:
        RecipeError, ModelError, DataError, FormatError: bad input; the message says what, where and the remedy.
        CheckpointError: `resume` holds the blocks of another model, recipe or data, or cannot be written.
        ContractError: `strict` or `min_coverage` is not met; the message lists the layers.
    """
    started = time.perf_counter()
    if not 0.0 <= min_coverage <= 1.0:
        raise ContractError(f"min_coverage is a share between 0 and 1, got {min_coverage}")
    loaded = load_recipe(recipe)
    adapter = _opened(model, loaded, inplace=inplace)
    batches = rewindable(data)
    before = (sum(p.numel() for p in adapter.model.parameters()), stored_bytes(adapter.model))
    source = source_hash(model)
    probe = None if data is None else first_batch(batches, adapter)
    folds = _find_folds(adapter, loaded, probe)
    plan = make_plan(adapter, loaded, folds, has_data=data is not None)
    _check_has_data(plan, data, resume)
    _check_plan(plan, strict=strict, min_coverage=min_coverage)
    _check_weights(adapter, plan)
    doctor = None if probe is None else Doctor.of(adapter, plan, probe)
    if doctor is not None:
        batches = doctor.read(data, batches, strict=strict)
    means = _means_behind_norms(adapter, loaded, probe)
    notes = [*plan.notes, *_fold(adapter, folds, probe)]
    transformed = transform(adapter, plan, batches, probe)
    calibration, recording, findings = _calibrate(adapter, plan, batches, doctor, strict=strict, progress=progress)
    calibration.means = means
    notes += transformed.notes + calibration.observation.notes
    journal = _journal(resume, plan, source, calibration, recording)
    outcomes, more = _solve_and_fuse(adapter, plan, calibration, probe, _Solver(recording, journal, progress))
    verdict = _judge_model(adapter, probe, inplace=inplace)
    totals = replace(
        _totals(plan, outcomes, verdict, probe), parameters=before[0], bytes_before=before[1],
        bytes_after=stored_bytes(adapter.model), seconds=time.perf_counter() - started,
    )  # fmt: skip
    report = Report(loaded.name, type(model).__name__, outcomes, totals, notes + more, transformed.changes, findings)
    if strict:
        _refuse([f"{row.layer}: fell back: {row.reason}" for row in outcomes if row.outcome == "fell back"])
    return Quantized(adapter.model, report, loaded, source)


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


def _solve_and_fuse(
    adapter: TorchModel, plan: Plan, calibration: Calibration, probe: Any, solver: _Solver
) -> tuple[list[LayerOutcome], list[str]]:
    """Quantize and install every module, then let chains of them run together; returns outcomes and notes."""
    flows = trace(adapter, plan, probe)
    shared = SharedRanges.of(adapter.model, flows.flows, planned_convolutions(plan))
    outcomes, notes = solver.run(Job(adapter, plan, calibration, shared))
    adapter.detach_()
    notes += _settle_layout(adapter, probe)
    outcomes, fusion_notes = fuse(adapter, flows, outcomes, probe)
    return outcomes, notes + fusion_notes + slower_than_float(outcomes)


def _opened(model: nn.Module, recipe: Recipe, *, inplace: bool) -> TorchModel:
    """The adapter, its heads untied where the recipe's transforms ask for it; raises where weights have no values."""
    adapter = TorchModel(model, inplace=inplace)
    untie_for(adapter, recipe)
    _check_has_values(adapter)
    return adapter


def _check_has_values(adapter: TorchModel) -> None:
    for layer in adapter.layers():
        if not layer.reason and layer.type != "Parameter" and adapter.weight(layer).is_meta:
            raise ModelError(
                f"layer {layer.name!r} is on the meta device and has no values to quantize; load the weights first "
                "(nc.plan works without them)"
            )


def _check_weights(adapter: TorchModel, plan: Plan) -> None:
    """Refuse to quantize weights that are not finite, before any work is done; kept ones may hold anything."""
    for row in plan.layers:
        if row.weight is not None:
            check_finite(row.layer, adapter.weight(row.layer))


def _check_has_data(plan: Plan, data: Any, resume: str | Path | None) -> None:
    static = [row.layer.name for row in plan.layers if row.input is not None and row.input.observer]
    if static and data is None:
        raise DataError(
            f"recipe {plan.recipe.name!r} fixes the input ranges of {len(static)} layers ({static[0]!r}, ...) from "
            "calibration data, and there is none; pass data=..., or use 'dynamic-int8', which needs none"
        )
    needing = [row for row in plan.layers if needs_of(row)]
    if needing and data is None:
        row = needing[0]
        raise DataError(
            f"recipe {plan.recipe.name!r} solves {len(needing)} weights ({row.layer.name!r}, ...) by "
            f"{next(iter(row.method))!r}, which needs calibration data, and there is none; pass data=..., or use "
            "method 'rtn' or another that needs none"
        )
    if plan.recipe.sequential is True and data is None:
        raise DataError(
            f"recipe {plan.recipe.name!r} is sequential = true, which sends calibration data through the blocks, and "
            "there is none; pass data=..., or leave sequential at 'auto'"
        )
    outliers = [row.layer.name for row in plan.layers if row.input is not None and row.input.outliers]
    if outliers and data is None:
        raise DataError(
            f"recipe {plan.recipe.name!r} keeps outlier channels of {len(outliers)} layers ({outliers[0]!r}, ...), "
            "which calibration data names, and there is none; pass data=..., or leave out 'outliers:...'"
        )
    _check_resume(plan, resume)


def _check_resume(plan: Plan, resume: str | Path | None) -> None:
    if resume is not None and not wants_blocks(plan):
        raise RecipeError(
            f"recipe {plan.recipe.name!r} solves all layers from one pass over the data, so there are no finished "
            "blocks to resume from; leave resume out, or set sequential = true"
        )


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


def _totals(plan: Plan, outcomes: list[LayerOutcome], verdict: Verdict, probe: Any) -> Totals:
    done = [row for row in outcomes if row.spec]
    integer_names = {row.layer.name for row in plan.layers if row.integer}
    integer = [row for row in done if row.layer in integer_names]
    macs = None
    if probe is not None:
        macs = sum(row.macs or 0 for row in integer) / max(sum(row.macs or 0 for row in outcomes), 1)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return Totals(
        quantized_parameters=sum(row.parameters for row in done),
        coverage=_coverage(plan),
        integer_parameters=sum(row.parameters for row in integer),
        integer_macs=macs,
        peak_memory_bytes=kilobytes * (1 if sys.platform == "darwin" else 1024),
        output_sqnr_db=verdict.sqnr_db,
        float_ms=verdict.float_ms,
        quantized_ms=verdict.quantized_ms,
        timed_samples=None if probe is None else probe.samples,
        threads=torch.get_num_threads(),
    )


def _is_matrix(row: LayerPlan) -> bool:
    """Whether a weight is one that quantization is about: not a vector, and not gone by folding."""
    return len(row.layer.shape) > 1 and row.bits_per_weight > 0


def _check_plan(plan: Plan, *, strict: bool, min_coverage: float) -> None:
    """Raise what can be known before any work is done: weights that cannot be quantized, and the coverage."""
    if strict:
        short = [f"{row.layer.name}: kept: {row.reason}" for row in plan.layers if row.refused]
        _refuse(short + [f"{row.layer.name}: falls back: {row.fallback}" for row in plan.layers if row.fallback])
    coverage = _coverage(plan)
    if coverage < min_coverage:
        kept = [f"{row.layer.name}: {row.reason}" for row in plan.layers if row.weight is None and _is_matrix(row)]
        raise ContractError(
            f"coverage {coverage:.1%} is below the required {min_coverage:.1%}; kept: {'; '.join(kept[:10])}"
        )


def _refuse(short: list[str]) -> None:
    if short:
        raise ContractError(f"strict: {len(short)} weights are not what the recipe says: {'; '.join(short[:10])}")


def _coverage(plan: Plan) -> float:
    possible = sum(row.layer.parameters for row in plan.layers if _is_matrix(row))
    return sum(row.layer.parameters for row in plan.layers if row.weight is not None) / possible if possible else 1.0
