"""What goes wrong in training says where and what to do."""

from __future__ import annotations

import pytest
import torch
from tests.pipeline.models import example
from tests.qat.prepared import STATIC, prepared, recipe, train_
from torch import nn

import narrowcast as nc


def test_converting_what_was_not_prepared_says_so() -> None:
    with pytest.raises(nc.ModelError, match=r"Linear was not prepared .* call nc.qat.prepare"):
        nc.qat.convert(nn.Linear(4, 4))
    with pytest.raises(nc.ModelError, match="was not prepared"):
        nc.qat.report(nn.Sequential(nn.Linear(4, 4)))


def test_converting_before_any_training_pass_says_so() -> None:
    model, x = prepared("tied", "int4/channel", None)
    model.eval()(x)
    with pytest.raises(nc.ModelError, match="never run in training mode"):
        nc.qat.convert(model)


def test_a_layer_that_never_ran_is_reported_and_refused_when_strict() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x)

    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    model = nc.qat.prepare(Spare(), {"rule": [{"weight": "int8/channel"}]}, [x], progress=False)
    model(x)
    rows = {row.layer: row for row in nc.qat.convert(model).report.layers}
    assert "never ran in training" in rows["spare"].reason and rows["spare"].method.startswith("rtn")
    assert rows["used"].method == "trained, lsq"
    with pytest.raises(nc.ContractError, match=r"1 layers never ran in training .*'spare'"):
        nc.qat.convert(model, strict=True)


@pytest.mark.parametrize("what", ["weight", "factor", "input"])
def test_a_loss_that_was_no_number_is_found_and_the_layer_named(what: str) -> None:
    model, x = prepared("cnn", "int8/channel", STATIC)
    train_(model, x, steps=1)
    twin = model.pointwise
    broken = {"weight": twin.weight, "factor": twin.weight_range().factor, "input": twin.input_range.factor}[what]
    broken.data.flatten()[0] = float("nan")
    for use in (nc.qat.convert, lambda m: m.eval()(x)):
        with pytest.raises(nc.ModelError, match=r"layer 'pointwise'.*not finite.*lower the learning rate"):
            use(model)


def test_a_state_of_another_recipe_is_refused_with_both_recipes_named() -> None:
    model, _ = prepared("tied", "int4/channel", None)
    for other in ({"weight": "int8/channel"}, {"train": "ste"}):
        rules = {"weight": "int4/channel", "train": "lsq"} | other
        state = prepared("tied", rules["weight"], None, train=rules["train"])[0].state_dict()
        with pytest.raises(nc.RecipeError, match=r"layer 'table'.*another recipe.*int4/channel.*trained by lsq"):
            model.load_state_dict(state)


def test_preparing_what_is_quantized_or_prepared_already_says_so() -> None:
    model, x = example("tied")
    rules = recipe("tied", "int8/channel", None)
    done = nc.quantize(model, rules, x.split(16), progress=False).model
    with pytest.raises(nc.ModelError, match="quantized already"):
        nc.qat.prepare(done, rules, x.split(16), progress=False)
    made = nc.qat.prepare(model, rules, x.split(16), progress=False)
    with pytest.raises(nc.ModelError, match="prepared for training already"):
        nc.qat.prepare(made, rules, x.split(16), progress=False)


def test_layers_without_a_twin_are_refused_with_the_remedy() -> None:
    model, x = example("tied")
    rules = {
        "rule": [{"role": "tied", "keep": "tied"}, {"weight": "int8/channel", "input": "int8/token outliers:top(5%)"}]
    }
    with pytest.raises(nc.ModelError, match=r"layer 'up'.*no trainable twin.*without 'outliers'"):
        nc.qat.prepare(model, rules, x.split(16), progress=False)


def test_static_ranges_need_data() -> None:
    with pytest.raises(nc.DataError, match="calibration data"):
        nc.qat.prepare(example("cnn")[0], recipe("cnn", "int8/channel", STATIC))


def test_schedules_and_distillation_check_what_they_are_given() -> None:
    with pytest.raises(nc.RecipeError, match="batchnorm is a count"):
        nc.qat.FreezeSchedule(batchnorm=-1)
    with pytest.raises(nc.DataError, match=r"shape \(2, 3\).*\(2, 4\)"):
        nc.qat.distill_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(nc.DataError, match="temperature"):
        nc.qat.distill_loss(torch.zeros(2, 3), torch.zeros(2, 3), temperature=0.0)
    with pytest.raises(nc.DataError, match="1 hidden states of the student, 0 of the teacher"):
        nc.qat.distill_loss(torch.zeros(2, 3), torch.zeros(2, 3), hidden=([torch.zeros(1)], []))
