"""Merging adapters into the integers of their layers: how, and what is lost by it, layer by layer."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.core import PerChannel, PerGroup, QuantizedTensor, from_blocks, nearest_levels, quantize, to_blocks
from narrowcast.data import iterate
from narrowcast.errors import DataError, RecipeError
from narrowcast.methods import Rtn, Seen, WeightMethod, make_method, weight_sqnr_db
from narrowcast.models import TorchModel
from narrowcast.models.modules import evaluation_mode, replace_everywhere_, stored_bytes
from narrowcast.nn import QuantizedLinear, QuantizedModule
from narrowcast.nn.adapted import AdaptedLinear
from narrowcast.nn.frozen import FrozenLinear
from narrowcast.observers.hessian import Hessian
from narrowcast.pipeline.run import Quantized
from narrowcast.qat.adapters import HOOK_TABLES, Attached, RefuseGradient, adapted_of, adapters_of, forget_
from narrowcast.recipe import Recipe
from narrowcast.report import LayerOutcome, Report, StepError, Totals


def merge_adapters(
    model: nn.Module, data: Any = None, *, method: str | Mapping[str, Mapping[str, object]] | None = None
) -> Quantized:
    """The quantized model with its adapters in its integers, in the formats that the layers have.

    Adapters of "zero_points" and "codes" merge without loss. Those of "requantize" are rounded: every row to the best
    of the ranges that it has, ranges found anew, and what `method` makes of it; best is the least error of the layer's
    output where there is data, else of its weights. The report says how far each layer is from base and adapter
    together, with the adapter dropped and with it merged.

    Args:
        model: what `attach_adapters` returned, trained; also wrapped by torch.compile or DistributedDataParallel. It is
            not changed and can be trained on.
        data: inputs, as in `nc.quantize`, for the inputs of layers to be seen; without, all inputs count alike.
        method: a weight solver besides rounding to nearest: "gptq", {"gptq": {"damping": 0.05}}; needs data.

    Returns:
        As `nc.quantize`; layers without adapter are as they were. A model that came from `nc.load` has rows in its
        report for layers with adapters only.

    Raises:
        ModelError: the model has no adapters, or one that training has left without finite numbers.
        RecipeError: the method is not known or works on blocks of layers, or there is nothing for it to do.
        DataError: the method needs data, or an adapted layer did not run on it.
    """
    started = time.perf_counter()
    inner, attached = adapted_of(model)
    solver = _solver(method, data, attached)
    adapted = dict(adapters_of(inner))
    for layer in adapted.values():
        layer.check_finite()
    requantizes = not next(iter(adapted.values())).exact
    seen = _inputs(inner, adapted, data) if data is not None and requantizes else {}
    merged = {path: _merge(layer, seen.get(path), solver) for path, layer in adapted.items()}
    quantized = _installed(inner, {path: entry.layer for path, entry in merged.items()})
    report = _report(quantized, attached, adapted, merged, time.perf_counter() - started)
    recipe = attached.recipe or Recipe((), "as loaded")
    return Quantized(quantized, report, recipe, attached.source)


@dataclass(frozen=True)
class _Merged:
    """One merged layer, by what it was rounded, its errors, and the share of the adapter that rounding took away."""

    layer: QuantizedLinear
    how: str
    errors: list[StepError]
    notes: list[str]


def _solver(method: Any, data: Any, attached: Attached) -> WeightMethod | None:
    if method is None:
        return None
    made: Any = make_method(method)
    if attached.settings.merge != "requantize":
        raise RecipeError(f"merge_adapters: adapters of {attached.settings.merge!r} are integers; leave method out")
    if "block" in made.needs:
        raise RecipeError(f"merge_adapters: {method!r} works on whole blocks of a model; use 'gptq', 'hqq' or 'rtn'")
    if made.needs & {"hessian", "inputs"} and data is None:
        raise DataError(f"merge_adapters: {method!r} needs data; pass inputs, as to nc.quantize")
    solver: WeightMethod = made
    return solver


def _inputs(model: nn.Module, adapted: Mapping[str, AdaptedLinear], data: Any) -> dict[str, Seen]:
    """What the layers with adapters read, in the model as it was trained."""
    watched = {path: Hessian() for path in adapted}
    handles = [
        layer.register_forward_pre_hook(lambda _, args, path=path: watched[path].update(args[0].detach()))
        for path, layer in adapted.items()
    ]
    try:
        with torch.no_grad(), evaluation_mode(model):
            for batch in iterate(data, model):
                batch.run(model)
    finally:
        for handle in handles:
            handle.remove()
    seen = {}
    for path, watcher in watched.items():
        if not watcher.samples:
            raise DataError(f"merge_adapters: layer {path!r} did not run on the data; give data that reaches it")
        hessian, ratio = watcher.result(), adapted[path].base.input_ranges().ratio()
        if ratio is not None:  # the weight has taken the scales in
            hessian = hessian / ratio.double() / ratio.double()[:, None]
        seen[path] = Seen(hessian.diagonal().float(), hessian.float(), watcher.samples)
    return seen


def _merge(layer: AdaptedLinear, seen: Seen | None, solver: WeightMethod | None) -> _Merged:
    base = layer.base.quantized_weights()["weight"]
    moved = float(layer.delta().detach().norm() / layer.weight.norm().clamp(min=1e-30))
    note = f"the adapter moves the weight by {moved:.2%}"
    if layer.exact:
        made = layer.merged()  # type: ignore[operator]
        return _Merged(made, layer.settings_.merge, [], ["merged without loss", *_flips(made, base)])
    weight = layer.merged_weight()
    candidates = {
        "kept ranges": _on_kept_ranges(weight, base),
        "ranges found anew": Rtn().quantize(weight, base.spec, seen),
    }
    notes = [note]
    if solver is not None:
        solved = solver.solve(weight, base.spec, seen)
        candidates[type(solver).__name__.lower()] = solved.record
        notes += solved.notes
    record, how = _best_rows(weight, candidates, seen)
    errors = [
        StepError("adapter dropped", weight_sqnr_db(weight, base), _output_error(weight, base, seen)),
        StepError("adapter merged", weight_sqnr_db(weight, record), _output_error(weight, record, seen)),
    ]
    before, after = (e.output_error if e.output_error is not None else -(e.weight_sqnr_db or 0.0) for e in errors)
    if before <= after:
        notes.append("merging loses more than the adapter brings")
    return _Merged(layer.with_record(record), how, errors, notes + _flips(layer.with_record(record), base))


def _flips(layer: QuantizedLinear, base: QuantizedTensor) -> list[str]:
    record = layer.quantized_weights()["weight"]
    flipped = float((record.codes.view(torch.uint8) != base.codes.view(torch.uint8)).float().mean())
    return [f"{flipped:.2%} of the codes changed"]


def _on_kept_ranges(weight: Tensor, base: QuantizedTensor) -> QuantizedTensor:
    """The nearest codes under the scales and zero points, or learned levels, that the layer has."""
    if base.levels is not None:
        codes = nearest_levels(to_blocks(weight, base.spec.granularity), base.levels)
        return replace(base, codes=from_blocks(codes, base.spec.granularity, base.shape))
    return quantize(weight, base.spec, base.scale, base.zero_point)


def _best_rows(
    weight: Tensor, candidates: Mapping[str, QuantizedTensor], seen: Seen | None
) -> tuple[QuantizedTensor, str]:
    """Every row from the candidate with the least error in it; all rows from one where rows share a range."""
    names, records = list(candidates), list(candidates.values())
    errors = torch.stack([_row_errors(weight, record, seen) for record in records])
    spec = records[0].spec
    if not isinstance(spec.granularity, PerChannel | PerGroup):
        errors = errors.sum(1, keepdim=True).expand_as(errors)
    best = errors.argmin(0)
    parts: dict[str, Any] = {"spec": spec}
    for name in ("codes", "scale", "zero_point", "levels"):
        tensors = [getattr(record, name) for record in records]
        if tensors[0] is not None and tensors[0].shape[0] == weight.shape[0]:
            parts[name] = torch.stack(
                [t.view(torch.uint8) if name == "codes" and t.element_size() == 1 else t for t in tensors]
            )[best, torch.arange(weight.shape[0])]
            parts[name] = parts[name].view(tensors[0].dtype)
        else:
            parts[name] = tensors[int(best[0])] if best.numel() else tensors[0]
    counts = torch.bincount(best, minlength=len(names)).tolist()
    how = ", ".join(f"{name} in {n} rows" for name, n in zip(names, counts, strict=True) if n)
    return QuantizedTensor(**parts), how


def _row_errors(weight: Tensor, record: QuantizedTensor, seen: Seen | None) -> Tensor:
    """[out] squared error of every row: of its output where its inputs were seen."""
    lost = (weight - record.dequantize()).double()
    if seen is None or seen.hessian is None:
        return lost.square().sum(1)
    return ((lost @ seen.hessian.double()) * lost).sum(1)


def _output_error(weight: Tensor, record: QuantizedTensor, seen: Seen | None) -> float | None:
    if seen is None or seen.hessian is None:
        return None
    whole = ((weight.double() @ seen.hessian.double()) * weight.double()).sum()
    return float(_row_errors(weight, record, seen).sum() / whole.clamp(min=1e-300))


def _installed(model: nn.Module, merged: Mapping[str, QuantizedLinear]) -> nn.Module:
    """A copy of the model with the merged layers, and the frozen ones as they were."""
    work = TorchModel.around(model)
    for path, module in list(work.model.named_modules()):
        if isinstance(module, FrozenLinear):
            made = merged[path] if path in merged else module.quantized()
            for table in HOOK_TABLES:
                getattr(made, table).update(getattr(module, table))
            work.model = replace_everywhere_(work.model, module, made)
        elif isinstance(module, QuantizedModule):
            for key, hook in list(module._forward_pre_hooks.items()):
                if isinstance(hook, RefuseGradient):
                    del module._forward_pre_hooks[key]
    work.detach_()
    forget_(work.model)
    return work.model.eval()


def _report(
    model: nn.Module, attached: Attached, adapted: Mapping[str, AdaptedLinear], merged: Mapping[str, _Merged],
    seconds: float,
) -> Report:  # fmt: skip
    rank, lost = attached.settings.rank, [path for path, entry in merged.items() if _loses(entry)]
    note = f"{len(merged)} adapters of rank {rank} merged ({attached.settings.merge})"
    notes = [note + (f"; in {len(lost)} layers rounding takes more than the adapter brings" if lost else "")]
    notes += [f"{path}: without adapter: {why}" for path, why in attached.skipped.items()]
    known = attached.report
    if known is None:
        rows = [_row(LayerOutcome(path, "Linear", "quantized"), merged[path]) for path in merged]
        done = sum(row.parameters for row in rows)
        totals = Totals(done, 0.0, 0, None, bytes_after=stored_bytes(model), seconds=seconds)
        notes.append("the model came without a report: only layers with adapters are listed")
        return Report("as loaded", type(model).__name__, rows, totals, notes)
    rows = [_row(row, merged[row.layer]) if row.layer in merged else row for row in known.layers]
    totals = replace(known.totals, bytes_after=stored_bytes(model), seconds=seconds, output_sqnr_db=None)
    return replace(known, layers=rows, totals=totals, notes=[*known.notes, *notes])


def _loses(entry: _Merged) -> bool:
    return any(note.startswith("merging loses") for note in entry.notes)


def _row(row: LayerOutcome, merged: _Merged) -> LayerOutcome:
    """What the report says of one merged layer."""
    record = merged.layer.quantized_weights()["weight"]
    rows, columns = record.shape
    sqnr = merged.errors[-1].weight_sqnr_db if merged.errors else None
    started = [f"started from {row.method}"] if row.method else []
    return replace(
        row, spec=str(record.spec), method=f"adapter, {merged.how}", parameters=rows * columns, weight_sqnr_db=sqnr,
        bits_per_weight=record.spec.bits_per_value(record.shape), kernel=merged.layer.kernel, output_sqnr_db=None,
        float_ms=None, quantized_ms=None, errors=merged.errors, notes=[*merged.notes, *started, *row.notes],
    )  # fmt: skip
