"""Networks made of chains of convolutions: the same answers as module by module, whatever the model looks like."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import narrowcast as nc
from narrowcast.core import sqnr_db
from narrowcast.nn import QuantizedConv
from narrowcast.nn.integer_graph import graph_of, unfuse_

STATIC = {"rule": [{"weight": "int8/channel", "input": "uint8/channel static:minmax"}]}


class Everything(nn.Module):
    """Residuals, a concatenation, pools, padding, a subsampled shortcut, hard-swish, ReLU6, depthwise and groups."""

    def __init__(self) -> None:
        super().__init__()
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))
        self.stem = nn.Conv2d(3, 13, 3, stride=2)
        self.norm = nn.BatchNorm2d(13)
        self.depthwise = nn.Conv2d(13, 13, 3, padding=1, groups=13)
        self.left, self.right = nn.Conv2d(13, 7, 1), nn.Conv2d(13, 11, 3, padding=1)
        self.down = nn.Conv2d(18, 36, 3, stride=2, padding=1, groups=2)
        self.wide = nn.Conv2d(36, 36, 5, padding=4, dilation=2)
        self.pool = nn.MaxPool2d(3, 2, 1, ceil_mode=True)
        self.drop = nn.Dropout(0.1)
        self.last = nn.Conv2d(36, 20, 1)
        self.head = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.stem(self.pad(x))))
        x = x + F.hardswish(self.depthwise(x))
        x = torch.cat([F.relu(self.left(x)), F.relu(self.right(x))], dim=1)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 9, 9))
        x = F.relu(self.down(x) + short)
        x = self.drop(self.pool(self.wide(x)))
        return self.head(self.last(x).relu().mean((2, 3)))


class SharedConv(nn.Module):
    """One convolution called on two images: both must travel in its codes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.last(self.shared(self.shared(x)))


class FromOutside(nn.Module):
    """Adds an image that no convolution reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()).relu() + other)


class Gate(nn.Module):
    """Squeeze and excite: an operation that no network has, in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x).relu()).relu()
        gate = torch.sigmoid(self.excite(self.squeeze(F.adaptive_avg_pool2d(x, 1)).relu()))
        return self.last(self.project(x * gate).relu())


class AddsItsInput(nn.Module):
    """A residual block on the model's own input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.second(self.first(x).relu()).relu()) + x


class Branches(nn.Module):
    """Not traceable as a whole; its body is."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if float(x.detach().abs().sum()) >= 0 else x


def images(batch: int = 4, size: int = 21) -> Tensor:
    return torch.randn(batch, 3, size, size + 4, generator=torch.Generator().manual_seed(3))


def quantized(model: nn.Module, **recipe: object) -> nc.Quantized:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean), nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return nc.quantize(model.eval(), {**STATIC, **recipe}, [images(16)], progress=False)


@pytest.mark.parametrize("kind", [Everything, SharedConv, Gate])
def test_a_network_answers_what_its_modules_answer_one_by_one(kind: type[nn.Module]) -> None:
    model = kind()
    result = quantized(model)
    graph = graph_of(result.model)
    assert graph is not None
    x = images()
    with torch.no_grad():
        fused = result.model(x)
        expected = model(x)
        unfuse_(result.model)
        one_by_one = result.model(x)
    assert sqnr_db(one_by_one, fused) > 30
    assert sqnr_db(expected, fused) > sqnr_db(expected, one_by_one) - 1


def test_every_convolution_of_a_plain_network_is_fused_and_the_report_says_so() -> None:
    result = quantized(Everything())
    graph = graph_of(result.model)
    assert graph is not None
    assert (graph.networks, len(graph.fused), graph.left_out) == (1, 7, {})
    kernels = {row.layer: row.kernel for row in result.report.layers}
    assert all(kernels[path].startswith("conv_network_int8") for path in graph.fused)
    assert any("7 convolutions run as 1 network" in note for note in result.report.notes)


def test_an_operation_that_cannot_take_part_is_named_with_the_reason() -> None:
    torch.manual_seed(0)
    pairs = [(images(), torch.randn(4, 8, 19, 23))]
    result = nc.quantize(FromOutside().eval(), STATIC, pairs, progress=False)
    graph = graph_of(result.model)
    assert graph is not None
    assert any("add" in note and "comes from outside and has no range" in note for note in result.report.notes)
    with torch.no_grad():
        fused = result.model(*pairs[0])
        unfuse_(result.model)
        assert sqnr_db(result.model(*pairs[0]), fused) > 30


class Joined(nn.Module):
    """What it returns is a concatenation, which no single step writes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return torch.cat([self.left(x), self.right(x)], dim=1)


def test_a_network_may_return_a_concatenation() -> None:
    result = quantized(Joined())
    graph = graph_of(result.model)
    assert graph is not None and set(graph.fused) == {"stem", "left", "right"}
    with torch.no_grad():
        fused = result.model(images())
        unfuse_(result.model)
        assert sqnr_db(result.model(images()), fused) > 60
    assert torch.export.export(quantized(Joined()).model, (images(),)).module()(images()).shape == fused.shape


FOUR_BITS = [
    {"layers": "stem", "weight": "int8/channel", "input": "uint8/tensor static:minmax"},
    {"type": "Conv2d", "weight": "int4/channel", "input": "uint4/tensor static:minmax", "method": "rtn"},
    {"weight": "int4/channel"},
]


def test_codes_of_four_bits_travel_in_networks_as_they_do_between_modules() -> None:
    result = quantized(Everything(), rule=FOUR_BITS)
    graph = graph_of(result.model)
    assert graph is not None and (len(graph.fused), graph.left_out) == (7, {})
    with torch.no_grad():
        fused = result.model(3 * images())  # beyond what calibration saw: both clip
        unfuse_(result.model)
        assert sqnr_db(result.model(3 * images()), fused) > 20


@pytest.mark.parametrize("kind", [SharedConv, Gate])
def test_the_input_of_a_network_may_have_four_bits(kind: type[nn.Module]) -> None:
    result = quantized(kind(), rule=[{"weight": "int8/channel", "input": "uint4/tensor static:minmax"}])
    graph = graph_of(result.model)
    assert graph is not None and "first" in graph.fused
    with torch.no_grad():
        fused = result.model(3 * images())
        unfuse_(result.model)
        assert sqnr_db(result.model(3 * images()), fused) > 20


def test_an_input_that_is_added_too_is_not_rounded_to_four_bits() -> None:
    model = nn.Sequential(AddsItsInput(), nn.AvgPool2d(2)).eval()
    result = quantized(model, rule=[{"weight": "int8/channel", "input": "uint4/tensor static:minmax"}])
    assert any("in fewer than 8 bits and as floats" in note for note in result.report.notes)


def test_readers_of_one_image_that_want_other_formats_do_not_share_its_codes() -> None:
    rules = [{"layers": "left", "weight": "int8/channel", "input": "uint8/tensor static:minmax"}, *FOUR_BITS]
    result = quantized(Everything(), rule=rules, fuse=False)
    scales = [getattr(result.model, name).input_scale for name in ("left", "right")]
    torch.testing.assert_close(scales[1], scales[0] * (255 / 15))


def test_an_operation_that_networks_lack_splits_them() -> None:
    result = quantized(Gate())
    graph = graph_of(result.model)
    assert graph is not None
    assert graph.networks >= 2


def test_parts_of_a_model_that_is_not_traceable_are_fused() -> None:
    result = quantized(Branches())
    assert graph_of(result.model) is None
    assert graph_of(result.model.body) is not None  # type: ignore[arg-type]
    assert any("no traceable forward" in note for note in result.report.notes)


def test_a_recipe_can_refuse_fusing() -> None:
    result = quantized(Everything(), fuse=False)
    assert graph_of(result.model) is None


def test_a_watched_convolution_stays_a_module_of_its_own() -> None:
    model, seen = Everything(), []
    model.left.register_forward_hook(lambda module, args, output: seen.append(output))
    result = quantized(model)
    seen.clear()
    result.model(images())
    assert len(seen) == 1


def test_the_fused_model_is_still_an_instance_of_its_class_with_its_state_dict() -> None:
    fused, plain = quantized(Everything()), quantized(Everything(), fuse=False)
    assert isinstance(fused.model, Everything)
    assert fused.model.state_dict().keys() == plain.model.state_dict().keys()
    assert isinstance(fused.model.left, QuantizedConv)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "checkpoint"])
def test_copies_and_checkpoints_answer_with_the_same_bits(how: str, tmp_path: Path) -> None:
    result = quantized(Everything())
    if how == "deepcopy":
        again: nn.Module = copy.deepcopy(result.model)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(result.model))
    else:
        nc.save(result, tmp_path / "model")
        again = nc.load(tmp_path / "model", into=Everything())
        again = nc.load(tmp_path / "model", into=again)
    x = images()
    with torch.no_grad():
        assert torch.equal(again(x), result.model(x))
    assert graph_of(again) is not None
    assert graph_of(again) is not graph_of(result.model)


def test_weights_are_held_once() -> None:
    result = quantized(Everything())
    storages = {
        m.kernel_panels.untyped_storage().data_ptr() for m in result.model.modules() if isinstance(m, QuantizedConv)
    }
    assert len(storages) == 1


def test_other_calls_than_the_traced_one_run_the_ordinary_forward() -> None:
    result = quantized(Everything())
    x = images()
    with torch.no_grad():
        fused = result.model(x)
        by_name = result.model(x=x)
        assert sqnr_db(fused, by_name) > 30
        assert result.model(x.bfloat16()).dtype == torch.bfloat16
        assert result.model(x[:0]).shape == (0, 5)
        result.model.train()
        assert result.model(x).shape == fused.shape


def test_layout_and_batch_split_do_not_change_the_bits() -> None:
    result = quantized(Everything())
    x = images(5)
    with torch.no_grad():
        whole = result.model(x)
        parts = torch.cat([result.model(x[:2]), result.model(x[2:])])
        assert torch.equal(whole, result.model(x.contiguous(memory_format=torch.channels_last)))
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)  # the head's own sums depend on the batch


@pytest.mark.parametrize("how", ["compile", "export"])
def test_fused_models_compile_and_export_without_a_break(how: str) -> None:
    model = quantized(Everything()).model
    x = images()
    with torch.no_grad():
        expected = model(x)
        if how == "compile":
            got = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
        else:
            got = torch.export.export(model, (x,)).module()(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
