"""Learned levels and super-blocks from the recipe to the file and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline.models import example
from torch import Tensor, nn

import narrowcast as nc
from narrowcast.errors import CheckpointError, RecipeError
from narrowcast.export.checkpoint_schema import seal

SPECS = (
    "codebook4/channel", "codebook2/group64", "codebook3/tensor", "int4/group32/asym/scale:k6", "int3/group16/scale:k6",
)  # fmt: skip


class Mixed(nn.Module):
    """A table, linear layers of ragged width, a convolution and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(50, 40)
        self.up, self.down = nn.Linear(40, 172), nn.Linear(172, 40)
        self.conv = nn.Conv1d(40, 24, 3)
        self.memory = nn.LSTM(24, 16, batch_first=True)

    def forward(self, indices: Tensor) -> Tensor:
        x = self.down(torch.relu(self.up(self.table(indices))))
        return self.memory(self.conv(x.transpose(1, 2)).transpose(1, 2))[0]


def data(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 50, (4, 12), generator=generator) for _ in range(count)]


def quantized(weight: str, method: dict[str, Any] | None = None, **options: Any) -> nc.Quantized:
    rule = {"weight": weight, "method": method or {"rtn": {}}}
    return nc.quantize(Mixed().eval(), {"rule": [rule]}, data(), progress=False, **options)


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(data(1)[0])


@pytest.mark.parametrize("weight", SPECS)
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_every_layer_takes_the_format_and_a_checkpoint_gives_back_the_same_bits(
    weight: str, method: str, tmp_path: Path
) -> None:
    result = quantized(weight, {method: {}})
    assert {row.spec for row in result.report.layers} == {weight}
    nc.save(result, tmp_path / "saved")
    loaded = nc.load(tmp_path / "saved", into=Mixed().eval())
    assert torch.equal(answer(getattr(loaded, "model", loaded)), answer(result.model))
    stored = sum(t.nbytes for name, t in result.model.state_dict().items() if "bias" not in name)
    assert stored == sum(row.bytes_after for row in result.report.layers)


@pytest.mark.parametrize("method", ["hqq", "adaround", "autoround"])
def test_a_solver_that_cannot_learn_levels_falls_back_and_says_why(method: str) -> None:
    result = quantized("codebook3/channel", {method: {}})
    for row in result.report.layers:
        assert row.outcome == "fell back"
        assert row.reason == f"levels of codebook3/channel are learned by rtn and gptq only: rtn instead of {method}"
    assert torch.equal(answer(result.model), answer(quantized("codebook3/channel").model))


def test_the_report_has_the_error_of_learned_levels_before_and_after() -> None:
    rows = {row.layer: row for row in quantized("codebook3/channel", {"gptq": {}}).report.layers}
    before, after = rows["down"].errors
    assert (before.step, after.step) == ("rtn without data", "gptq")
    assert before.output_error is not None
    assert after.output_error is not None
    assert after.output_error < before.output_error


@pytest.mark.parametrize("method", ["hqq", "adaround", "autoround"])
def test_other_solvers_work_in_super_blocks(method: str) -> None:
    options = {"iterations": 20} if method != "hqq" else {}
    result = quantized("int4/group32/asym/scale:k6", {method: options})
    solved = {row.layer: row.outcome for row in result.report.layers}
    assert solved["up"] == solved["down"] == "quantized"


@pytest.mark.parametrize("weight", ["codebook4/channel", "int4/group32/asym/scale:k6"])
def test_integer_inputs_are_refused_with_what_does_run(weight: str) -> None:
    recipe = {"rule": [{"type": "Linear", "weight": weight, "input": "int8/token"}, {"layers": "*", "keep": "float"}]}
    with pytest.raises(RecipeError, match=r"no integer kernel multiplies weights in .* or leave input out"):
        nc.quantize(Mixed().eval(), recipe, data(), progress=False)


@pytest.mark.parametrize("weight", ["int4/group32/scale:k6", "nf4/group32/scale:k6"])
def test_super_blocks_without_zero_points_are_multiplied_in_integers(weight: str, tmp_path: Path) -> None:
    recipe = {"rule": [{"type": "Linear", "weight": weight, "input": "int8/token"}, {"layers": "*", "keep": "float"}]}
    result = nc.quantize(Mixed().eval(), recipe, data(), progress=False)
    kernels = {row.layer: row.kernel for row in result.report.layers}
    assert kernels["up"].startswith("linear_lowbit_dynamic")
    first = answer(result.model)
    assert all(torch.equal(answer(result.model), first) for _ in range(3)), "the second call may change the layout"
    nc.save(result, tmp_path / "saved")
    loaded = nc.load(tmp_path / "saved", into=Mixed().eval())
    assert torch.equal(answer(getattr(loaded, "model", loaded)), first)


def test_an_input_has_no_learned_levels() -> None:
    with pytest.raises(RecipeError, match="input 'codebook4': no kernel takes such activations"):
        nc.quantize(Mixed().eval(), {"rule": [{"weight": "int8", "input": "codebook4"}]}, data(), progress=False)


def test_learned_levels_are_resumed_with_the_same_bits(tmp_path: Path) -> None:
    whole = quantized("codebook3/channel", {"gptq": {}})
    for _ in range(2):
        again = quantized("codebook3/channel", {"gptq": {}}, resume=tmp_path)
        assert torch.equal(answer(again.model), answer(whole.model))


def test_a_depthwise_convolution_has_levels_for_every_channel() -> None:
    model, inputs = example("cnn")
    rule = {"weight": "codebook4/channel", "method": {"gptq": {}}}
    result = nc.quantize(model, {"rule": [rule]}, inputs, progress=False)
    assert {row.outcome for row in result.report.layers if row.spec == "codebook4/channel"} == {"quantized"}


@pytest.mark.parametrize(
    ("weight", "other"),
    [
        ("codebook4/channel", "codebook3/channel"),
        ("codebook4/channel", "codebook4/group32"),
        ("codebook4/channel", "nf4/channel"),
        ("int4/group32/asym/scale:k6", "int4/group32/asym"),
        ("int4/group32/asym/scale:k6", "int4/group16/asym/scale:k6"),
        ("int4/group32/asym/scale:k6", "int4/group32/scale:k6"),
        ("int4/group32/asym/scale:k6", "int4/group48/asym/scale:k6"),
    ],
)
def test_a_file_that_calls_its_tensors_another_format_is_refused(weight: str, other: str, tmp_path: Path) -> None:
    nc.save(quantized(weight), tmp_path / "saved")
    path = tmp_path / "saved" / "narrowcast.json"
    description = json.loads(path.read_text())
    for entry in description["modules"].values():
        if entry["config"].get("spec") == weight:
            entry["config"]["spec"] = other
    path.write_text(json.dumps(seal(description)))
    with pytest.raises(CheckpointError):
        nc.load(tmp_path / "saved", into=Mixed().eval())
