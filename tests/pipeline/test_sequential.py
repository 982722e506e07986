"""Block after block: what solvers are given, in which order things are installed, and what falls back with a reason."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.pipeline import block_methods
from tests.pipeline.block_methods import INPUTS, NOTEBOOK
from tests.pipeline.models import example
from torch import Tensor, nn

import narrowcast as nc
from narrowcast.core import QuantSpec
from narrowcast.errors import DataError, RecipeError
from narrowcast.methods import METHODS
from narrowcast.models.patches import input_rows
from narrowcast.nn import QuantizedModule
from narrowcast.pipeline import streams


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, method in block_methods.METHODS.items():
        monkeypatch.setitem(METHODS, name, method)
    NOTEBOOK.__init__()  # type: ignore[misc]


class Layer(nn.Module):
    """Two linear layers that read one tensor, and one that reads what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.left, self.right, self.down = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor]:
        y = self.norm(x)
        return (x + mask * self.down(self.left(y).sigmoid() * self.right(y)),)


class Model(nn.Module):
    """A table, three layers, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 12)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 40, bias=False)
        self.head.weight = self.table.weight

    def forward(self, indices: Tensor) -> Tensor:
        x = self.table(indices)
        mask = (indices > 0).unsqueeze(-1).float()
        for layer in self.layers:
            x = layer(x, mask)[0]
        return self.head(self.norm(x))


def build() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = Model().eval()
    generator = torch.Generator().manual_seed(1)
    return model, [torch.randint(0, 40, (4, length), generator=generator) for length in (6, 9, 6)]


def recipe(method: str, weight: str = "int4/channel", **options: Any) -> dict[str, Any]:
    given = {key: options.pop(key) for key in ("input",) if key in options}
    return {"name": "test", "rule": [{"weight": weight, "method": method, **given}], **options}


def run(method: str, **options: Any) -> tuple[nn.Module, list[Tensor], nc.Quantized]:
    model, data = build()
    return model, data, nc.quantize(model, recipe(method, **options), data, progress=False)


def inputs_of(model: nn.Module, path: str, data: list[Tensor]) -> Tensor:
    """[n, in] all that a module of the finished model is called with."""
    seen: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda m, a: seen.append(a[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in data:
            model(batch)
    handle.remove()
    return torch.cat(seen)


def records(model: nn.Module) -> dict[str, Any]:
    return {
        f"{path}.{name}": record
        for path, module in model.named_modules()
        if isinstance(module, QuantizedModule)
        for name, record in module.quantized_weights().items()
    }


def assert_same_model(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


def test_methods_that_need_nothing_give_the_same_model_block_after_block() -> None:
    for name in ("cnn", "transformer", "lstm", "tied"):
        model, x = example(name)
        rule = {"rule": [{"weight": "int4/group32"}]}
        at_once = nc.quantize(model, rule, x, progress=False)
        in_blocks = nc.quantize(model, {**rule, "sequential": True}, x, progress=False)
        assert_same_model(at_once.model, in_blocks.model)


LAYERS = [f"layers.{i}.{name}" for i in range(3) for name in ("left", "right", "down")]


def test_every_hessian_is_that_of_the_inputs_which_the_finished_model_gives() -> None:
    # true for `down` only if it is seen after `left` and `right` are quantized, and for a block after those before
    _, data, result = run("sees_hessian", correct_bias=False)
    solved = [row.layer for row in result.report.layers if row.outcome == "quantized" and row.layer in LAYERS]
    assert solved == LAYERS
    for path, seen in zip(LAYERS, NOTEBOOK.seen, strict=False):
        # the tied table is quantized last, so the blocks saw the float one
        x = inputs_of(_with_float_table(result.model), path, data).double()
        assert seen is not None and seen.hessian is not None
        torch.testing.assert_close(seen.hessian.double(), x.t() @ x / x.shape[0], rtol=1e-4, atol=1e-6)
        assert seen.samples == x.shape[0]


def test_every_drift_is_that_of_the_finished_model_s_inputs_from_the_float_model_s() -> None:
    model, data, result = run("sees_drift", correct_bias=False)
    for path, seen in zip(LAYERS, NOTEBOOK.seen, strict=False):
        exact, x = (inputs_of(m, path, data).double() for m in (model, _with_float_table(result.model)))
        assert seen is not None and seen.drift is not None
        torch.testing.assert_close(seen.drift.double(), (exact - x).t() @ x / x.shape[0], rtol=1e-3, atol=1e-6)
        assert bool(seen.drift.any()) == (path not in LAYERS[:2]), "before the first quantized layer nothing has moved"


def test_without_sequence_nothing_drifts() -> None:
    run("sees_drift", sequential=False)
    assert all(seen is not None and seen.drift is None for seen in NOTEBOOK.seen)


def _with_float_table(model: nn.Module) -> nn.Module:
    model.table = build()[0].table
    return model


def test_without_sequence_every_hessian_is_the_float_model_s() -> None:
    model, data, _ = run("sees_hessian", sequential=False)
    for path, seen in zip(LAYERS, NOTEBOOK.seen, strict=False):
        x = inputs_of(model, path, data).double()
        assert seen is not None and seen.hessian is not None
        torch.testing.assert_close(seen.hessian.double(), x.t() @ x / x.shape[0], rtol=1e-4, atol=1e-6)


def test_kept_inputs_are_vectors_of_the_layer_s_own_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("narrowcast.pipeline.watchers._KEPT_INPUTS", 12)
    model, data, _ = run("sees_hessian", sequential=False)
    kept = NOTEBOOK.seen[0]
    assert kept is not None and kept.inputs is not None and kept.inputs.shape == (12, 12)
    every = {tuple(row.tolist()) for row in inputs_of(model, LAYERS[0], data)}
    assert {tuple(row.tolist()) for row in kept.inputs} <= every


def test_the_report_has_the_error_before_and_after_as_numbers() -> None:
    _, _, result = run("sees_hessian")
    row = next(row for row in result.report.layers if row.layer == "layers.1.down")
    weight, seen = NOTEBOOK.weights[5], NOTEBOOK.seen[5]
    assert seen is not None and seen.hessian is not None
    plain = METHODS["rtn"](range="absmax").quantize(weight, QuantSpec.parse("int4/channel"))
    error = weight - plain.dequantize()
    hessian = seen.hessian.float()
    expected = torch.trace(error @ hessian @ error.t()) / torch.trace(weight @ hessian @ weight.t())
    before, after = row.errors
    assert (before.step, after.step) == ("rtn absmax", "sees_hessian")
    assert before.output_error == pytest.approx(float(expected), rel=1e-3)
    assert after.output_error is not None and after.weight_sqnr_db == row.weight_sqnr_db
    assert row.notes == [f"{seen.samples} samples"]
    values = json.loads(json.dumps(result.report.to_dict()))
    assert nc.Report.from_dict(values) == result.report
    assert str(result.report).count("samples: ") == 1, "one line for a note that many layers share"


@pytest.mark.parametrize("given", INPUTS)
def test_a_block_s_output_with_what_was_solved_is_what_the_installed_block_gives(given: str) -> None:
    weight = "int8/channel" if given.startswith("uint") else "int4/group32"
    _, data, result = run("sees_block", weight=weight, correct_bias=False, **({"input": given} if given else {}))
    assert {row.method.split(",")[0] for row in result.report.layers if row.layer in LAYERS} == {"sees_block"}
    last = NOTEBOOK.blocks[2]
    answer = NOTEBOOK.answers[2]
    wanted = last.output(answer["weights"], range(last.samples), answer["training"]).detach()
    outputs: list[Tensor] = []
    model = _with_float_table(result.model)
    model.layers[2].register_forward_hook(lambda m, a, o: outputs.append(o[0].detach()))
    with torch.no_grad():
        for batch in (torch.cat([data[0], data[2]]), data[1]):  # calls of one shape are joined
            model(batch)
    got = torch.cat([output.flatten(0, -2) for output in outputs])
    assert wanted.shape == got.shape
    # codes of a few inputs lie on an edge, where float rounding decides
    assert float((wanted - got).norm() / got.norm()) < (1e-5 if not given else 5e-3)


def test_a_block_s_target_is_the_float_model_s_output_and_its_samples_are_rows() -> None:
    model, data, _ = run("sees_block")
    block = NOTEBOOK.blocks[1]
    assert block.samples == 12
    outputs: list[Tensor] = []
    model.layers[1].register_forward_hook(lambda m, a, o: outputs.append(o[0]))
    with torch.no_grad():
        for batch in data:
            model(batch)
    joined = torch.cat([outputs[0], outputs[2]])
    torch.testing.assert_close(block.target([5]), joined[5:6])
    torch.testing.assert_close(block.target([7, 8]), torch.cat([joined[7], outputs[1][0]]))
    assert block.output(block.weights, [7, 8]).shape == block.target([7, 8]).shape


def test_gradients_reach_the_weights_and_nothing_of_the_caller_s() -> None:
    model, _, _ = run("sees_block", weight="int4/group32", input="int8/token")
    assert all(bool(g.abs().sum() > 0) for answer in NOTEBOOK.answers[:3] for g in answer["gradients"])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_caller_s_model_is_not_changed() -> None:
    before = {name: tensor.clone() for name, tensor in build()[0].state_dict().items()}
    for method in ("sees_hessian", "sees_block"):
        model, _, _ = run(method)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", ["sees_hessian", "sees_block"])
def test_a_tied_weight_is_solved_once_for_the_layer_that_multiplies_it(method: str) -> None:
    _, _, result = run(method)
    row = result.report.layers[0]
    assert row.layer == "table" and row.method.startswith(method) and row.outcome == "quantized"
    assert any("table is tied: solved for head" in note for note in result.report.notes)
    assert torch.equal(result.model.table(torch.tensor([3])), result.model.head.weight[3:4])


def test_what_a_method_cannot_work_on_is_rounded_and_the_report_says_why() -> None:
    model, x = example("lstm")
    result = nc.quantize(model, recipe("sees_only_hessian", "int8/channel"), x, progress=False)
    rows = {row.layer: row for row in result.report.layers}
    assert "rows are looked up" in rows["table"].reason and rows["table"].method.startswith("rtn")
    assert rows["table"].outcome == "fell back" and rows["head"].outcome == "quantized"
    with pytest.raises(nc.ContractError, match="looked up"):
        nc.quantize(model, recipe("sees_only_hessian", "int8/channel"), x, progress=False, strict=True)


def test_every_group_of_a_convolution_is_solved_with_its_own_hessian() -> None:
    model, x = example("cnn")
    result = nc.quantize(model, recipe("sees_only_hessian"), x, progress=False)
    rows = {row.layer: row for row in result.report.layers}
    assert rows["depthwise"].method.startswith("sees_only_hessian")
    assert rows["depthwise"].notes == [f"{48 * 36} samples (16 of 16 groups)"]
    assert rows["depthwise"].errors[1].output_error is not None
    depthwise = [s.hessian for s in NOTEBOOK.seen if s is not None and s.hessian is not None and len(s.hessian) == 9]
    seen: list[Tensor] = []
    result.model.depthwise.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with torch.no_grad():
        result.model(x)
    patches = input_rows(model.depthwise, seen[0]).double()
    torch.testing.assert_close(
        torch.stack(depthwise).double(), patches.transpose(1, 2) @ patches / patches.shape[1], rtol=1e-3, atol=1e-5
    )


def test_input_vectors_of_grouped_convolutions_are_not_kept_and_the_report_says_so() -> None:
    model, x = example("cnn")
    result = nc.quantize(model, recipe("sees_hessian"), x, progress=False)
    row = next(row for row in result.report.layers if row.layer == "depthwise")
    assert row.outcome == "fell back" and "grouped" in row.reason


@pytest.mark.parametrize("method", ["sees_only_hessian", "sees_block"])
@pytest.mark.parametrize("name", ["cnn", "transformer", "lstm", "tied"])
@pytest.mark.parametrize("given", ["", "uint8/channel static:minmax"])
def test_every_sort_of_model_runs_block_after_block(name: str, method: str, given: str) -> None:
    model, x = example(name)
    rule: dict[str, Any] = {"weight": "int8/channel", "method": method} | ({"input": given} if given else {})
    rules = [{"type": "LSTM", "weight": "int8/channel", "input": "int8/token", "optional": True}, rule]
    result = nc.quantize(model, {"rule": rules}, x, progress=False)
    assert (result.report.totals.output_sqnr_db or 0) > 22


def test_a_model_whose_order_is_not_known_is_one_block() -> None:
    class Twice(Model):
        def forward(self, indices: Tensor) -> Tensor:
            x = self.table(indices)
            mask = torch.ones(*indices.shape, 1)
            for layer in [*self.layers, *self.layers]:
                x = layer(x, mask)[0]
            return self.head(self.norm(x))

    torch.manual_seed(0)
    model, data = Twice().eval(), build()[1]
    for method in ("sees_hessian", "sees_block"):
        result = nc.quantize(model, recipe(method), data, progress=False)
        assert any("the whole model is one block" in note for note in result.report.notes)
        assert all(row.outcome == "quantized" for row in result.report.layers if len(row.spec))
    seen = NOTEBOOK.seen[1]  # the first is the tied table
    assert seen is not None and seen.samples == 2 * sum(batch.numel() for batch in data), "both calls are seen"


def test_a_part_that_not_every_call_reaches_is_solved_on_those_that_do() -> None:
    class Sometimes(Model):
        def forward(self, indices: Tensor) -> Tensor:
            x, mask = self.table(indices), torch.ones(*indices.shape, 1)
            for layer in self.layers if indices.shape[1] == 6 else self.layers[:1]:
                x = layer(x, mask)[0]
            return self.head(self.norm(x))

    torch.manual_seed(0)
    model, data = Sometimes().eval(), build()[1]
    for method in ("sees_hessian", "sees_block"):
        result = nc.quantize(model, recipe(method), data, progress=False)
        assert all(row.outcome == "quantized" for row in result.report.layers if row.spec)
    assert NOTEBOOK.seen[3] is not None and NOTEBOOK.seen[3].samples == 2 * 4 * 6
    assert [block.samples for block in NOTEBOOK.blocks[:2]] == [12, 8]


def test_memory_is_bounded_and_the_report_says_by_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MOST_ROWS", 8)
    _, _, result = run("sees_hessian")
    assert NOTEBOOK.seen[0] is not None and NOTEBOOK.seen[0].samples == 4 * 6 + 4 * 6
    assert "blocks were solved on 8 rows, spread over the data (at most 8)" in result.report.notes
    assert result.report.layers[0].macs is not None
    monkeypatch.setattr(streams, "MOST_BYTES", 3 * 6 * 12 * 4 * 2 * 5)
    NOTEBOOK.__init__()  # type: ignore[misc]
    _, _, result = run("sees_hessian")
    assert NOTEBOOK.seen[0] is not None and NOTEBOOK.seen[0].samples == 4 * 6
    assert any("at the widest block" in note for note in result.report.notes)


def test_a_generator_and_a_callable_serve_as_data() -> None:
    model, data = build()
    expected = nc.quantize(model, recipe("sees_hessian"), data, progress=False).model

    def once() -> Iterator[Tensor]:
        yield from data

    assert_same_model(expected, nc.quantize(model, recipe("sees_hessian"), once(), progress=False).model)
    called = nc.quantize(model, recipe("sees_hessian"), lambda m: [m(batch) for batch in data], progress=False)
    assert_same_model(expected, called.model)


def test_a_callable_that_never_calls_the_model_is_seen_as_one_block() -> None:
    model, data = build()

    def parts(m: Any) -> Tensor:
        x = m.table(data[0])
        for layer in m.layers:
            x = layer(x, torch.ones(4, 6, 1))[0]
        return m.head(m.norm(x))

    result = nc.quantize(model, recipe("sees_hessian"), parts, progress=False)
    assert any("never its forward" in note for note in result.report.notes)
    assert all(row.outcome == "quantized" for row in result.report.layers if row.spec)
    with pytest.raises(DataError, match="give batches"):
        nc.quantize(model, recipe("sees_block"), parts, progress=False)


@pytest.mark.parametrize("options", [{"method": "sees_hessian"}, {"method": "sees_block"}])
def test_a_method_that_needs_data_refuses_to_work_without(options: dict[str, str]) -> None:
    model, _ = build()
    with pytest.raises(DataError, match=r"needs calibration data.*pass data="):
        nc.quantize(model, recipe(**options), progress=False)
    with pytest.raises(DataError, match="sequential = true"):
        nc.quantize(model, recipe("rtn", sequential=True), progress=False)


def test_sequential_is_one_of_three_values() -> None:
    assert nc.Recipe.from_dict(recipe("rtn")).sequential == "auto"
    for value in (True, False, "auto"):
        made = nc.Recipe.from_dict(recipe("rtn", sequential=value))
        assert nc.Recipe.from_dict(made.to_dict()) == made and made.sequential == value
    with pytest.raises(RecipeError, match="sequential is true, false or 'auto', got 'yes'"):
        nc.Recipe.from_dict(recipe("rtn", sequential="yes"))


def test_a_decoder_with_a_cache_is_not_given_one() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    torch.manual_seed(0)
    model, data = transformers.LlamaForCausalLM(config).eval(), build()[1]
    assert model.config.use_cache
    for method in ("sees_hessian", "sees_block"):
        result = nc.quantize(model, recipe(method), data, progress=False)
        rows = [row for row in result.report.layers if row.type == "Linear"]
        assert len(rows) == 15 and all(row.outcome == "quantized" for row in rows)
    assert model.config.use_cache and result.model.config.use_cache
