"""What a caller can get wrong, and what a model or its data can bring: a clear error or a reported decision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrowcast as nc
from narrowcast.errors import ContractError, DataError, ModelError, NarrowcastError, RecipeError
from narrowcast.recipe import PRESETS

INTEGER = ("weight-int8", "weight-int4", "dynamic-int8", "dynamic-int4", "static-int8")


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 6)
    ).eval()


IMAGES = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def quantize(model: nn.Module, recipe: Any, data: Any = None, **options: Any) -> nc.Quantized:
    return nc.quantize(model, recipe, data, progress=False, **options)


@pytest.mark.parametrize("recipe", PRESETS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_layer_and_position(value: float, recipe: str) -> None:
    model = small()
    with torch.no_grad():
        model[4].weight[3, 7] = value
    with pytest.raises(
        ModelError, match=rf"layer '4': weight \[3, 7\] is {value}, and 1 of 192 weights are not finite"
    ):
        quantize(model, recipe, IMAGES)


def test_every_kind_of_layer_is_checked() -> None:
    for module in (nn.Conv1d(2, 2, 2), nn.ConvTranspose2d(2, 2, 2), nn.Embedding(3, 2), nn.LSTM(2, 2), nn.GRU(2, 2),
                   nn.MultiheadAttention(4, 2)):  # fmt: skip
        model = nn.Sequential(module)
        with torch.no_grad():
            next(module.parameters()).fill_(float("nan"))
        with pytest.raises(ModelError, match=r"layer '0.*is nan"):
            quantize(model, "weight-int8")


def test_a_layer_that_is_kept_may_hold_anything() -> None:
    model = small()
    with torch.no_grad():
        model[4].weight[3, 7] = float("nan")
    recipe = {"rule": [{"layers": "4", "keep": "known to be broken"}, {"weight": "int8"}]}
    assert quantize(model, recipe).report.layers[1].outcome == "kept"


@pytest.mark.parametrize("data", [[], (), iter([]), torch.zeros(0, 3, 8, 8), (x for x in ())])
@pytest.mark.parametrize("recipe", ["static-int8", "weight-int8"])
def test_empty_data_is_refused(data: Any, recipe: str) -> None:
    with pytest.raises(DataError, match=r"empty|no batch|holds no"):
        quantize(small(), recipe, data)


@pytest.mark.parametrize("data", [
    [torch.randn(4, 4, 8, 8)], [torch.randn(4, 32)], torch.randn(7), [torch.zeros(4, 3, 8, 8, dtype=torch.int64)],
    [{"pixels": IMAGES}], ["a text"], [None], 7, "images", [[]], [()], [{}], [IMAGES[:0]],
])  # fmt: skip
@pytest.mark.parametrize("recipe", ["static-int8", "dynamic-int8"])
def test_data_that_does_not_fit_the_model_is_refused(data: Any, recipe: str) -> None:
    with pytest.raises(DataError):
        quantize(small(), recipe, data)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("batch", [0, 1])
def test_data_that_is_not_finite_is_refused_by_batch_and_position(value: float, batch: int) -> None:
    data = [IMAGES[:4].clone(), IMAGES[4:8].clone()]
    data[batch][2, 1, 5, 3] = value
    with pytest.raises(DataError, match=rf"batch {batch}.* holds {value} at position \[2, 1, 5, 3\]"):
        quantize(small(), "static-int8", data)


def test_a_layer_whose_input_becomes_infinite_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    with torch.no_grad():
        model[0].weight.fill_(3e38)
    with pytest.raises(DataError, match="layer '1', batch 0"):
        quantize(model, {"rule": [{"layers": "1", "weight": "int8", "input": "uint8/tensor"}]}, torch.ones(4, 4))


def test_static_ranges_without_data_are_refused_with_a_remedy() -> None:
    with pytest.raises(DataError, match=r"fixes the input ranges of 2 layers \('0', ...\).*use 'dynamic-int8'"):
        quantize(small(), "static-int8")


@pytest.mark.parametrize("recipe", PRESETS)
def test_a_model_without_values_is_refused(recipe: str) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ModelError, match=r"layer '0' is on the meta device .* load the weights first"):
        quantize(model, recipe, torch.ones(2, 4))
    assert nc.plan(model, recipe).layers


@pytest.mark.parametrize("inplace", [False, True])
def test_quantizing_twice_is_refused(inplace: bool) -> None:
    model = quantize(small(), "weight-int8").model
    with pytest.raises(ModelError, match="quantized already; start from the float model"):
        quantize(model, "dynamic-int8", inplace=inplace)
    with pytest.raises(ModelError, match="quantized already"):
        nc.plan(model, "dynamic-int8")


@pytest.mark.parametrize("model", [None, "resnet.pt", 3, {}, nn.Linear])
def test_what_is_no_model_is_refused(model: Any) -> None:
    for call in (lambda: quantize(model, "weight-int8"), lambda: nc.plan(model, "weight-int8")):
        with pytest.raises(ModelError, match=r"expected a torch.nn.Module"):
            call()


@pytest.mark.parametrize("recipe", ["int8", "", None, 4, "recipe.toml", {"rule": []}, {"weight": "int8"}])
def test_what_is_no_recipe_is_refused(recipe: Any) -> None:
    with pytest.raises(RecipeError):
        quantize(small(), recipe)


@pytest.mark.parametrize("recipe", INTEGER)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (1, 33), (3, 2)])
def test_tiny_layers_are_quantized_like_all_others(shape: tuple[int, int], recipe: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(shape[1], shape[0])).eval()
    x = torch.randn(40, shape[1])
    result = quantize(model, recipe, x)
    assert result.report.layers[0].outcome == "quantized"
    with torch.no_grad():
        expected, got = model(x), result.model(x)
    assert float((got - expected).abs().max()) < 0.2 * float(expected.abs().max())


@pytest.mark.parametrize("recipe", INTEGER)
def test_layers_of_one_element_convolve_look_up_and_remember(recipe: str) -> None:
    for model, x in (
        (nn.Conv2d(1, 1, 1), torch.randn(40, 1, 3, 3)), (nn.Conv1d(1, 1, 1), torch.randn(40, 1, 3)),
        (nn.ConvTranspose2d(1, 1, 1), torch.randn(40, 1, 3, 3)),
        (nn.Embedding(1, 1), torch.zeros(40, 2, dtype=torch.int64)),
        (nn.LSTM(1, 1), torch.randn(40, 2, 1)), (nn.GRU(1, 1), torch.randn(40, 2, 1)),
    ):  # fmt: skip
        result = quantize(nn.Sequential(model).eval(), recipe, x)
        answer = result.model(x)
        assert bool(torch.isfinite(answer[0] if isinstance(answer, tuple) else answer).all())


@pytest.mark.parametrize("recipe", PRESETS)
def test_a_weight_without_elements_is_kept_and_said_to_be(recipe: str) -> None:
    model = nn.Sequential(nn.Embedding(0, 4), nn.Linear(4, 4)).eval()
    rows = {row.layer.name: row for row in nc.plan(model, recipe).layers}
    assert rows["0"].reason == "the weight is empty: 0x4" and rows["0"].weight is None


@pytest.mark.parametrize("recipe", INTEGER)
def test_channels_and_models_that_are_all_zero_stay_zero(recipe: str) -> None:
    model = small()
    with torch.no_grad():
        model[4].weight[2] = 0
        model[4].bias.zero_()
        model[0].weight[5] = 0
    result = quantize(model, {**PRESETS[recipe].to_dict(), "correct_bias": False}, IMAGES)
    assert bool((result.model(IMAGES)[:, 2] == 0).all())
    for parameter in model.parameters():
        parameter.detach().zero_()
    nothing = quantize(model, recipe, IMAGES)
    assert bool((nothing.model(IMAGES) == 0).all())
    assert str(nothing.report)


@pytest.mark.parametrize("recipe", INTEGER)
def test_data_that_is_all_zero_is_data(recipe: str) -> None:
    result = quantize(small(), recipe, torch.zeros(40, 3, 8, 8))
    with torch.no_grad():
        assert bool(torch.isfinite(result.model(IMAGES)).all())


@pytest.mark.parametrize("width", [1, 31, 33, 100, 172])
@pytest.mark.parametrize("recipe", ["weight-int4", "dynamic-int4"])
def test_a_group_that_does_not_divide_the_width_has_a_short_end(recipe: str, width: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 16)).eval()
    x = torch.randn(40, width)
    result = quantize(model, recipe, x)
    groups = -(-width // 32)
    row = result.report.layers[0]
    assert row.outcome == "quantized" and row.spec == "int4/group32/asym"
    assert row.bytes_after == 16 * (-(-width * 4 // 8) + groups * 3)
    with torch.no_grad():
        assert (
            nc.Report
            and float((result.model(x) - model(x)).square().mean()) < 0.05 * float(model(x).square().mean()) + 1e-3
        )


@pytest.mark.parametrize("scale", [1e-30, 1e-8, 1e8, 1e30])
@pytest.mark.parametrize("recipe", ["weight-int8", "dynamic-int8", "static-int8"])
def test_weights_of_any_size_keep_their_relative_error(recipe: str, scale: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16, bias=False)).eval()
    x = torch.randn(64, 32)
    with torch.no_grad():
        model[0].weight.mul_(scale)
        expected, got = model(x) / scale, quantize(model, recipe, x).model(x) / scale
    assert float((got - expected).square().mean()) < 1e-3 * float(expected.square().mean())


def test_weights_too_large_for_half_precision_scales_are_an_error_or_exact_enough() -> None:
    model = nn.Sequential(nn.Linear(32, 16, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1e30)
    with pytest.raises(NarrowcastError, match="layer '0'"):
        quantize(model, "weight-int4")


def test_weights_beyond_half_precision_are_an_error_not_an_infinity() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.fill_(1e6)
    with pytest.raises(NarrowcastError, match="layer '0'"):
        quantize(model, "fp16")


def test_an_integer_weight_is_kept_and_said_to_be() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int32), requires_grad=False)
    row = quantize(model, "weight-int8").report.layers[0]
    assert row.outcome == "kept" and row.reason == "the weight is not floating point"


class Failing(nn.Module):
    """Raises in its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        raise ValueError("only for tests")


def test_an_error_inside_the_model_names_the_batch() -> None:
    with pytest.raises(DataError, match=r"batch 0 does not run through Failing: ValueError: only for tests"):
        quantize(Failing(), "static-int8", torch.ones(2, 4))


@pytest.mark.parametrize("inplace", [False, True])
def test_what_is_refused_before_work_leaves_the_model_as_it_was(inplace: bool) -> None:
    model = small()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    types = [type(module) for module in model.modules()]
    for recipe, data in (
        ("static-int8", None),
        ("static-int8", []),
        ({"rule": [{"layers": "x", "weight": "int8"}]}, None),
    ):
        with pytest.raises(NarrowcastError):
            quantize(model, recipe, data, inplace=inplace)
    assert [type(module) for module in model.modules()] == types
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_contract_that_is_not_met_returns_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Bilinear(4, 4, 4))
    with pytest.raises(ContractError, match=r"coverage 20.0% is below the required 90.0%"):
        quantize(model, "weight-int8", min_coverage=0.9)
