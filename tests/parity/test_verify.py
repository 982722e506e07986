"""What verifying two artefacts says: which layer is bad, which is only behind it, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.parity.models import quantized, with_other_scale, with_other_weight
from tests.pipeline.models import CASES, example
from tests.qat.prepared import CHANNELS, prepared, recipe, train_
from torch import Tensor, nn

import narrowcast as nc
from narrowcast.data import iterate
from narrowcast.errors import DataError, FormatError, KernelError, ModelError
from narrowcast.nn.integer_graph import unfuse_
from narrowcast.parity.pairs import find_pairs
from narrowcast.parity.torch_runtime import TorchRuntime
from narrowcast.parity.walk import Walk


class Chain(nn.Module):
    """Three layers with functions between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(torch.relu(self.second(self.between(self.first(x)))))

    def between(self, x: Tensor) -> Tensor:
        return torch.relu(x)


class OtherChain(Chain):
    """The same layers, another function between them."""

    def between(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


def chain(kind: type[Chain] = Chain) -> Chain:
    torch.manual_seed(0)
    return kind().eval()


DATA = [torch.randn(16, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


def row(parity: nc.Parity, name: str) -> Any:
    return next(layer for layer in parity.layers if layer.layer == name)


def test_a_model_and_its_copy_are_equal_bit_for_bit() -> None:
    parity = nc.verify(chain(), chain(), DATA)
    assert parity.equal and parity.ok and parity.first_difference is None
    assert [layer.layer for layer in parity.layers] == ["first", "second", "third"]
    assert (parity.batches, parity.samples) == (3, 48)
    assert "3 layers and the output are equal bit for bit" in str(parity)


def test_a_model_is_compared_with_itself_although_both_sides_are_one_object() -> None:
    model = chain()
    assert nc.verify(model, model, DATA).equal
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_fault_in_one_layer_is_named_and_told_from_what_is_behind_it() -> None:
    model = chain()
    parity = nc.verify(model, with_other_weight(model, "second"), DATA)
    assert not parity.ok
    assert parity.first_difference == parity.first_beyond == "second"
    assert row(parity, "first").verdict == "equal"
    faulty, behind = row(parity, "second"), row(parity, "third")
    assert not faulty.alone.equal and 0 < faulty.alone.share <= 1 / 8, "one column of outputs"
    assert faulty.reason == "stored differently: 1 of 64 in weight"
    assert behind.alone.equal and not behind.in_model.equal, "alone the third layer is as it should be"
    assert "differs alone, on the reference's inputs, too" in parity.summary()
    assert any(line.startswith(">") and "second" in line for line in str(parity).splitlines())


def test_a_difference_between_the_layers_is_not_blamed_on_a_layer() -> None:
    parity = nc.verify(chain(), chain(OtherChain), DATA)
    assert parity.first_difference == "second"
    assert all(layer.alone.equal for layer in parity.layers)
    assert parity.output is not None and parity.output.verdict == "BEYOND"
    assert "alone it is equal: the difference comes from what runs between the layers" in parity.summary()


@torch.no_grad()
def test_figures_are_those_of_all_batches_together() -> None:
    model = chain()
    other = with_other_weight(model, "first")
    whole, cut = nc.verify(model, other, [torch.cat(DATA)]), nc.verify(model, other, DATA)
    expected, got = model.first(torch.cat(DATA)).double(), other.first(torch.cat(DATA)).double()
    for parity in (whole, cut):
        seen = row(parity, "first").alone
        assert seen.elements == 48 * 8 and seen.differing == int((expected != got).sum())
        assert seen.max_absolute == pytest.approx(float((expected - got).abs().max()), rel=1e-12)
        assert seen.equal is False and seen.beyond == seen.differing
        noise = 10 * torch.log10(expected.square().sum() / (expected - got).square().sum())
        assert seen.sqnr_db == pytest.approx(float(noise), rel=1e-9)


def test_the_first_batch_with_a_difference_is_named() -> None:
    model = chain()
    other = with_other_weight(model, "first")
    quiet = torch.zeros(4, 8)
    assert row(nc.verify(model, other, [quiet, quiet, DATA[0]]), "first").alone.first_batch == 2


@pytest.mark.parametrize("name", CASES)
def test_a_float_model_beside_a_quantized_one_needs_a_stated_tolerance(name: str) -> None:
    model, small, data = quantized(name, "dynamic-int8")
    parity = nc.verify(model, small, data)
    assert not parity.ok and parity.first_beyond is None
    assert "parity is not shown" in parity.summary() and "tolerance='20dB'" in parity.summary()
    assert nc.verify(model, small, data, tolerance="20dB").ok
    assert not nc.verify(model, small, data, tolerance="90dB").ok
    assert nc.verify(model, small, data, tolerance=0.2).ok
    assert not nc.verify(model, small, data, tolerance="exact").ok


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("preset", ["static-int8", "dynamic-int8", "dynamic-int4", "weight-int4"])
def test_native_kernels_are_within_the_stated_bound_of_the_reference_bodies(name: str, preset: str) -> None:
    _, small, data = quantized(name, preset)
    parity = nc.verify(small, small, data[:1], kernels=("reference", None))
    assert parity.ok, str(parity)
    assert all(layer.verdict == "equal" for layer in parity.layers if "integer" in layer.bound), str(parity)
    if nc.kernels.capability().isa != "reference":
        assert any(note.startswith("kernels: the reference ran on reference") for note in parity.notes)


@pytest.mark.parametrize("name,weight,given", [
    ("cnn", "int4/channel", CHANNELS), ("transformer", "int4/group32/asym", "int8/token"),
    ("lstm", "int8/channel", "int8/token"), ("tied", "int4/group32", "int8/token"), ("cnn", "int2/channel", None),
])  # fmt: skip
def test_what_was_trained_is_what_is_converted_layer_by_layer(name: str, weight: str, given: str | None) -> None:
    model, x = prepared(name, weight, given)
    train_(model, x, steps=3)
    parity = nc.verify(model, nc.qat.convert(model), [x])
    assert parity.equal, str(parity)
    assert model.training, "the prepared model is put back into training mode"
    assert "the reference was in training mode and was compared in eval mode" in parity.notes


def test_a_fault_behind_conversion_is_found_in_its_layer() -> None:
    model, x = prepared("tied", "int4/group32", "int8/token")
    train_(model, x, steps=2)
    converted = nc.qat.convert(model).model
    parity = nc.verify(model, with_other_scale(converted, "down"), [x])
    assert not parity.ok and parity.first_difference == "down"
    assert row(parity, "up").verdict == "equal"
    assert "3 of 96 in weight scale" in row(parity, "down").reason


def fused_cnn() -> tuple[nn.Module, nn.Module, list[Tensor]]:
    """A prepared and trained CNN, and what it converts to, whose convolutions run as a network."""
    model, x = example("cnn")
    made = nc.qat.prepare(model, recipe("cnn", "int8/channel", CHANNELS) | {"fuse": True}, [x], progress=False)
    train_(made, x, steps=2)
    return made, nc.qat.convert(made).model, [x]


def test_layers_inside_a_network_are_equal_alone_and_reported_as_inside() -> None:
    made, fused, data = fused_cnn()
    parity = nc.verify(made, fused, data)
    assert parity.ok, str(parity)
    inside = [layer for layer in parity.layers if layer.reason == "runs inside (model)"]
    assert {layer.layer for layer in inside} >= {"stem.0", "depthwise", "pointwise"}
    assert all(layer.alone.equal and layer.in_model is None for layer in inside)


def test_layers_inside_networks_of_both_sides_are_compared_by_what_they_store() -> None:
    _, fused, data = fused_cnn()
    assert nc.verify(fused, fused, data).equal
    parity = nc.verify(fused, with_other_scale(fused, "pointwise"), data)
    assert not parity.ok and parity.first_difference == "pointwise"
    assert row(parity, "pointwise").reason == "stored differently: 1 of 24 in weight scale"


def test_a_network_beside_its_own_modules_is_judged_at_its_output() -> None:
    data = [example("cnn")[1]]
    apart = nc.quantize(*_cnn_and_rules(), data, progress=False).model
    unfuse_(apart)
    network = nc.quantize(*_cnn_and_rules(), data, progress=False).model
    parity = nc.verify(apart, network, data)
    assert parity.ok and parity.output is not None
    assert parity.output.bound.startswith("20 dB")


def _cnn_and_rules() -> tuple[nn.Module, dict[str, Any]]:
    return example("cnn")[0], recipe("cnn", "int8/channel", CHANNELS) | {"fuse": True}


def test_an_attention_that_was_taken_apart_is_compared_as_one_layer() -> None:
    model, small, data = quantized("transformer", "dynamic-int8")
    parity = nc.verify(model, small, data, tolerance="20dB")
    names = [layer.layer for layer in parity.layers]
    assert "body.self_attn" in names and not any(name.startswith("body.self_attn.") for name in names)


def test_a_batchnorm_that_was_folded_is_part_of_its_convolution_on_both_sides() -> None:
    model, small, data = quantized("cnn", "weight-int8")
    parity = nc.verify(model, small, data, tolerance="25dB")
    names = [layer.layer for layer in parity.layers]
    assert parity.ok and "depthwise" in names and "norm" not in names


def test_inputs_that_a_layer_changes_in_place_are_the_same_for_both() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)).eval()
    assert nc.verify(model, model, DATA).equal


def test_a_generator_is_read_once_and_a_callable_runs_the_model() -> None:
    model = chain()
    assert nc.verify(model, model, (batch for batch in DATA)).batches == 3
    silent = nc.verify(model, model, lambda module: [module(batch) for batch in DATA] and None)
    assert silent.equal and silent.output is None
    assert "the models returned no tensor: only their layers were compared" in silent.notes


def test_results_go_to_json_and_back(tmp_path: Path) -> None:
    model = chain()
    parity = nc.verify(model, with_other_weight(model, "third"), DATA)
    parity.save_json(tmp_path / "parity.json")
    values = json.loads((tmp_path / "parity.json").read_text())
    assert values == parity.to_dict()
    assert values["first_difference"] == "third" and values["layers"][0]["alone"]["sqnr_db"] == "inf"


def test_a_long_list_of_layers_is_printed_short() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(120))).eval()
    text = str(nc.verify(model, with_other_weight(model, "100"), [torch.randn(2, 4)]))
    assert len(text.splitlines()) < 12
    assert "... 100 layers" in text and "> " in text


def test_memory_does_not_grow_with_the_number_of_batches() -> None:
    sides = [TorchRuntime("one", chain(), None), TorchRuntime("other", chain(), None)]
    walk = Walk(sides[0], sides[1], find_pairs(sides[0], sides[1])[0], None)
    for batch in iterate(DATA, sides[0].model):
        walk.step(batch)
        assert not any(walk._alone.values()) and not any(walk._expected.values())


class Twice(Chain):
    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.first(self.first(x)))


def nan_weight() -> nn.Module:
    model = chain()
    with torch.no_grad():
        model.second.weight[2, 1] = float("nan")
    return model


REFUSED = {
    "no common layer": (lambda: nn.Sequential(nn.Linear(8, 8)), DATA, "have no layer of the same name"),
    "a layer runs more often": (lambda: chain(Twice), DATA, "layer 'first' ran 1 times in the reference and 2 times"),
    "not finite": (nan_weight, DATA, "layer 'second', alone, in batch 0: the artefact gives NaN at position [0, 2]"),
    "a layer of another shape": (lambda: _wider(), DATA, "layer 'third', alone, in batch 0: the artefact's output has"),
    "inputs that do not fit": (chain, [torch.randn(2, 5)], "batch 0 does not run through the reference"),
}


def _wider() -> nn.Module:
    model = chain()
    model.third = nn.Linear(8, 9)
    return model


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_compared_is_refused_with_the_place_and_the_remedy(case: str) -> None:
    make, data, words = REFUSED[case]
    with pytest.raises(ModelError) as caught:
        nc.verify(chain(), make(), data)
    message = str(caught.value)
    assert words in message
    assert any(remedy in message for remedy in ("compare a model with", "nc.compare", "repair that layer", "check the"))


def test_an_infinity_on_one_side_is_refused() -> None:
    model = chain()
    other = chain()
    with torch.no_grad():
        other.first.bias[1] = float("inf")
    with pytest.raises(ModelError, match=r"at position \[0, 1\] the reference gives .* and the artefact inf"):
        nc.verify(model, other, DATA)


def test_hooks_are_taken_off_again_when_something_is_refused() -> None:
    model, other = chain(), nan_weight()
    with pytest.raises(ModelError):
        nc.verify(model, other, DATA)
    assert not any(m._forward_hooks or m._forward_pre_hooks for side in (model, other) for m in side.modules())


def test_data_without_a_batch_is_refused() -> None:
    with pytest.raises(DataError, match="holds no batch"):
        nc.verify(chain(), chain(), [])


@pytest.mark.parametrize("tolerance", ["loose", "-3dB", 2.0, -0.1, "nan"])
def test_an_unknown_tolerance_is_refused_with_those_that_are_known(tolerance: Any) -> None:
    with pytest.raises(FormatError, match="give 'exact', a least ratio of signal to noise such as '40dB'"):
        nc.verify(chain(), chain(), DATA, tolerance=tolerance)


def test_unknown_kernels_are_refused_with_those_that_run_here() -> None:
    with pytest.raises(KernelError, match="cannot run on 'gpu' kernels: there is no such tier; choose from reference"):
        nc.verify(chain(), chain(), DATA, kernels=("gpu", None))


def test_layers_that_only_one_model_has_are_noted() -> None:
    model = chain()
    longer = chain()
    longer.extra = nn.Linear(8, 8)
    parity = nc.verify(model, longer, DATA)
    assert parity.ok and "only the artefact has extra: not compared by themselves" in parity.notes


def test_a_compiled_model_is_compared_by_the_layers_it_was_made_from() -> None:
    parity = nc.verify(chain(), torch.compile(chain()), DATA)
    assert parity.equal and any("is compiled: its layers were run eagerly" in note for note in parity.notes)


def test_an_exported_program_has_no_layers_to_compare() -> None:
    exported = torch.export.export(chain(), (DATA[0],)).module()
    with pytest.raises(ModelError, match=r"common layers ran: .* or compare outputs by nc.compare"):
        nc.verify(exported, chain(), DATA)


def test_layers_that_get_nothing_are_equal() -> None:
    model = nn.Sequential(nn.Linear(8, 8)).eval()
    assert nc.verify(model, model, lambda module: module(torch.empty(0, 8))).equal
