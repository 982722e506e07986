"""Plan: a recipe laid over a model, without data, on the meta device too, in seconds."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrowcast as nc
from narrowcast.errors import RecipeError
from narrowcast.recipe import PRESETS


class Small(nn.Module):
    """A table with a tied head, attention-free tokens, a convolution with its norm, a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 40)
        self.conv = nn.Conv1d(40, 40, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(40)
        self.memory = nn.GRU(40, 24, batch_first=True)
        self.up = nn.Linear(24, 100)
        self.down = nn.Linear(100, 40)
        self.head = nn.Linear(40, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, indices: Tensor) -> Tensor:
        x = self.norm(self.conv(self.table(indices).transpose(1, 2))).transpose(1, 2)
        return self.head(self.down(self.up(self.memory(x)[0]).relu()))


INDICES = torch.arange(400).view(40, 10) % 50


def rows(model: nn.Module, recipe: Any) -> dict[str, Any]:
    return {row.layer.name: row for row in nc.plan(model, recipe).layers}


@pytest.mark.parametrize("recipe", PRESETS)
def test_the_plan_promises_the_bytes_that_the_report_has(recipe: str) -> None:
    torch.manual_seed(0)
    model = Small().eval()
    plan = nc.plan(model, recipe)
    data = INDICES if recipe == "static-int8" else None
    report = nc.quantize(model, recipe, data, progress=False).report
    assert [row.layer.name for row in plan.layers] == [row.layer for row in report.layers]
    for planned, done in zip(plan.layers, report.layers, strict=True):
        assert (planned.bytes_after, planned.bits_per_weight) == (done.bytes_after, done.bits_per_weight), done.layer
        assert (planned.weight is None) == (done.outcome in ("kept", "folded")), done.layer
        assert done.reason == planned.reason or done.outcome == "fell back", done.layer
        if planned.integer:
            assert planned.kernel == done.kernel, done.layer
    assert plan.bytes_after == sum(row.bytes_after for row in report.layers)


@pytest.mark.parametrize("recipe", PRESETS)
def test_planned_bytes_are_the_bytes_that_are_stored(recipe: str) -> None:
    torch.manual_seed(0)
    model = Small().eval()
    plan = nc.plan(model, recipe)
    quantized = nc.quantize(model, recipe, INDICES if recipe == "static-int8" else None, progress=False).model
    for row in plan.layers:
        if row.weight is None:
            continue
        site = row.layer.sites[0]
        module = quantized.get_submodule(site.path)
        parts = {key: value for key, value in module.state_dict().items() if key.startswith(site.parameter)}
        stored = {key.removeprefix(site.parameter + "_"): t.numel() * t.element_size() for key, t in parts.items()}
        stored = {key: size for key, size in stored.items() if key in ("codes", "scale", "outer_scale", "zero_point")}
        assert sum(stored.values()) == row.bytes_after, row.layer.name


def test_planning_changes_nothing() -> None:
    model = Small().train()
    before = {name: (id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    nc.plan(model, "weight-int8")
    after = model.state_dict(keep_vars=True)
    assert all(id(after[name]) == key and torch.equal(after[name], value) for name, (key, value) in before.items())
    assert model.training and isinstance(model.up, nn.Linear)


def test_a_big_model_on_the_meta_device_is_planned_in_seconds() -> None:
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(4096, 32, 16384, batch_first=True)
        model = nn.ModuleDict({
            "table": nn.Embedding(128_000, 4096), "body": nn.TransformerEncoder(layer, 32, enable_nested_tensor=False),
            "head": nn.Linear(4096, 128_000, bias=False),
        })  # fmt: skip
    started = time.perf_counter()
    plan = nc.plan(model, "weight-int4")
    assert str(plan)
    assert time.perf_counter() - started < 10
    parameters = sum(p.numel() for p in model.parameters())
    assert parameters > 7e9
    bodies = [row for row in plan.layers if row.layer.name.endswith("linear1")]
    assert {row.bits_per_weight for row in bodies} == {4.75}  # float16 scale and 8-bit zero point per 32
    assert {row.layer.name: str(row.weight) for row in plan.layers}["head"] == "int8/channel/asym"
    assert plan.bytes_after < 0.17 * plan.bytes_before


def test_every_parameter_of_the_model_is_in_the_plan_or_a_bias() -> None:
    model = Small()
    listed = sum(row.layer.parameters for row in nc.plan(model, "weight-int8").layers)
    biases = sum(p.numel() for name, p in model.named_parameters() if "bias" in name and not name.startswith("norm"))
    assert listed + biases == sum(p.numel() for p in model.parameters())


def test_the_first_rule_that_matches_decides() -> None:
    plan = rows(Small(), {"rule": [
        {"layers": "down", "keep": "sensitive"}, {"type": "Linear", "weight": "int4/group32"}, {"weight": "int8"},
    ]})  # fmt: skip
    assert plan["down"].weight is None and plan["down"].reason == "sensitive"
    assert str(plan["up"].weight) == "int4/group32" and str(plan["conv"].weight) == "int8/channel"
    assert str(plan["table"].weight) == "int4/group32"  # it is tied to a Linear


def test_a_layer_that_no_rule_matches_is_kept_and_says_so() -> None:
    assert (
        rows(Small(), {"rule": [{"layers": "up", "weight": "int8"}]})["down"].reason
        == "no rule of the recipe matches it"
    )


def test_the_int4_presets_keep_tables_and_heads_in_int8() -> None:
    for recipe, table in {"weight-int4": "int8/channel/asym", "dynamic-int4": "int8/channel"}.items():
        plan = rows(Small(), recipe)
        assert str(plan["table"].weight) == table and str(plan["up"].weight) == "int4/group32/asym"


def test_tied_weights_are_one_row_that_names_all_its_places() -> None:
    plan = rows(Small(), "dynamic-int8")
    assert "head" not in plan
    assert plan["table"].reason == "tied: table, head" and plan["table"].kernel.startswith("linear_int8_dynamic")


def test_a_norm_that_is_folded_takes_no_bytes() -> None:
    plan = nc.plan(Small().eval(), "weight-int8")
    by_name = {row.layer.name: row for row in plan.layers}
    assert by_name["norm.weight"].reason == "folded into conv" and by_name["norm.weight"].bytes_after == 0
    assert any("BatchNorm norm is folded into conv" in note for note in plan.notes)


UNUSED = [
    ([{"layers": "uq", "weight": "int8"}, {"weight": "int8"}],
     r"rule 1 \(layers = \['uq'\]\): it matches no layer; layers are for example \['up'"),
    ([{"type": "Conv2d", "weight": "int8"}, {"weight": "int8"}],
     r"rule 1 \(type = 'Conv2d'\).*types \['Conv1d', 'Embedding', 'GRU', 'Linear'\]"),
    ([{"weight": "int8"}, {"layers": "up", "weight": "fp16"}],
     "rule 2 .*'up'.* is taken by an earlier rule; move it up"),
    ([{"weight": "int8"}, {"layers": "up", "keep": "why not"}], "rule 2 .* taken by an earlier rule"),
]  # fmt: skip


@pytest.mark.parametrize(("rules", "message"), UNUSED)
def test_a_rule_that_matches_nothing_is_an_error_with_what_there_is(rules: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        nc.plan(Small(), {"rule": rules})
    optional = [rule | {"optional": True} for rule in rules]
    assert nc.plan(Small(), {"rule": optional}).layers


IMPOSSIBLE = [
    ("up", {"weight": "int8/asym", "input": "int8/token"}, "linear layers run with 'int8/channel'"),
    ("down", {"weight": "int8/group24", "input": "int8/token"}, "linear layers run with"),
    ("up", {"weight": "nf4/group32/scale:int8", "input": "int8/token"}, "or leave input out to multiply in float"),
    ("up", {"weight": "int4/group32", "input": "uint8/tensor"}, "linear layers run with"),
    ("down", {"weight": "int4/group24", "input": "int8/token"}, "linear layers run with"),
    ("up", {"weight": "fp16", "input": "int8/token"}, "linear layers run with"),
    ("conv", {"weight": "int8", "input": "uint8/token"}, "convolutions run with weight 'int8/channel'"),
    ("memory.*", {"weight": "int8", "input": "uint8/token"}, "recurrent layers run with"),
    ("up", {"weight": "int4/group32", "input": "uint8/token"}, "linear layers run with"),
    ("conv", {"weight": "int4/group32", "input": "int8/token"}, "convolutions run with weight 'int8/channel'"),
    ("memory.*", {"weight": "int8", "input": "uint8/tensor"}, "recurrent layers run with"),
    ("memory.*", {"weight": "int4/group32", "input": "int8/token"}, "recurrent layers run with"),
]


@pytest.mark.parametrize(("layers", "rule", "remedy"), IMPOSSIBLE)
def test_what_no_kernel_does_is_an_error_with_layer_value_and_remedy(
    layers: str, rule: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(RecipeError, match=rf"layer '{layers[:2]}.*no integer kernel multiplies weights in.*{remedy}"):
        nc.plan(Small(), {"rule": [{"layers": layers, **rule}]})


def test_weights_of_one_module_are_quantized_together() -> None:
    with pytest.raises(
        RecipeError, match=r"'memory.weight_ih_l0' and 'memory.weight_hh_l0' belong to one module, 'memory'"
    ):
        nc.plan(Small(), {"rule": [{"layers": "memory.weight_ih*", "weight": "int8"}]})
    with pytest.raises(RecipeError, match="give both the same rule"):
        nc.plan(Small(), {"rule": [
            {"layers": "memory.weight_ih*", "weight": "int8", "input": "int8/token"},
            {"layers": "memory.*", "weight": "int8"},
        ]})  # fmt: skip


def test_weights_of_one_module_may_differ_in_format() -> None:
    plan = rows(Small(), {"rule": [
        {"layers": "memory.weight_ih*", "weight": "int4/group32"}, {"layers": "memory.*", "weight": "int8"},
    ]})  # fmt: skip
    assert str(plan["memory.weight_ih_l0"].weight) == "int4/group32"
    assert str(plan["memory.weight_hh_l0"].weight) == "int8/channel"


def test_a_group_that_does_not_divide_has_a_shorter_last_one() -> None:
    plan = rows(Small(), {"rule": [{"layers": "down", "weight": "int4/group32"}]})
    assert plan["down"].layer.shape == (40, 100) and plan["down"].bits_per_weight == 4 + 4 * 16 / 100


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_a_recipe_file_plans_like_its_document(suffix: str, tmp_path: Path) -> None:
    document = {"rule": [{"layers": "up", "weight": "int8"}]}
    path = tmp_path / f"r.{suffix}"
    path.write_text(json.dumps(document) if suffix == "json" else '[[rule]]\nlayers = "up"\nweight = "int8"\n')
    assert nc.plan(Small(), path).to_dict()["layers"] == nc.plan(Small(), document).to_dict()["layers"]


def test_the_plan_is_json_and_can_be_printed() -> None:
    for recipe in PRESETS:
        plan = nc.plan(Small(), recipe)
        assert json.loads(json.dumps(plan.to_dict(), allow_nan=False))["layers"][0]["layer"] == "table"
        text = str(plan)
        assert all(row.layer.name in text for row in plan.layers) and "predicted peak" in text


@pytest.mark.parametrize("model", [nn.Sequential(), nn.ReLU(), nn.LayerNorm(4)])
def test_a_model_without_weights_to_quantize_has_a_plan(model: nn.Module) -> None:
    plan = nc.plan(model, "dynamic-int8")
    assert all(row.weight is None and row.reason for row in plan.layers)
    assert str(plan)


def test_names_and_kernels_are_printed_as_they_are() -> None:
    model = nn.ModuleDict({"[red]a[/]": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    text = str(nc.plan(model, "dynamic-int8"))
    assert "[red]a[/]" in text and nc.kernels.kernel_name("linear_int8_dynamic")[:28] in text


def test_half_precision_models_count_their_bytes() -> None:
    plan = rows(Small().bfloat16(), "weight-int8")
    assert plan["up"].layer.bytes == 2 * 24 * 100
    kept = rows(Small().bfloat16(), {"rule": [{"layers": "up", "weight": "int8"}]})["down"]
    assert kept.bits_per_weight == 16 and kept.bytes_after == 2 * 4000
