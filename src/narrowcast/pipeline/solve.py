"""Solving and installing: weight by weight, module by module, each judged as it is replaced."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from narrowcast.core import QuantizedTensor, sqnr_db
from narrowcast.errors import DataError, FormatError, ModelError
from narrowcast.methods import make_method
from narrowcast.models import Layer, TorchModel
from narrowcast.models.modules import get_module
from narrowcast.nn import QuantizedModule
from narrowcast.pipeline.calibrate import Calibration, activation_of, seen_by
from narrowcast.pipeline.judge import Verdict, judge_module
from narrowcast.plan import LayerPlan, Plan
from narrowcast.progress import progress_steps
from narrowcast.report import LayerOutcome


@dataclass(frozen=True)
class _Solved:
    record: QuantizedTensor
    sqnr_db: float
    method: str
    seconds: float


def solve(adapter: TorchModel, plan: Plan, calibration: Calibration, *, progress: bool) -> list[LayerOutcome]:
    """Quantize every planned weight and install the modules; returns one outcome per weight of the plan."""
    wanted = [row for row in plan.layers if row.weight is not None]
    solved: dict[str, _Solved] = {}
    modules: dict[str, tuple[QuantizedModule, Verdict, str, str]] = {}
    pending = _weights_per_module(wanted)
    with progress_steps("quantizing", len(wanted), enabled=progress) as step:
        for row in wanted:
            solved[row.layer.name] = _solve(adapter, row, calibration)
            for path in _complete(row, pending, solved):
                modules[path] = _install(adapter, path, pending[path], solved, calibration)
            step(row.layer.name)
    return [_outcome(row, solved, modules, calibration) for row in plan.layers]


def _weights_per_module(rows: list[LayerPlan]) -> dict[str, list[LayerPlan]]:
    pending: dict[str, list[LayerPlan]] = {}
    for row in rows:
        for site in row.layer.sites:
            pending.setdefault(site.path, []).append(row)
    return pending


def _complete(row: LayerPlan, pending: dict[str, list[LayerPlan]], solved: dict[str, _Solved]) -> list[str]:
    """The modules whose last weight was this one."""
    paths = [site.path for site in row.layer.sites]
    return [path for path in paths if all(other.layer.name in solved for other in pending[path])]


def _solve(adapter: TorchModel, row: LayerPlan, calibration: Calibration) -> _Solved:
    assert row.weight is not None
    started = time.perf_counter()
    weight = adapter.weight(row.layer)
    check_finite(row.layer, weight)
    seen, basis = seen_by(adapter, row.layer, calibration)
    method = make_method(row.method)
    try:
        record = method.quantize(weight, row.weight, seen)
    except (FormatError, ModelError, DataError) as error:
        raise type(error)(f"layer {row.layer.name!r}: {error}") from None
    name = next(iter(row.method)) if row.weight.format.scaled else "cast"
    text = f"{name}, {basis}" if row.weight.format.scaled else name
    return _Solved(record, sqnr_db(weight, record.dequantize()), text, time.perf_counter() - started)


def check_finite(layer: Layer, weight: Tensor) -> None:
    """Raise ModelError where a weight is NaN or infinite, naming layer and position."""
    finite = torch.isfinite(weight)
    if bool(finite.all()):
        return
    row, column = (int(i) for i in (~finite).nonzero()[0])
    raise ModelError(
        f"layer {layer.name!r}: weight [{row}, {column}] is {float(weight[row, column])}, and {int((~finite).sum())} of "
        f"{weight.numel()} weights are not finite; repair the checkpoint, or keep this layer by a rule"
    )


def _install(
    adapter: TorchModel, path: str, rows: list[LayerPlan], solved: dict[str, _Solved], calibration: Calibration
) -> tuple[QuantizedModule, Verdict, str, str]:
    records = {
        site.parameter: solved[row.layer.name].record for row in rows for site in row.layer.sites if site.path == path
    }
    float_module: nn.Module = get_module(adapter.model, path)
    site = next(site for site in rows[0].layer.sites if site.path == path)
    row = rows[0] if adapter.takes_activation(site) else replace(rows[0], input=None)
    activation, reason, text = activation_of(row, path, calibration)
    installed = adapter.install(path, records, activation)
    verdict = judge_module(float_module, installed, calibration.observation.samples.pop(path, None))
    return installed, verdict, reason, text


def _outcome(
    row: LayerPlan,
    solved: dict[str, _Solved],
    modules: dict[str, tuple[QuantizedModule, Verdict, str, str]],
    calibration: Calibration,
) -> LayerOutcome:
    layer = row.layer
    base = LayerOutcome(
        layer.name, layer.type, "kept", row.reason, parameters=layer.parameters, bits_per_weight=row.bits_per_weight,
        bytes_before=layer.bytes, bytes_after=row.bytes_after, macs=_macs(layer, calibration),
    )  # fmt: skip
    if row.weight is None:
        return replace(base, outcome="folded") if row.reason.startswith("folded into") else base
    # of tied weights the consumer that multiplies speaks for all
    path = next((s.path for s in layer.sites if s.type != "Embedding"), layer.sites[0].path)
    module, verdict, reason, text = modules[path]
    reasons = [part for part in (row.reason, reason, _never_ran(layer, calibration)) if part]
    return replace(
        base, outcome="fell back" if reason else "quantized", reason="; ".join(reasons), spec=str(row.weight), input=text,
        method=solved[layer.name].method, weight_sqnr_db=solved[layer.name].sqnr_db, output_sqnr_db=verdict.sqnr_db,
        kernel=module.kernel, seconds=solved[layer.name].seconds, float_ms=verdict.float_ms,
        quantized_ms=verdict.quantized_ms,
    )  # fmt: skip


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
