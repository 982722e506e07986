"""From a trained model to the quantized one: installs the modules that evaluation already ran, then fuses."""

from __future__ import annotations

import time
from dataclasses import replace

from torch import nn

from narrowcast.errors import ContractError, ModelError
from narrowcast.methods import weight_sqnr_db
from narrowcast.models import TorchModel
from narrowcast.models.modules import replace_everywhere_, stored_bytes
from narrowcast.nn.trained import TrainedModule
from narrowcast.pipeline.fuse import fuse
from narrowcast.pipeline.judge import Verdict
from narrowcast.pipeline.result import Quantized, totals_of
from narrowcast.qat.state import Prepared, prepared_of, twins_of, unwrapped
from narrowcast.report import LayerOutcome, Report


def convert(model: nn.Module, *, strict: bool = False) -> Quantized:
    """The quantized model that a trained one stands for; its integers are those that were trained.

    Args:
        model: what `prepare` returned, trained; also wrapped by torch.compile or DistributedDataParallel. It is not
            changed and can be trained on.
        strict: raise where a layer never ran in training.

    Returns:
        As `nc.quantize`: save it with `nc.save`. Where the recipe fuses, chains of static convolutions run as
        networks and linear layers apply the activation functions behind them, with the same integers and another
        rounding of floats between them; all else is bit for bit what the trained model computes in evaluation mode.

    Raises:
        ModelError: the model was not prepared, was never run in training mode, or a weight or range is not finite;
            the message names the layer.
        ContractError: `strict`, and a layer never ran in training.
    """
    started = time.perf_counter()
    inner = unwrapped(model)
    prepared = prepared_of(inner)
    if any(hasattr(p, "full_tensor") for p in inner.parameters()):
        raise ModelError(
            "the model's parameters are sharded over processes; gather them (get_model_state_dict with "
            "full_state_dict=True), load them into a model prepared anew with the same recipe, and convert that"
        )
    steps = {path: int(twin.steps) for path, twin in twins_of(inner)}
    idle = {path for path, twin in twins_of(inner) if not twin.was_trained()}
    _check_ran(idle, len(steps), strict=strict)
    adapter, records, inputs = _installed(inner)
    outcomes = [_outcome(row, prepared, records, inputs, steps, idle) for row in prepared.outcomes]
    adapter.model.eval()
    outcomes, notes = fuse(adapter, prepared.flows, outcomes, prepared.probe)
    totals = replace(
        totals_of(prepared.plan, outcomes, Verdict(), prepared.probe), parameters=prepared.before[0],
        bytes_before=prepared.before[1], bytes_after=stored_bytes(adapter.model),
        seconds=time.perf_counter() - started,
    )  # fmt: skip
    name = prepared.plan.recipe.name
    report = Report(
        name, prepared.model, outcomes, totals, [*prepared.notes, *notes], prepared.changes, prepared.findings
    )
    return Quantized(adapter.model, report, prepared.plan.recipe, prepared.source)


def _check_ran(idle: set[str], twins: int, *, strict: bool) -> None:
    if twins and len(idle) == twins:
        raise ModelError(
            "the model was never run in training mode, so there is nothing trained to convert; train it (model.train() "
            "and forward passes), load the state_dict of a trained one, or use nc.quantize for post-training "
            "quantization"
        )
    if idle and strict:
        raise ContractError(
            f"strict: {len(idle)} layers never ran in training and are as post-training quantization left them: "
            f"{', '.join(repr(path) for path in sorted(idle)[:10])}"
        )


def _installed(model: nn.Module) -> tuple[TorchModel, dict[str, dict[str, float]], dict[str, str]]:
    """A copy of the model with quantized modules in place of the twins.

    Returns:
        The adapter of the copy; each weight's SQNR by path and name; the trained static ranges of inputs in words.
    """
    adapter = TorchModel.around(model)
    quality: dict[str, dict[str, float]] = {}
    inputs: dict[str, str] = {}
    originals = dict(model.named_modules())
    for path, twin in list(twins_of(adapter.model)):
        trained = originals[path]
        assert isinstance(trained, TrainedModule)
        module = trained.build()
        quality[path] = {
            name: weight_sqnr_db(trained.matrix(name).detach(), record)
            for name, record in module.quantized_weights().items()
        }
        inputs[path] = _range_text(trained)
        for table in ("_forward_hooks", "_forward_pre_hooks"):
            getattr(module, table).update(getattr(twin, table))
        adapter.model = replace_everywhere_(adapter.model, twin, module)
    adapter.detach_()
    return TorchModel.around(adapter.model, copy=False), quality, inputs


def _range_text(twin: TrainedModule) -> str:
    """What a static input's range has become; "" where it is not static."""
    ranges = twin.activation()
    if ranges.scale is None or ranges.zero_point is None:
        return ""
    low = -ranges.zero_point.float() * ranges.scale
    high = (ranges.code_high - ranges.zero_point.float()) * ranges.scale
    return f"{ranges.spec} [{float(low.min()):.4g}, {float(high.max()):.4g}]"


def _outcome(
    row: LayerOutcome, prepared: Prepared, quality: dict[str, dict[str, float]], inputs: dict[str, str],
    steps: dict[str, int], idle: set[str],
) -> LayerOutcome:  # fmt: skip
    """What the report says of one weight after training."""
    planned = next((r for r in prepared.plan.layers if r.layer.name == row.layer), None)
    if planned is None or planned.weight is None:
        return row
    site = next(site for site in planned.layer.sites if site.path in quality)
    passes = steps[site.path]
    notes = [f"started from {row.method}", *row.notes]
    cleared = replace(row, output_sqnr_db=None, float_ms=None, quantized_ms=None, errors=[], notes=notes)
    if site.path in idle:
        reason = "; ".join(part for part in (row.reason, "it never ran in training") if part)
        return replace(cleared, reason=reason)
    sqnr = quality[site.path].get(site.parameter)
    given = inputs[site.path] or row.input
    return replace(
        cleared,
        input=given,
        method=f"trained, {planned.train}",
        weight_sqnr_db=sqnr,
        notes=[f"{passes} training passes", *notes],
    )
