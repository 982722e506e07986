"""Function-preserving transforms, in the recipe's order: find who feeds whom, rewrite, prove that nothing changed.

Each transform is tried on the first batch: an output that differs by more than float error is undone and is an error
that names the layers. What it did to every quantized layer is measured before and after.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.core import sqnr_db
from narrowcast.data import repeatable
from narrowcast.errors import DataError, ModelError
from narrowcast.models import TorchModel
from narrowcast.models.channel_flow import tensors_in
from narrowcast.models.feeds import Feeds
from narrowcast.models.follow import follow_channels
from narrowcast.models.patterns import pattern_feeds
from narrowcast.models.rewrite import divide_output_, groups_of, layer_kind, matrix, set_matrix_
from narrowcast.pipeline.absorption import absorption
from narrowcast.pipeline.channel_scales import choose_scales
from narrowcast.pipeline.rotation import rotation
from narrowcast.pipeline.transform_stage import Rewrite, Stage, Step
from narrowcast.planning import Plan
from narrowcast.report import LayerChange
from narrowcast.transforms import Absorb, Rotate, Transform, at_columns, make_transform, multiply_columns

# Rounding of a network in its own precision; what changes more has changed the function.
_SAME_FUNCTION_DB = {torch.float64: 60.0, torch.float32: 60.0, torch.float16: 35.0, torch.bfloat16: 20.0}


@dataclass
class Transformed:
    """What the transforms of a recipe did.

    Args:
        notes: for the report.
        changes: per quantized layer and transform, its error before and after.
    """

    notes: list[str] = field(default_factory=list)
    changes: list[LayerChange] = field(default_factory=list)


def transform(adapter: TorchModel, plan: Plan, data: Any, probe: Any) -> Transformed:
    """Apply the transforms of the plan's recipe to the working copy. The caller's tensors are not written to.

    Args:
        adapter: with BatchNorms folded.
        plan: of the same adapter.
        data: calibration data; None when there is none.
        probe: its first batch; None without data.

    Raises:
        DataError: a transform needs data, or to read it twice, and cannot.
        ModelError: a transform does not fit the model, or changes its function; names the layers.
        RecipeError: a pair's pattern matches nothing.
    """
    done = Transformed()
    if not plan.recipe.transforms:
        return done
    if data is not None and not repeatable(data):
        raise DataError(
            "transforms read the calibration data once more than calibration does, and a generator can be read only "
            "once; pass a list or a DataLoader"
        )
    feeds = _find_feeds(adapter, probe)
    done.notes += feeds.notes
    for values in plan.recipe.transforms:
        (name,) = values
        stage = Stage(adapter, plan, data, probe, feeds)
        _apply(stage, name, make_transform(values), done)
    return done


def _find_feeds(adapter: TorchModel, probe: Any) -> Feeds:
    if probe is None:
        feeds = pattern_feeds(adapter.model)
        evidence = sorted({feed.evidence for feed in feeds.usable()}) or ["nothing: no pattern fits"]
        feeds.notes.append(f"transforms: who feeds whom is known by {', '.join(evidence)}; give data to see it run")
        return feeds
    return follow_channels(adapter.model, lambda: probe.run(adapter.model))


def _rewrite(stage: Stage, name: str, made: Transform) -> Rewrite:
    if isinstance(made, Rotate):
        return rotation(stage, made)
    if isinstance(made, Absorb):
        return absorption(stage, made)
    chosen = choose_scales(stage, name, made)
    steps = [
        Step((producer, *(reader.path for reader in stage.feeds.feeds[producer].readers)), _scaling(stage, producer, s))
        for producer, s in chosen.scales.items()
    ]
    count = f"{name}: the outputs of {len(steps)} layers and normalizations scaled"
    refused = "" if made.pairs else _refused(stage.feeds)
    return Rewrite(steps, [count, *chosen.notes, *([f"{name}: not scaled: {refused}"] if refused else [])])


def _scaling(stage: Stage, producer: str, scale: Tensor) -> Callable[[], None]:
    """Divides a producer's output and multiplies the columns that read it."""

    def apply() -> None:
        divide_output_(stage.module(producer), scale)
        for reader in stage.feeds.feeds[producer].readers:
            module = stage.module(reader.path)
            factor = at_columns(scale, reader.columns)
            bias = None if module.bias is None else module.bias.detach()
            set_matrix_(module, multiply_columns(matrix(module), factor, groups_of(module)), bias)
            stage.input_scales[reader.path] = stage.input_scales.get(reader.path, 1.0) * factor

    return apply


def _apply(stage: Stage, name: str, made: Transform, done: Transformed) -> None:
    """Rewrite, prove that the function is the same, measure."""
    rewrite = _rewrite(stage, name, made)
    kept = _parameters(stage.adapter.model)
    outputs = _outputs(stage)
    layers = [path for path in dict.fromkeys(p for step in rewrite.steps for p in step.layers) if stage.row(path)]
    before = {path: _measured(stage, path) for path in layers}
    for step in rewrite.steps:
        step.apply()
    done.notes += [*rewrite.notes, *_proved(stage, name, rewrite, outputs, kept)]
    for path in layers:
        after = _measured(stage, path)
        row = stage.row(path)
        assert row is not None
        done.changes.append(LayerChange(name, row.layer.name, before[path][0], after[0], before[path][1], after[1]))


def _measured(stage: Stage, path: str) -> tuple[float, float | None]:
    """SQNR of a layer's quantized weight, and of its output on the sample where there is one, in decibel."""
    row = stage.row(path)
    assert row is not None
    weight = matrix(stage.module(path)) if layer_kind(stage.module(path)) else stage.adapter.weight(row.layer)
    seen = stage.mean_square(path)
    of_weight = sqnr_db(weight, stage.dequantized(row, weight, seen))
    if path not in stage.inputs or stage.inputs[path].positions == 0:
        return of_weight, None
    error, signal = stage.layer_error(path)
    return of_weight, math.inf if error == 0 else 10 * math.log10(max(signal, 1e-300) / error)


def _parameters(model: nn.Module) -> dict[str, dict[str, Any]]:
    return {path: dict(module._parameters) for path, module in model.named_modules()}


def _restore_(model: nn.Module, kept: dict[str, dict[str, Any]]) -> None:
    for path, module in model.named_modules():
        module._parameters.update(kept[path])
        for name in [name for name in module._parameters if name not in kept[path]]:
            module._parameters[name] = None


def _outputs(stage: Stage) -> list[Tensor]:
    if stage.probe is None:
        return []
    with torch.no_grad():
        found = tensors_in(stage.probe.run(stage.adapter.model))
        return [tensor for tensor in found if tensor.is_floating_point() and tensor.numel()]


def _proved(
    stage: Stage, name: str, rewrite: Rewrite, outputs: list[Tensor], kept: dict[str, dict[str, Any]]
) -> list[str]:
    """A note on how much the float function changed.

    Raises:
        ModelError: it is not the same function; the model is as it was, and the message names the layers.
    """
    if not rewrite.steps:
        return [f"{name}: nothing to do"]
    if stage.probe is None:
        return [f"{name}: not checked on data, because there is none"]
    if not outputs:
        return [f"{name}: the output has no tensor to check it by"]
    allowed = min(_SAME_FUNCTION_DB.get(p.dtype, 60.0) for p in stage.adapter.model.parameters())
    same = _sameness(outputs, _outputs(stage))
    if same >= allowed:
        return [f"{name}: float output unchanged to {same:.0f} dB"]
    guilty = []
    for step in rewrite.steps:
        _restore_(stage.adapter.model, kept)
        step.apply()
        if (alone := _sameness(outputs, _outputs(stage))) < allowed:
            guilty.append(f"{' -> '.join(step.layers[:4])} ({alone:.1f} dB alone)")
    _restore_(stage.adapter.model, kept)
    named = "; ".join(guilty[:5]) or "none alone, all together: " + ", ".join(s.layers[0] for s in rewrite.steps[:8])
    raise ModelError(
        f"transform {name} changed the float output (SQNR {same:.1f} dB, expected at least {allowed:.0f}): {named}; "
        "name the pairs that keep the function by pairs = [...], or leave the transform out"
    )


def _sameness(before: list[Tensor], after: list[Tensor]) -> float:
    """SQNR of the output that changed most, in decibel."""
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return -math.inf
    found = [sqnr_db(a, b) for a, b in zip(before, after, strict=True) if bool(torch.isfinite(a).all())]
    return min(found, default=math.inf)


def _refused(feeds: Feeds) -> str:
    """Why the other producers cannot be scaled, in one line."""
    reasons: Counter[str] = Counter()
    first: dict[str, str] = {}
    for feed in feeds.feeds.values():
        if not bool(feed.free.any()):
            short = feed.reason.partition(" in '")[0].partition(" '")[0]
            reasons[short] += 1
            first.setdefault(short, feed.producer)
    return "; ".join(f"{count} ({first[why]!r}, ...): {why}" for why, count in reasons.most_common(5))
