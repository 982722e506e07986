"""Plan: a recipe laid over a model. Says what will happen to every weight, and why, without data and in seconds."""

from __future__ import annotations

import difflib
import importlib
import io
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from narrowcast.core import QuantSpec
from narrowcast.errors import RecipeError
from narrowcast.kernels.reference import LONGEST_SUM
from narrowcast.models import FoldReport, Layer, ModelAdapter, TorchModel, find_pairs, is_onnx, require_onnx
from narrowcast.models.rewrite import untie_
from narrowcast.nn import (
    DEFAULT_TRAINING,
    INTEGER_MODES,
    activation_mode,
    outlier_bits,
)
from narrowcast.recipe import InputRule, Recipe, Rule, default_method, load_recipe
from narrowcast.report import format_bytes
from narrowcast.transforms import make_transform


@dataclass(frozen=True)
class LayerPlan:
    """What will happen to one weight.

    Args:
        layer: the weight.
        weight: format it gets; None when it is kept.
        input: treatment of its input; None leaves it float.
        method: weight solver and options.
        chosen: whether the recipe left the solver to `default_method`.
        reason: why it is kept, or what is worth knowing.
        bits_per_weight: stored bits, scales counted.
        bytes_after: bytes of the weight.
        kernel: what will multiply.
        integer: whether that is an integer kernel.
        refused: whether a rule wants it quantized and it cannot be.
        fallback: why it is quantized otherwise than the rule says; "" where it is not.
        train: how its ranges are trained in quantization-aware training.
    """

    layer: Layer
    weight: QuantSpec | None = None
    input: InputRule | None = None
    method: Mapping[str, Any] = field(default_factory=dict)
    chosen: bool = False
    reason: str = ""
    bits_per_weight: float = 32.0
    bytes_after: int = 0
    kernel: str = ""
    integer: bool = False
    refused: bool = False
    fallback: str = ""
    train: str = DEFAULT_TRAINING

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "layer": self.layer.name, "type": self.layer.type, "shape": list(self.layer.shape),
            "outcome": "keep" if self.weight is None else "quantize",
            "reason": "; ".join(part for part in (self.reason, self.fallback) if part),
            "weight": "" if self.weight is None else str(self.weight),
            "input": "float" if self.input is None else str(self.input), "method": dict(self.method),
            "bits_per_weight": self.bits_per_weight, "bytes_before": self.layer.bytes, "bytes_after": self.bytes_after,
            "kernel": self.kernel,
        }  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What a recipe will do to a model.

    Args:
        model: class name of the model.
        recipe: the recipe.
        layers: one entry per weight, in the model's order.
        bytes_before, bytes_after: bytes of all weights listed.
        peak_bytes: predicted peak of the tensors held while quantizing, the float model included, data excluded.
        notes: decisions that concern no single layer.
    """

    model: str
    recipe: Recipe
    layers: list[LayerPlan]
    bytes_before: int
    bytes_after: int
    peak_bytes: int
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "model": self.model, "recipe": self.recipe.to_dict(), "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after, "predicted_peak_bytes": self.peak_bytes, "notes": list(self.notes),
            "layers": [layer.to_dict() for layer in self.layers],
        }  # fmt: skip

    def __str__(self) -> str:
        table = Table(
            title=Text(f"plan for {self.model}, recipe {self.recipe.name or 'unnamed'}"), title_justify="left"
        )
        table.add_column("layer", overflow="fold")
        for name in ("shape", "weight", "input"):
            table.add_column(name)
        for name in ("bits", "before", "after"):
            table.add_column(name, justify="right")
        table.add_column("kernel or reason", overflow="fold")
        for row in self.layers:
            shape = "x".join(map(str, row.layer.shape))
            weight = "keep" if row.weight is None else str(row.weight)
            given = "" if row.weight is None else ("float" if row.input is None else str(row.input))
            why = "; ".join(part for part in (row.reason, row.fallback, row.kernel) if part)
            sizes = format_bytes(row.layer.bytes), format_bytes(row.bytes_after)
            cells = (row.layer.name, shape, weight, given, f"{row.bits_per_weight:.2f}", *sizes, why)
            table.add_row(*map(Text, cells))
        buffer = io.StringIO()
        console = Console(file=buffer, width=160, force_terminal=False)
        console.print(table)
        share = self.bytes_after / self.bytes_before if self.bytes_before else 1.0
        sizes = format_bytes(self.bytes_before), format_bytes(self.bytes_after)
        console.print(f"weights: {sizes[0]} -> {sizes[1]} ({share:.1%})", highlight=False)
        console.print(f"predicted peak while quantizing: {format_bytes(self.peak_bytes)} and the data", highlight=False)
        for note in self.notes:
            console.print(f"note: {note}", highlight=False, markup=False)
        return buffer.getvalue().rstrip()


def plan(model: Any, recipe: str | Path | Mapping[str, Any] | Recipe) -> Plan:
    """What `quantize` would do with this model and recipe; needs no data and changes nothing.

    Args:
        model: any module, on the meta device too, or an ONNX model as `quantize` takes it.
        recipe: a preset name, a Recipe, a document, or a TOML or JSON file.

    Raises:
        RecipeError: the recipe cannot be read, a rule matches nothing, or asks for what no kernel does.
    """
    loaded = load_recipe(recipe)
    if is_onnx(model):
        require_onnx()
        made: Plan = importlib.import_module("narrowcast.pipeline.onnx_run").plan_onnx(model, loaded)
        return made
    adapter = TorchModel(model)
    untie_for(adapter, loaded)
    folds = find_pairs(adapter.model, None) if loaded.fold_batchnorm else FoldReport()
    return make_plan(adapter, loaded, folds)


def untie_for(adapter: TorchModel, recipe: Recipe) -> None:
    """Untie heads where a transform of the recipe asks for it; before the adapter lists its layers."""
    wanted = any(getattr(make_transform(values), "untie", False) for values in recipe.transforms)
    for path in untie_(adapter.model) if wanted else []:
        adapter.notes.append(f"{path} was tied to an embedding; it has a matrix of its own now, as rotate asks")


def make_plan(adapter: ModelAdapter, recipe: Recipe, folds: FoldReport, *, has_data: bool | None = None) -> Plan:
    """The plan for an adapter whose BatchNorms are (or will be) folded as `folds` says.

    Args:
        adapter: the model.
        recipe: the recipe.
        folds: pairs of convolution and BatchNorm.
        has_data: whether there is calibration data; None where that is not known yet, and the plan is for some.
    """
    used: set[int] = set()
    rows = [_plan_layer(adapter, layer, recipe, used, folds) for layer in adapter.layers()]
    rows = [_with_method(adapter, row, has_data is not False) for row in rows]
    _refuse_unused(recipe, used, [row.layer for row in rows])
    _refuse_torn_modules(rows)
    before = sum(row.layer.bytes for row in rows)
    after = sum(row.bytes_after for row in rows)
    largest = max((row.layer.parameters for row in rows if row.weight is not None), default=0)
    notes = [*adapter.notes, *(f"BatchNorm {norm} is folded into {conv}" for norm, conv in folds.folded.items())]
    notes += [f"BatchNorm {norm} stays: {why}" for norm, why in folds.kept.items()]
    notes += _solver_notes(rows) if has_data is None else []
    if recipe.transforms:
        names = ", ".join(name for entry in recipe.transforms for name in entry)
        notes.append(f"before quantizing: {names}; the float function stays the same")
    # solving holds a float32 copy of one weight, its codes, and about three more of that size while it searches
    return Plan(adapter.name, recipe, rows, before, after, before + after + 20 * largest, notes)


def _with_method(adapter: ModelAdapter, row: LayerPlan, has_data: bool) -> LayerPlan:
    """The row with a solver, where its rule names none."""
    if row.weight is None or row.method:
        return row
    multiplied = any(adapter.takes_activation(site) for site in row.layer.sites)
    method = default_method(row.layer, row.weight, multiplied=multiplied, has_data=has_data)
    return replace(row, method=method, chosen=True)


def _solver_notes(rows: list[LayerPlan]) -> list[str]:
    """What a plan without data cannot know: that some weights are rounded to nearest where there will be none."""
    counted = Counter(next(iter(row.method)) for row in rows if row.chosen and "rtn" not in row.method)
    return [
        f"{count} weights are solved by {name}, which needs calibration data; without it they are rounded to nearest"
        for name, count in counted.items()
    ]


def _plan_layer(adapter: ModelAdapter, layer: Layer, recipe: Recipe, used: set[int], folds: FoldReport) -> LayerPlan:
    bits = 8.0 * layer.bytes / layer.parameters if layer.parameters else 32.0
    owner = layer.sites[0].path
    if owner in folds.folded:
        return LayerPlan(layer, reason=f"folded into {folds.folded[owner]}", bits_per_weight=0.0)
    kept = LayerPlan(layer, reason=layer.reason, bits_per_weight=bits, bytes_after=layer.bytes)
    if layer.type == "Parameter" and len(layer.shape) < 2:
        return kept
    index, rule = next(((i, r) for i, r in enumerate(recipe.rules) if r.matches(layer)), (-1, None))
    if rule is None:
        return replace(kept, reason=layer.reason or "no rule of the recipe matches it")
    if rule.weight is None or layer.type != "Parameter":
        used.add(index)
    if rule.weight is None:
        return replace(kept, reason=rule.keep)
    if layer.reason:
        return replace(kept, refused=True)
    asked = None if rule.input is None else rule.input.spec
    assert rule.weight is not None
    possible = adapter.possible(layer, rule.weight, asked)
    if possible.weight is None:
        return replace(kept, reason=possible.reason, refused=True)
    given = None if rule.input is None or possible.input is None else replace(rule.input, spec=possible.input)
    if given is not None and activation_mode(given.spec) != "static":
        given = replace(given, observer="")
    row = _plan_quantized(adapter, layer, replace(rule, weight=possible.weight, input=given))
    reason = "; ".join(part for part in (row.reason, possible.reason) if part)
    return replace(row, reason=reason, fallback=row.fallback or possible.fallback)


def _plan_quantized(adapter: ModelAdapter, layer: Layer, rule: Rule) -> LayerPlan:
    spec = rule.weight
    assert spec is not None
    shape = (layer.shape[0], layer.shape[1])
    bits = spec.bits_per_value(shape)
    mode = activation_mode(None if rule.input is None else rule.input.spec)
    given, reason, kernel, integer = rule.input, "", adapter.float_kernel(layer, spec), False
    fallback = ""
    consumers = [site for site in layer.sites if adapter.takes_activation(site)]
    if not consumers:
        given, kernel = None, "row lookup"
    elif mode in INTEGER_MODES and shape[1] > LONGEST_SUM:
        given, fallback = None, _overflowing(shape[1], rule)
    elif mode in INTEGER_MODES:
        ops = {adapter.integer_op(site, spec, mode) for site in consumers}
        if None in ops:
            raise RecipeError(_no_kernel(layer, spec, rule))
        kernel, integer = ", ".join(sorted(adapter.kernel_name(str(op)) for op in ops)), True
    elif mode == "cast":
        kernel = f"product in {rule.input}"
    if given is not None and given.outliers:
        count = _outlier_count(layer, rule)
        bits += outlier_bits(shape[0], count) / layer.parameters
        kernel += f", and {count} of {shape[1]} inputs in torch mm"
    if len(layer.sites) > 1:
        reason = "tied: " + ", ".join(site.path for site in layer.sites)
    bytes_after = round(bits * layer.parameters / 8)
    return LayerPlan(
        layer, spec, given, rule.method, reason=reason, bits_per_weight=bits, bytes_after=bytes_after, kernel=kernel,
        integer=integer, fallback=fallback, train=rule.train,
    )  # fmt: skip


def _overflowing(products: int, rule: Rule) -> str:
    return (
        f"a sum of {products} products can overflow 32 bits (up to {LONGEST_SUM} cannot), so its inputs are float and "
        f"not {str(rule.input)!r}"
    )


def _outlier_count(layer: Layer, rule: Rule) -> int:
    """Input channels of a layer that stay float.

    Raises:
        RecipeError: it is not one linear layer of its own.
    """
    assert rule.input is not None
    if layer.type not in ("Linear", "Conv1D") or len(layer.sites) > 1:
        what = "a tied weight" if len(layer.sites) > 1 else f"a {layer.type}"
        raise RecipeError(
            f"layer {layer.name!r} is {what}, and {str(rule.input)!r} keeps outlier channels of linear layers with a "
            "weight of their own only; give it a rule without outliers"
        )
    return rule.input.outlier_count(layer.shape[1])


def _no_kernel(layer: Layer, spec: QuantSpec, rule: Rule) -> str:
    if layer.type in ("LSTM", "GRU"):
        remedy = "recurrent layers run with weight 'int8/channel' and input 'int8/token'"
    elif layer.type.startswith("Conv") and layer.type != "Conv1D":
        remedy = "convolutions run with weight 'int8/channel' and input 'int8/token' or 'uint8/tensor static:...'"
    else:
        remedy = (
            "linear layers run with 'int8/channel' and any of these inputs, or with 'int8/token' and int2..int6, nf4, "
            "fp4_e2m1 or symmetric int8 per channel or in groups of a multiple of 16, with scales in fp16, fp32 or, "
            "without 'asym', k6"
        )
    return (
        f"layer {layer.name!r} ({layer.type}): no integer kernel multiplies weights in {str(spec)!r} with inputs in "
        f"{str(rule.input)!r}; {remedy}; or leave input out to multiply in float"
    )


def _refuse_unused(recipe: Recipe, used: set[int], layers: list[Layer]) -> None:
    names = [layer.name for layer in layers if layer.type != "Parameter"]
    types = sorted({kind for layer in layers for kind in layer.types} - {"Parameter"})
    for index, rule in enumerate(recipe.rules):
        if index in used or rule.optional:
            continue
        earlier = [layer for layer in layers if layer.type != "Parameter" and rule.matches(layer)]
        if earlier:
            why = f"every layer that it matches ({earlier[0].name!r}, ...) is taken by an earlier rule; move it up"
        else:
            close = difflib.get_close_matches(" ".join(rule.layers), names, n=3, cutoff=0.3) or names[:3]
            why = f"it matches no layer; layers are for example {close}, types {types}"
        raise RecipeError(f"recipe {recipe.name!r}, rule {index + 1} ({rule}): {why}; or mark it optional = true")


def _refuse_torn_modules(rows: list[LayerPlan]) -> None:
    """A module is replaced whole: its weights are quantized together and share the treatment of the input."""
    modules: dict[str, LayerPlan] = {}
    for row in rows:
        for site in row.layer.sites:
            if row.layer.type == "Parameter":
                continue
            first = modules.setdefault(site.path, row)
            if (first.weight is None) != (row.weight is None) or first.input != row.input:
                raise RecipeError(
                    f"layers {first.layer.name!r} and {row.layer.name!r} belong to one module, {site.path!r}, and are "
                    "replaced together; give both the same rule, by type or by a pattern that covers both"
                )
