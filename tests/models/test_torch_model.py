"""TorchModel: every weight once, the caller's model untouched, modules exchanged wherever they stand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import narrowcast as nc
from narrowcast.core import QuantSpec, quantize
from narrowcast.errors import DataError, ModelError
from narrowcast.models import Layer, Site, TorchModel
from narrowcast.nn import FLOAT, MultiheadAttention, QuantizedLinear


class Everything(nn.Module):
    """One of each supported type, a tied head, a shared module, a raw parameter, and what is refused."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.position = nn.Parameter(torch.zeros(4, 8))
        self.norm = nn.LayerNorm(8)
        self.shared = nn.Linear(8, 8)
        self.again = self.shared
        self.line = nn.Conv1d(8, 8, 3)
        self.plane = nn.Conv2d(1, 2, 3)
        self.up = nn.ConvTranspose2d(2, 1, 2)
        self.memory = nn.LSTM(8, 4, num_layers=2)
        self.gate = nn.GRU(8, 4, bidirectional=True)
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.table.weight
        self.classes = nn.Linear(8, 20)


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class OnlyRenamed(nn.Linear):
    """Computes what its base computes."""


def layers_of(model: nn.Module) -> dict[str, Layer]:
    layers = TorchModel(model).layers()
    assert len({layer.name for layer in layers}) == len(layers)
    return {layer.name: layer for layer in layers}


def test_every_weight_is_listed_once_by_type() -> None:
    layers = layers_of(Everything())
    types = {name: layer.type for name, layer in layers.items() if not layer.reason}
    assert types == {
        "table": "Embedding", "shared": "Linear", "line": "Conv1d", "plane": "Conv2d", "up": "ConvTranspose2d",
        **{f"memory.weight_{side}_l{layer}": "LSTM" for side in ("ih", "hh") for layer in (0, 1)},
        **{f"gate.weight_{side}_l0{suffix}": "GRU" for side in ("ih", "hh") for suffix in ("", "_reverse")},
        **{f"attention.{part}_proj": "Linear" for part in ("q", "k", "v", "out")}, "classes": "Linear",
    }  # fmt: skip


def test_what_no_layer_owns_is_listed_with_a_reason() -> None:
    layers = layers_of(Everything())
    kept = {name: layer for name, layer in layers.items() if layer.reason}
    assert set(kept) == {"scale", "position", "norm.weight", "norm.bias"}
    assert all(layer.type == "Parameter" for layer in kept.values())
    assert "normalization" in kept["norm.weight"].reason
    assert "not the weight of a supported layer type" in kept["position"].reason
    assert kept["position"].shape == (4, 8)


def test_matrices_have_the_shape_out_by_in_times_kernel() -> None:
    layers = layers_of(Everything())
    shapes = {
        name: layers[name].shape for name in ("line", "plane", "up", "memory.weight_ih_l0", "attention.q_proj", "table")
    }
    assert shapes == {
        "line": (8, 24), "plane": (2, 9), "up": (1, 8), "memory.weight_ih_l0": (16, 8), "attention.q_proj": (8, 8),
        "table": (20, 8),
    }  # fmt: skip
    adapter = TorchModel(Everything())
    for layer in adapter.layers():
        if layer.type != "Parameter":
            assert tuple(adapter.weight(layer).shape) == layer.shape
            assert layer.bytes == 4 * layer.parameters


def test_tied_weights_are_one_layer_with_all_their_sites() -> None:
    table = layers_of(Everything())["table"]
    assert table.sites == (Site("table", "weight", "Embedding"), Site("head", "weight", "Linear"))
    assert table.types == {"Embedding", "Linear"}
    assert table.role == "tied"


def test_a_shared_module_is_one_layer() -> None:
    layers = layers_of(Everything())
    assert "again" not in layers and len(layers["shared"].sites) == 1


def test_a_layer_as_wide_as_the_vocabulary_is_the_head() -> None:
    layers = layers_of(Everything())
    assert layers["classes"].role == "head"
    assert layers["shared"].role == ""


def test_a_subclass_with_a_forward_of_its_own_is_refused() -> None:
    layers = layers_of(nn.Sequential(OwnForward(4, 4), OnlyRenamed(4, 4)))
    assert "OwnForward has a forward of its own, so it is not the Linear" in layers["0.weight"].reason
    assert layers["1"].type == "Linear" and not layers["1"].reason


def test_a_parametrized_module_is_refused() -> None:
    layers = layers_of(nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4)))
    refused = [layer for layer in layers.values() if layer.reason]
    assert refused and all(layer.type == "Parameter" for layer in refused)
    assert any("parametriz" in layer.reason for layer in refused)
    assert not layers["1"].reason


@pytest.mark.parametrize(("module", "reason"), [
    (nn.Embedding(5, 4, max_norm=1.0), "max_norm"),
    (nn.LSTM(4, 4, proj_size=2), "proj_size"),
    (nn.ConvTranspose2d(2, 2, 2, padding=3), "padding larger than the kernel's reach"),
    (nn.Embedding(0, 4), "the weight is empty: 0x4"),
    (nn.EmbeddingBag(5, 4), "EmbeddingBag.weight is not the weight of a supported layer type"),
    (nn.Conv3d(2, 2, 2), "Conv3d.weight is not the weight of a supported layer type"),
    (nn.Bilinear(2, 2, 2), "Bilinear.weight is not the weight of a supported layer type"),
    (nn.RNN(2, 2), "RNN.weight_ih_l0 is not the weight of a supported layer type"),
])  # fmt: skip
def test_what_cannot_be_quantized_says_why(module: nn.Module, reason: str) -> None:
    assert any(reason in layer.reason for layer in TorchModel(nn.Sequential(module)).layers())


def test_every_parameter_is_a_layer_or_a_bias_of_one() -> None:
    model = Everything()
    adapter = TorchModel(model)
    listed = sum(layer.parameters for layer in adapter.layers())
    biases = sum(
        p.numel() for n, p in adapter.model.named_parameters()
        if "bias" in n.rpartition(".")[2] and not n.startswith("norm")
    )  # fmt: skip
    assert listed + biases == sum(p.numel() for p in model.parameters())


def fingerprint(model: nn.Module) -> dict[str, Any]:
    return {
        "types": [(name, type(module), id(module), module.training) for name, module in model.named_modules()],
        "tensors": [(name, id(t), t.data_ptr(), t._version, t.requires_grad) for name, t in
                    [*model.named_parameters(), *model.named_buffers()]],
        "values": {name: t.clone() for name, t in model.state_dict().items()},
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
    }  # fmt: skip


def assert_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = fingerprint(model)
    for key in ("types", "tensors", "hooks"):
        assert after[key] == before[key]
    assert all(torch.equal(before["values"][name], value) for name, value in after["values"].items())


@pytest.mark.parametrize("recipe", ["weight-int8", "dynamic-int8", "static-int8", "bf16"])
def test_the_callers_model_is_not_touched(recipe: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)
    )
    model[0].register_forward_hook(lambda module, given, output: None)
    model.train()
    model[4].eval()  # modes that differ stay different
    before = fingerprint(model)
    quantized = nc.quantize(model, recipe, torch.randn(40, 3, 8, 8), progress=False)
    assert_untouched(model, before)
    assert not quantized.model.training
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    state = quantized.model.state_dict().values()
    assert not own & {t.untyped_storage().data_ptr() for t in state if t.numel()}
    assert any("training mode" in note for note in quantized.report.notes)


def test_attention_of_the_caller_is_not_touched_either() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    before = fingerprint(model)
    quantized = nc.quantize(model, "dynamic-int8", progress=False)
    assert_untouched(model, before)
    with torch.no_grad():  # and nothing that is left in float is shared
        for tensor in quantized.model.state_dict().values():
            tensor.zero_()
    assert_untouched(model, before)


def test_inplace_changes_the_model_itself() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    quantized = nc.quantize(model, "weight-int8", inplace=True, progress=False)
    assert quantized.model is model
    assert all(isinstance(layer, QuantizedLinear) for layer in model)


def test_a_model_that_is_one_layer_is_replaced() -> None:
    for inplace in (False, True):
        model = nn.Linear(8, 4)
        quantized = nc.quantize(model, "dynamic-int8", inplace=inplace, progress=False)
        assert isinstance(quantized.model, QuantizedLinear)
        assert quantized.report.layers[0].layer == "Linear"


def test_attention_that_is_the_model_itself_is_taken_apart() -> None:
    assert isinstance(TorchModel(nn.MultiheadAttention(8, 2)).model, MultiheadAttention)


def test_a_module_is_installed_wherever_it_stands() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model.append(model[0])
    adapter = TorchModel(model)
    layer = adapter.layers()[0]
    record = quantize(adapter.weight(layer), QuantSpec.parse("int8"))
    adapter.install(layer.name, adapter.build(layer.name, {"weight": record}, FLOAT))
    assert adapter.model[0] is adapter.model[2] and isinstance(adapter.model[0], QuantizedLinear)
    assert isinstance(model[0], nn.Linear)


def test_tied_weights_become_modules_that_hold_the_same_codes() -> None:
    quantized = nc.quantize(Everything().eval(), "weight-int8", progress=False).model
    assert quantized.table.quantized_weights()["weight"] == quantized.head.quantized_weights()["weight"]


@pytest.mark.parametrize("thing", [None, "model.pt", 7, {"weight": torch.ones(2)}])
def test_what_is_no_module_is_refused(thing: Any) -> None:
    with pytest.raises(ModelError, match=r"expected a torch.nn.Module, got"):
        TorchModel(thing)


def test_a_quantized_model_is_refused() -> None:
    model = nc.quantize(nn.Sequential(nn.Linear(4, 4)), "weight-int8", progress=False).model
    with pytest.raises(ModelError, match="quantized already"):
        TorchModel(model)


def test_a_model_that_cannot_be_copied_says_so_and_works_in_place() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model.file = open  # a function is copied by reference
    model.steps = (step for step in range(3))
    with pytest.raises(ModelError, match=r"Sequential cannot be copied .* inplace=True"):
        TorchModel(model)
    assert nc.quantize(model, "weight-int8", inplace=True, progress=False).report.layers


def test_observing_counts_calls_and_positions_and_leaves_no_hook() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    adapter = TorchModel(model)
    seen: list[Tensor] = []
    data = [torch.ones(3, 4), torch.ones(2, 5, 4)]
    observation = adapter.observe(data, {"0": [seen.append]})
    assert observation.calls == {"0": 2, "2": 2} and observation.batches == 2
    assert observation.positions == {"0": 13, "2": 13}
    assert [tuple(x.shape) for x in seen] == [(3, 4), (2, 5, 4)]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in adapter.model.modules())


def test_an_error_in_the_model_names_the_batch_and_leaves_no_hook() -> None:
    adapter = TorchModel(nn.Sequential(nn.Linear(4, 6)))
    with pytest.raises(DataError, match="calibration batch 1 does not run through Sequential: RuntimeError"):
        adapter.observe([torch.ones(3, 4), torch.ones(3, 5)], {})
    assert not adapter.model[0]._forward_hooks


def test_hugging_faces_transposed_linear_is_a_linear() -> None:
    utilities = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    module = utilities.Conv1D(6, 40)
    layers = layers_of(nn.Sequential(module))
    assert layers["0"].type == "Conv1D" and layers["0"].shape == (6, 40)
    x = torch.randn(3, 40)
    for recipe in ("weight-int8", "dynamic-int8", "dynamic-int4"):
        model = nc.quantize(nn.Sequential(module), recipe, progress=False).model
        assert isinstance(model[0], QuantizedLinear)
        torch.testing.assert_close(model(x), module(x).detach(), atol=0.05, rtol=0)


def test_a_deep_copy_of_a_quantized_model_is_a_model_of_its_own() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 4)).eval()
    x = torch.randn(4, 3, 8, 8)
    quantized = nc.quantize(model, "static-int8", x, progress=False).model
    copied = copy.deepcopy(quantized)
    expected = quantized(x)
    assert torch.equal(copied(x), expected)
    for tensor in [*copied.buffers(), *copied.parameters()]:
        tensor.detach().zero_()
    assert torch.equal(quantized(x), expected)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("prepare", [
    nn.utils.weight_norm, nn.utils.spectral_norm, lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
], ids=["weight norm", "spectral norm", "pruning"])  # fmt: skip
def test_a_weight_that_a_hook_computes_is_listed_and_refused(prepare: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    prepare(model[0])
    report = nc.quantize(model, "weight-int8", inplace=True, progress=False).report
    kept = [row for row in report.layers if row.outcome == "kept"]
    assert any(row.layer.startswith("0.weight_") for row in kept)
    assert all("computed at each call" in row.reason for row in kept)
    assert report.layers[-1].layer == "1" and report.layers[-1].outcome == "quantized"


def test_a_module_whose_own_forward_was_exchanged_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].forward = lambda x: x  # type: ignore[method-assign]
    layers = layers_of(model)
    assert "has a forward of its own" in layers["0.weight"].reason and not layers["1"].reason


def test_the_projection_of_an_attention_of_its_own_kind_is_refused() -> None:
    class SelfAttention(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x, x, x)[0]

    layers = layers_of(nn.Sequential(SelfAttention(8, 2)))
    assert "without calling it" in layers["0.out_proj.weight"].reason
    assert all(layer.reason for layer in layers.values())


def test_tied_weights_that_are_read_in_different_layouts_are_refused() -> None:
    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Conv2d(8, 8, 3, bias=False), nn.ConvTranspose2d(8, 8, 3, bias=False)
            self.up.weight = self.down.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.up(self.down(x))

    model = Autoencoder().eval()
    layer = layers_of(model)["down"]
    assert layer.reason == "tied to up: Conv2d and ConvTranspose2d read it in different layouts"
    x = torch.randn(40, 8, 6, 6)
    with torch.no_grad():
        assert torch.equal(nc.quantize(model, "static-int8", x, progress=False).model(x), model(x))


def test_parameters_that_are_not_initialized_are_named() -> None:
    with pytest.raises(ModelError, match=r"parameter '0.weight' is not initialized; run the model once first"):
        TorchModel(nn.Sequential(nn.LazyLinear(4)))


def test_hooks_of_a_layer_stay_with_what_takes_its_place() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    seen: list[str] = []
    model[0].register_forward_hook(lambda module, given, output: seen.append(type(module).__name__))
    model[0].register_forward_pre_hook(lambda module, given, named: seen.append("before"), with_kwargs=True)
    quantized = nc.quantize(model, "dynamic-int8", progress=False).model
    quantized(torch.ones(2, 4))
    assert seen == ["before", "QuantizedLinear"]
    assert len(model[0]._forward_hooks) == 1
