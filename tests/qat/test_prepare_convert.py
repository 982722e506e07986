"""From float to trained to integer: the start is post-training quantization, the end is what evaluation said."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.pipeline.models import example
from tests.qat.prepared import CASES, CHANNELS, STATIC, answer, prepared, recipe, train_
from torch import nn

import narrowcast as nc
from narrowcast.nn.trained import TrainedModule

every_case = pytest.mark.parametrize("name,weight,given", CASES)


def twins(model: nn.Module) -> dict[str, TrainedModule]:
    return {path: module for path, module in model.named_modules() if isinstance(module, TrainedModule)}


@every_case
def test_training_starts_at_the_integers_of_post_training_quantization(
    name: str, weight: str, given: str | None
) -> None:
    model, x = example(name)
    quantized = nc.quantize(model, recipe(name, weight, given), x.split(16), progress=False)
    started, _ = prepared(name, weight, given)
    for path, twin in twins(started).items():
        installed = quantized.model.get_submodule(path)
        assert twin.records() == installed.quantized_weights(), path
        if (ranges := twin.activation()).scale is not None:
            assert torch.equal(ranges.scale, installed.input_scale), path
            assert torch.equal(ranges.zero_point, installed.input_zero_point), path
    torch.testing.assert_close(answer(started, x), answer(quantized.model, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", ["int3/group32/asym", "int4/channel", "nf4/group32"])
def test_a_small_step_undoes_none_of_the_choices_that_a_solver_made_against_the_nearest_code(weight: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    x = torch.randn(512, 64) @ torch.randn(64, 64)
    rules = [{"weight": weight, "method": "gptq"}]
    twin = twins(nc.qat.prepare(model, {"rule": rules}, [x], progress=False))["0"]
    record, start = twin.records()["weight"], twin.matrix("weight").detach()
    chosen = start != model[0].weight
    assert 0.05 < chosen.float().mean() < 0.9
    step = 0.2 * record.scale.min() * torch.randn_like(start).sign() * (0.1 if weight.startswith("nf4") else 1.0)
    for moved in (start + step, start - step):
        now = twin.weight_range().record(moved)  # type: ignore[union-attr]
        assert torch.equal(now.codes[chosen], record.codes[chosen])


@every_case
def test_it_learns_and_what_evaluation_says_is_what_conversion_gives(name: str, weight: str, given: str | None) -> None:
    model, x = prepared(name, weight, given)
    losses = train_(model, x)
    assert losses[-1] < losses[0]
    before = answer(model, x)
    converted = nc.qat.convert(model)
    assert torch.equal(answer(converted.model, x), before)
    assert torch.equal(answer(model, x), before), "converting must not change the trained model"
    assert not any(isinstance(module, TrainedModule) for module in converted.model.modules())
    assert not converted.model.training


@every_case
def test_a_state_dict_resumes_with_the_same_integers(name: str, weight: str, given: str | None) -> None:
    model, x = prepared(name, weight, given)
    train_(model, x, steps=3)
    again, _ = prepared(name, weight, given)
    assert not again.load_state_dict(model.state_dict()).missing_keys
    assert torch.equal(answer(again, x), answer(model, x))
    ours, theirs = twins(model), twins(again)
    assert all(ours[path].records() == theirs[path].records() for path in ours)


def test_a_converted_model_is_saved_and_loaded_bit_for_bit(tmp_path: Path) -> None:
    model, x = prepared("cnn", "int4/channel", STATIC)
    train_(model, x, steps=3)
    converted = nc.qat.convert(model)
    nc.save(converted, tmp_path / "saved")
    loaded = nc.load(tmp_path / "saved", into=example("cnn")[0])
    assert torch.equal(answer(loaded, x), answer(model, x))


def test_networks_of_a_converted_model_answer_as_its_modules_do() -> None:
    model, x = example("cnn")
    rules = recipe("cnn", "int8/channel", CHANNELS) | {"fuse": True}
    made = nc.qat.prepare(model, rules, x.split(16), progress=False)
    train_(made, x, steps=3)
    converted = nc.qat.convert(made)
    assert any("network" in note for note in converted.report.notes)
    torch.testing.assert_close(answer(converted.model, x), answer(made, x), rtol=0.05, atol=0.02)


def test_the_report_says_how_each_layer_was_trained() -> None:
    model, x = prepared("cnn", "int4/channel", STATIC, train="lsq+")
    train_(model, x, steps=3)
    report = nc.qat.convert(model).report
    rows = [row for row in report.layers if row.spec]
    assert {row.method for row in rows} == {"trained, lsq+"}
    assert all("4 training passes" in row.notes for row in rows)  # one of them to learn the shape of the output
    assert all(row.weight_sqnr_db is not None for row in rows)
    scale, zero = model.head.activation().scale, model.head.activation().zero_point.float()
    ends = f"[{float(-zero * scale):.4g}, {float((255 - zero) * scale):.4g}]"
    assert next(row.input for row in rows if row.layer == "head") == f"uint8/tensor {ends}"
    assert not any("training mode" in note for note in report.notes)


def test_a_gptq_start_keeps_the_solvers_codes() -> None:
    model, x = example("tied")
    rules = {"fuse": False, "rule": [{"weight": "int3/group16/asym", "method": {"gptq": {}}}]}
    quantized = nc.quantize(model, rules, x.split(16), progress=False)
    made = nc.qat.prepare(model, rules, x.split(16), progress=False)
    for path, twin in twins(made).items():
        record = quantized.model.get_submodule(path).quantized_weights()["weight"]
        assert twin.records()["weight"] == record
    codes = twins(made)["up"].records()["weight"]
    nearest = nc.quantize(
        model, {"fuse": False, "rule": [{"weight": "int3/group16/asym", "method": "rtn"}]}, x.split(16), progress=False
    )
    assert codes != nearest.model.get_submodule("up").quantized_weights()["weight"], "gptq chose other codes"


def test_tied_layers_share_one_parameter_and_one_range() -> None:
    model, x = prepared("tied", "int8/channel", "uint8/token")
    table, head = twins(model)["table"], twins(model)["head"]
    assert table.weight is head.weight and table.weight_range() is head.weight_range()
    train_(model, x, steps=3)
    assert table.records() == head.records()


def test_what_the_caller_froze_stays_frozen_and_the_callers_model_is_untouched() -> None:
    model, x = example("tied")
    model.up.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = nc.qat.prepare(model, recipe("tied", "int8/channel", "uint8/token"), x.split(16), progress=False)
    held = made.up.weight.detach().clone()
    train_(made, x, steps=2)
    assert torch.equal(made.up.weight, held) and not torch.equal(made.down.weight, model.down.weight)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_mixed_precision_by_rule_trains_each_layer_in_its_own_way() -> None:
    model, x = example("tied")
    rules = [
        {"layers": "up", "weight": "int2/channel", "train": "ste"},
        {"layers": "down", "keep": "it decides"},
        {"weight": "int8/channel", "input": "uint8/token"},
    ]
    made = nc.qat.prepare(model, {"rule": rules}, x.split(16), progress=False)
    train_(made, x, steps=2)
    report = nc.qat.convert(made).report
    methods = {row.layer: row.method for row in report.layers}
    assert methods["up"] == "trained, ste" and methods["table"] == "trained, lsq" and methods["down"] == ""


def test_models_that_are_one_layer_are_prepared_too() -> None:
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    made = nc.qat.prepare(nn.Linear(16, 4), {"rule": [{"weight": "int4/channel"}]}, [x], progress=False)
    train_(made, x, steps=2)
    assert torch.equal(answer(nc.qat.convert(made).model, x), answer(made, x))


def test_twins_that_share_tensors_say_which_so_that_checkpoints_can_leave_them_out() -> None:
    model, _ = prepared("tied", "int8/channel", "uint8/token")
    state = {name: t for name, t in model.state_dict(keep_vars=True).items() if ".ranges." in name}
    declared = {
        f"{path}.{name}" for path, twin in twins(model).items() for name in getattr(twin, "_tied_weights_keys", ())
    }
    left = [t for name, t in state.items() if name not in declared]
    assert len(left) == len({id(t) for t in left}) < len(state)
    assert not [name for name in declared if name.startswith("table.")], "the first one keeps its own"
