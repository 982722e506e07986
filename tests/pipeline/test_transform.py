"""Transforms in the pipeline: the float function stays, wrong pairs are refused, the caller's model is untouched."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.models.decoders import tiny
from tests.pipeline.models import example
from torch import Tensor, nn

import narrowcast as nc
from narrowcast.core import sqnr_db
from narrowcast.errors import DataError, ModelError, RecipeError
from narrowcast.models import TorchModel, find_pairs, fold_
from narrowcast.pipeline.calibrate import first_batch
from narrowcast.pipeline.transform import Transformed, transform
from narrowcast.planning import make_plan, untie_for
from narrowcast.recipe import load_recipe

ALL: list[Any] = ["equalize", "absorb", {"smoothquant": {"strength": 0.5}}, {"awq": {"grid": 4}}]


def recipe(transforms: list[Any], weight: str = "int4/group16/asym", given_input: str = "") -> dict[str, Any]:
    rule = {"weight": weight} | ({"input": given_input} if given_input else {})
    return {"rule": [{"role": "embedding", "keep": "table", "optional": True}, rule], "transforms": transforms}


def transformed(model: nn.Module, data: Any, transforms: list[Any], **kwargs: str) -> tuple[nn.Module, Transformed]:
    """The float model after the transforms alone."""
    loaded = load_recipe(recipe(transforms, **kwargs))
    adapter = TorchModel(model)
    untie_for(adapter, loaded)
    probe = None if data is None else first_batch(data, adapter)
    folds = find_pairs(adapter.model, None if probe is None else lambda: probe.run(adapter.model))
    plan = make_plan(adapter, loaded, folds)
    adapter.model = fold_(adapter.model, folds)
    done = transform(adapter, plan, data, probe)
    return adapter.model, done


def answer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = model(x)
    if isinstance(y, Tensor):
        return y
    return y.logits if "logits" in y else y.last_hidden_state


class Random(nn.Module):
    """A net of random wiring: convolutions (some depthwise or grouped), ReLUs of both kinds, pooling, joins."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.choices = torch.randint(0, 4, (3,), generator=g).tolist()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=self.choices[0] % 2, groups=(1, 2, 8, 4)[self.choices[1]])
        self.left, self.right = nn.Conv2d(8, 6, 1), nn.Conv2d(8, 4, 1, bias=False)
        self.head = nn.Linear(10, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=g))
                parameter.mul_(torch.logspace(-2, 1, parameter.shape[0]).view(-1, *[1] * (parameter.dim() - 1)))
            self.first.bias.add_(4 * torch.rand(8, generator=g))  # some channels never reach zero

    def forward(self, x: Tensor) -> Tensor:
        act = (torch.relu, nn.functional.relu6, nn.functional.leaky_relu, torch.relu)[self.choices[2]]
        x = act(self.middle(act(self.first(x))))
        if self.choices[0] > 1:
            x = nn.functional.max_pool2d(x, 2)
        x = torch.cat([torch.relu(self.left(x)), self.right(x)], dim=1)
        return self.head(x.mean((2, 3)))


@given(seed=st.integers(0, 10_000))
def test_random_convolution_nets_keep_their_function(seed: int) -> None:
    model, x = Random(seed).eval(), torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    expected = answer(model, x)
    after, done = transformed(model, [x], ALL, weight="int8/channel")
    assert sqnr_db(expected, answer(after, x)) > 90
    assert [note for note in done.notes if "unchanged to" in note]
    assert torch.equal(answer(model, x), expected), "the caller's model is as it was"


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gemma3", "phi3", "gpt2", "opt", "bert", "vit"])
def test_every_family_keeps_its_function_and_its_values_are_scaled(name: str) -> None:
    model, x = tiny(name)
    expected = answer(model, x)
    after, done = transformed(model, [x], ALL)
    assert sqnr_db(expected, answer(after, x)) > 90
    changed = {row.layer for row in done.changes}
    assert any(part in layer for layer in changed for part in ("v_proj", "c_attn", "qkv", "value"))
    assert torch.equal(answer(model, x), expected)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi3"])
@pytest.mark.parametrize("kind", ["hadamard", "random"])
def test_streams_are_rotated_and_the_function_stays(name: str, kind: str) -> None:
    model, x = tiny(name)
    expected = answer(model, x)
    after, done = transformed(model, [x], [{"rotate": {"kind": kind, "untie": True}}])
    assert sqnr_db(expected, answer(after, x)) > 90
    table = after.get_submodule("model.embed_tokens").weight
    assert not torch.allclose(table, model.get_submodule("model.embed_tokens").weight)
    assert torch.equal(answer(model, x), expected)
    assert any("scales of the norms folded" in note for note in done.notes)


def test_a_tied_head_is_not_rotated_unless_the_recipe_unties_it() -> None:
    model, x = tiny("llama tied")
    with pytest.raises(ModelError, match=r"'lm_head' is tied to 'model.embed_tokens'.*untie = true"):
        transformed(model, [x], ["rotate"])
    result = nc.quantize(model, recipe([{"rotate": {"untie": True}}]), [x], progress=False)
    assert "lm_head was tied" in " ".join(result.report.notes)
    assert [row.layer for row in result.report.layers if row.layer == "lm_head"]
    assert "lm_head was tied" in " ".join(nc.plan(model, recipe([{"rotate": {"untie": True}}])).notes)


@pytest.mark.parametrize(("name", "word"), [("gpt2", "residual stream"), ("bert", "residual stream")])
def test_models_without_a_known_stream_are_refused(name: str, word: str) -> None:
    model, x = tiny(name)
    with pytest.raises(ModelError, match=word):
        transformed(model, [x], ["rotate"])


def test_a_layer_norm_in_the_place_of_an_rms_norm_is_refused() -> None:
    model, x = tiny("llama")
    model.model.layers[0].input_layernorm = nn.LayerNorm(32)
    with pytest.raises(ModelError, match=r"input_layernorm' \(LayerNorm\) does not commute"):
        transformed(model, [x], ["rotate"])


@pytest.mark.parametrize("transform_name", ["equalize", "absorb", "smoothquant", "awq"])
def test_a_pair_with_another_activation_between_is_an_error_that_names_both(transform_name: str) -> None:
    model, x = tiny("vit")
    pairs = [["layers.*.mlp.fc1", "layers.*.mlp.fc2"]]
    with pytest.raises(ModelError, match=r"'layers.0.mlp.fc1' -> 'layers.0.mlp.fc2'.*gelu"):
        transformed(model, [x], [{transform_name: {"pairs": pairs}}])


def test_a_post_norm_is_an_error_because_its_output_goes_on_into_the_sum() -> None:
    model, x = tiny("bert")
    pairs = [["encoder.layer.0.attention.output.LayerNorm", "encoder.layer.0.intermediate.dense"]]
    with pytest.raises(ModelError, match=r"attention.output.LayerNorm' -> .*intermediate.dense'.* add in"):
        transformed(model, [x], [{"smoothquant": {"pairs": pairs}}])


def test_named_pairs_alone_are_scaled_and_patterns_must_match() -> None:
    model, x = tiny("llama")
    pairs = [["*.up_proj", "*.down_proj"]]
    _, done = transformed(model, [x], [{"smoothquant": {"pairs": pairs}}])
    assert {row.layer.rpartition(".")[2] for row in done.changes} == {"up_proj", "down_proj"}
    with pytest.raises(RecipeError, match=r"'\*.fc1'"):
        transformed(model, [x], [{"awq": {"pairs": [["*.fc1", "*.down_proj"]]}}])
    with pytest.raises(ModelError, match=r"'model.layers.0.mlp.up_proj' -> 'model.layers.0.self_attn.q_proj'"):
        transformed(model, [x], [{"awq": {"pairs": [["*.0.mlp.up_proj", "*.0.*.q_proj"]]}}])


def test_query_groups_share_the_scale_of_their_value_head() -> None:
    model, x = tiny("llama")
    before = model.model.layers[0].self_attn
    after, _ = transformed(model, [x], [{"smoothquant": {"pairs": [["*.v_proj", "*.o_proj"]]}}])
    attention = after.model.layers[0].self_attn
    value = (before.v_proj.weight / attention.v_proj.weight).mean(1).detach()  # what each value channel was divided by
    columns = (attention.o_proj.weight / before.o_proj.weight).mean(0).view(4, 8)
    torch.testing.assert_close(columns, value.view(2, 8).repeat_interleave(2, 0), rtol=1e-4, atol=1e-5)
    assert float(value.std()) > 0.01


class Heads(nn.Module):
    """Two layers with a ReLU between, and whatever a test does to them."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Doubled(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square()


def refusal(model: nn.Module) -> str:
    with pytest.raises(ModelError) as caught:
        transformed(model, [torch.randn(9, 8)], [{"equalize": {"pairs": [["fc1", "fc2"]]}}])
    assert "'fc1' -> 'fc2'" in str(caught.value)
    return str(caught.value)


def test_hooks_and_overridden_forwards_are_respected() -> None:
    torch.manual_seed(0)
    for name in ("fc1", "act", "fc2"):
        model = Heads().eval()
        model.get_submodule(name).register_forward_hook(lambda module, args, output: None)
        assert "has hooks" in refusal(model)
    model = Heads().eval()
    model.fc1 = Doubled(8, 16)
    assert "no layer whose output can be scaled" in refusal(model)
    model = Heads().eval()
    model.fc2 = Doubled(16, 4)
    assert "goes through linear in 'fc2'" in refusal(model)
    model = Heads().eval()
    model.fc2 = nn.utils.parametrizations.weight_norm(nn.Linear(16, 4))
    assert "fc2" in refusal(model)


def test_a_layer_that_is_called_twice_or_tied_or_returned_is_not_scaled() -> None:
    class Twice(Heads):
        def forward(self, x: Tensor) -> Tensor:
            hidden = self.act(self.fc1(x))
            return self.fc2(hidden) + self.fc2(self.act(x.repeat(1, 2)))

    class Both(Heads):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            hidden = self.act(self.fc1(x))
            return self.fc2(hidden), hidden

    torch.manual_seed(0)
    assert "called on different inputs" in refusal(Twice().eval())
    assert "returns it" in refusal(Both().eval())
    tied = Heads().eval()
    tied.other = nn.Linear(16, 4)
    tied.other.weight = tied.fc2.weight
    assert "tied" in refusal(tied)


def test_a_layer_that_did_not_run_could_be_a_reader() -> None:
    class Sometimes(Heads):
        def __init__(self) -> None:
            super().__init__()
            self.expert = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.act(self.fc1(x))
            return self.expert(hidden) if float(x.sum()) > 1e9 else self.fc2(hidden)

    assert "'expert' did not run" in refusal(Sometimes().eval())


def test_a_function_that_changes_after_all_is_undone_and_names_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tiny("llama")
    torch.manual_seed(0)
    from narrowcast.pipeline import transform as module

    real = module.divide_output_

    def wrong(producer: Any, scale: Tensor) -> None:
        real(producer, scale * (1.5 if isinstance(producer, nn.Linear) and producer.out_features == 48 else 1.0))

    monkeypatch.setattr(module, "divide_output_", wrong)
    with pytest.raises(ModelError, match=r"awq changed the float output .*up_proj -> .*down_proj"):
        transformed(model, [x], [{"awq": {"grid": 2}}])


def test_transforms_without_data_use_patterns_or_say_what_is_missing() -> None:
    model, x = tiny("opt")
    expected = answer(model, x)
    after, done = transformed(model, None, ["equalize"])
    assert sqnr_db(expected, answer(after, x)) > 90
    assert "the pattern of OPT" in " ".join(done.notes)
    assert "not checked on data" in " ".join(done.notes)
    assert all(row.output_sqnr_after_db is None for row in done.changes)
    for name in ("awq", "smoothquant", "absorb"):
        with pytest.raises(DataError, match=f"{name} looks at activations"):
            transformed(model, None, [name])
    with pytest.raises(DataError, match="a generator can be read only once"):
        transformed(model, (batch for batch in [x]), ["equalize"])


def test_an_infinite_activation_is_an_error_that_names_the_layer() -> None:
    model = Heads().eval()
    with torch.no_grad():
        model.fc1.bias[3] = math.inf
    with pytest.raises(DataError, match="fc2"):
        transformed(model, [torch.randn(9, 8)], ["awq"])


def test_a_relu6_keeps_channels_at_its_ceiling_and_says_how_many() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU6(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 1, 16).unsqueeze(1))
    x = torch.randn(200, 8)
    after, done = transformed(model, [x], ["equalize"])
    reached = model[0](x).amax(0) * 1.25 >= 6
    assert reached.any()
    assert not reached.all()
    same = torch.isclose(after[0].weight, model[0].weight).all(1)
    assert torch.equal(same | ~reached, torch.ones(16, dtype=torch.bool))
    assert not same[~reached].any()
    assert f"{int(reached.sum())} channels come near the ceiling" in " ".join(done.notes)
    torch.testing.assert_close(after(x), model(x), rtol=1e-4, atol=1e-5)
    # SmoothQuant and AWQ know no bound, so they leave such channels alone
    assert sqnr_db(model(x), transformed(model, [x], ["awq", "smoothquant"])[0](x)) > 120


def test_awq_never_makes_a_layer_worse_on_its_sample() -> None:
    model, x = tiny("llama")
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[3] = 30
    _, done = transformed(
        model, [x], [{"awq": {"pairs": [["*.input_layernorm", "*.q_proj"]]}}], weight="int3/group16/asym"
    )
    before = sum(10 ** (-row.output_sqnr_before_db / 10) for row in done.changes if row.output_sqnr_before_db)
    after = sum(10 ** (-row.output_sqnr_after_db / 10) for row in done.changes if row.output_sqnr_after_db)
    assert after < before


def test_smoothing_an_outlier_channel_helps_per_token_inputs() -> None:
    model, x = tiny("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] = 100
    kwargs = {"weight": "int8/channel", "given_input": "int8/token"}
    for option in ({"strength": 0.5}, {"strength": "search"}):
        _, done = transformed(model, [x], [{"smoothquant": option}], **kwargs)
        rows = [row for row in done.changes if row.layer.endswith(("q_proj", "k_proj"))]
        assert len(rows) == 4
        gains = [(row.output_sqnr_after_db or 0) - (row.output_sqnr_before_db or 0) for row in rows]
        assert sum(gains) > 0


def test_the_whole_pipeline_runs_transforms_and_reports_them(tmp_path: Any) -> None:
    model, x = example("cnn")
    values = recipe(
        ["equalize", {"smoothquant": {"strength": 0.5}}],
        weight="int8/channel",
        given_input="uint8/channel static:minmax",
    )
    result = nc.quantize(model, values, list(x.split(16)), progress=False)
    assert {row.transform for row in result.report.changes} == {"equalize", "smoothquant"}
    assert result.report.totals.output_sqnr_db is not None
    assert result.report.totals.output_sqnr_db > 20
    result.report.save_json(tmp_path / "report.json")
    assert nc.Report.from_dict(result.report.to_dict()) == result.report
    assert load_recipe(result.recipe.to_dict()) == result.recipe
    nc.save(result, tmp_path / "saved")
    torch.testing.assert_close(nc.load(tmp_path / "saved", into=example("cnn")[0])(x), result.model(x))


def test_unknown_transforms_are_refused_when_the_recipe_is_read() -> None:
    with pytest.raises(RecipeError, match="transform 'smooth' is not known"):
        load_recipe(recipe(["smooth"]))
    with pytest.raises(RecipeError, match="transforms is a list"):
        load_recipe(recipe("equalize"))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="no option 'alpha'"):
        load_recipe(recipe([{"smoothquant": {"alpha": 0.5}}]))
