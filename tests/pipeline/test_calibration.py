"""Calibration: every form of data, layers that never ran, ranges that are the data's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.pipeline.models import example
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import narrowcast as nc
from narrowcast.core import sqnr_db
from narrowcast.errors import ContractError, DataError
from narrowcast.nn import QuantizedModule


class Twice(nn.Module):
    """Two named inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 8), nn.Linear(5, 8)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return self.left(first).relu() + self.right(second).relu()


def state(result: nc.Quantized) -> dict[str, Tensor]:
    return result.model.state_dict()


def assert_same(got: nc.Quantized, expected: nc.Quantized) -> None:
    assert state(got).keys() == state(expected).keys()
    for key, value in state(expected).items():
        torch.testing.assert_close(state(got)[key], value, rtol=1e-5, atol=1e-6)


def test_images_come_in_any_container() -> None:
    model, x = example("cnn")
    batches = list(x.split(16))
    expected = nc.quantize(model, "static-int8", batches, progress=False)
    forms: dict[str, Any] = {
        "tensor": x,
        "array": x.numpy(),
        "loader": DataLoader(TensorDataset(x), batch_size=16),
        "loader with targets": DataLoader(TensorDataset(x, torch.zeros(48)), batch_size=16),
        "tuples": [(part,) for part in batches],
        "pairs with targets": [(part, torch.zeros(16)) for part in batches],
        "dictionaries": [{"x": part} for part in batches],
        "dictionaries with labels": [{"x": part, "labels": torch.zeros(16)} for part in batches],
        "generator": (part for part in batches),
    }
    for name, data in forms.items():
        result = nc.quantize(model, "static-int8", data, progress=False)
        assert_same(result, expected)
        assert result.report.totals.integer_macs == 1.0, name


def test_a_callable_runs_the_model_itself() -> None:
    model, x = example("cnn")
    calls = []

    def run(candidate: nn.Module) -> Any:
        calls.append(candidate)
        answers = [candidate(part) for part in x.split(16)]
        return answers[0]

    result = nc.quantize(model, "static-int8", run, progress=False)
    assert_same(result, nc.quantize(model, "static-int8", list(x.split(16)), progress=False))
    assert len(calls) > 1 and any("callable" in note for note in result.report.notes)


def test_several_inputs_come_by_position_or_by_name() -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    first, second = torch.randn(40, 6), torch.randn(40, 5)
    expected = nc.quantize(model, "static-int8", [(first, second)], progress=False)
    for data in ([{"first": first, "second": second}], (first, second), [(first, second, torch.zeros(40))]):
        assert_same(nc.quantize(model, "static-int8", data, progress=False), expected)


def test_a_generator_is_read_once_and_whole() -> None:
    model, x = example("tied")
    taken = []

    def batches() -> Any:
        for part in x.split(8):
            taken.append(part)
            yield part

    nc.quantize(model, "static-int8", batches(), progress=False)
    assert len(taken) == 6


def test_what_was_taken_as_the_target_is_noted() -> None:
    model, x = example("cnn")
    report = nc.quantize(model, "static-int8", [(x, torch.zeros(48))], progress=False).report
    assert any("target" in note for note in report.notes)


def test_minmax_ranges_are_those_of_the_data() -> None:
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    x = torch.randn(50, 6)
    recipe = {"rule": [{"weight": "int8", "input": "uint8/tensor static:minmax"}]}
    result = nc.quantize(model, recipe, list(x.split(7)), progress=False)
    module = result.model[0]
    assert module.input_scale.item() == pytest.approx(float(x.max() - x.min()) / 255, rel=1e-5)
    assert result.report.layers[0].input == f"uint8/tensor [{float(x.min()):.4g}, {float(x.max()):.4g}]"
    per_channel = nc.quantize(model, "static-int8", x, progress=False).model[0]
    assert per_channel.input_scale.shape == (6,)


@pytest.mark.parametrize("observer", ["minmax", "moving_average(0.5)", "percentile(99.9)", "entropy", "mse", "best"])
def test_every_observer_fixes_ranges_of_a_whole_model(observer: str) -> None:
    model, x = example("cnn")
    recipe = {"rule": [{"weight": "int8", "input": f"uint8/tensor static:{observer}"}]}
    result = nc.quantize(model, recipe, list(x.split(16)), progress=False)
    with torch.no_grad():
        assert sqnr_db(model(x), result.model(x)) > 18
    assert all("uint8/tensor [" in row.input for row in result.report.layers if row.outcome == "quantized")


class Branch(nn.Module):
    """One of its layers never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_a_layer_that_never_ran_falls_back_to_a_range_at_run_time_and_says_so() -> None:
    model = Branch().eval()
    result = nc.quantize(model, "static-int8", torch.randn(40, 6), progress=False)
    rows = {row.layer: row for row in result.report.layers}
    assert rows["used"].outcome == "quantized" and rows["unused"].outcome == "fell back"
    assert "never ran in calibration" in rows["unused"].reason and rows["unused"].input == "int8/token"
    assert rows["unused"].kernel.startswith("linear_int8_dynamic") and rows["unused"].macs == 0
    result.model.unused(torch.randn(2, 6))
    with pytest.raises(ContractError, match="unused: fell back: it never ran"):
        nc.quantize(model, "static-int8", torch.randn(40, 6), strict=True, progress=False)


def test_a_layer_that_never_ran_without_static_ranges_is_quantized_and_says_so() -> None:
    result = nc.quantize(Branch().eval(), "dynamic-int8", torch.randn(40, 6), progress=False)
    row = next(row for row in result.report.layers if row.layer == "unused")
    assert row.outcome == "quantized" and row.reason == "it never ran in calibration" and row.output_sqnr_db is None


def test_a_tied_weight_with_ranges_per_channel_gets_one_range_and_says_so() -> None:
    model, x = example("tied")
    recipe = {"rule": [{"weight": "int8/channel", "input": "uint8/channel static:minmax"}]}
    row = next(r for r in nc.quantize(model, recipe, x, progress=False).report.layers if r.layer == "table")
    assert (
        row.outcome == "fell back"
        and "one range for all channels" in row.reason
        and row.input.startswith("uint8/tensor [")
    )


def test_the_static_preset_asks_for_one_range_of_a_tied_weight_and_so_is_strict() -> None:
    model, x = example("tied")
    result = nc.quantize(model, "static-int8", x, strict=True, progress=False)
    row = next(row for row in result.report.layers if row.layer == "table")
    assert row.outcome == "quantized" and row.input.startswith("uint8/tensor [")


def test_a_shared_module_sees_all_its_inputs() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x) * 10)

    torch.manual_seed(0)
    model = Shared().eval()
    x = torch.randn(40, 4)
    seen = []
    handle = model.layer.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    model(x)
    handle.remove()
    recipe = {"rule": [{"weight": "int8", "input": "uint8/tensor static:minmax"}]}
    result = nc.quantize(model, recipe, x, progress=False)
    both = torch.cat(seen)
    assert result.model.layer.input_scale.item() == pytest.approx(float(both.max() - both.min()) / 255, rel=1e-5)
    assert result.report.layers[0].macs == 2 * 40 * 16


def test_a_model_that_calls_view_on_images_gets_contiguous_ones_and_is_told() -> None:
    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.head(y.view(y.shape[0], -1))

    torch.manual_seed(0)
    model = Viewing().eval()
    x = torch.randn(40, 3, 8, 8)
    result = nc.quantize(model, "static-int8", x, progress=False)
    with torch.no_grad():
        assert sqnr_db(model(x), result.model(x)) > 30
        assert sqnr_db(model(x), nc.quantize(model, "dynamic-int8", progress=False).model(x)) > 30
    assert any(".view" in note for note in result.report.notes)


def test_the_pass_over_the_data_leaves_no_hook_in_the_result() -> None:
    model, x = example("cnn")
    result = nc.quantize(model, "static-int8", x, progress=False)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in result.model.modules())
    assert any(isinstance(m, QuantizedModule) for m in result.model.modules())


def test_an_error_in_the_data_leaves_the_callers_model_as_it_was() -> None:
    model, x = example("cnn")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    broken = [x[:4], torch.full((4, 3, 12, 12), float("nan"))]
    with pytest.raises(DataError):
        nc.quantize(model, "static-int8", broken, progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
