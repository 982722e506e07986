"""BatchNorm is folded where it is established which convolution feeds it, and only there; the reason is told."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrowcast as nc
from narrowcast.core import sqnr_db
from narrowcast.models import FoldReport, find_pairs, fold_
from narrowcast.nn import FoldedBatchNorm


def settle(model: nn.Module) -> nn.Module:
    """Statistics and parameters that are not the ones a BatchNorm starts with."""
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.copy_(torch.randn_like(module.running_mean))
            module.running_var.copy_(torch.rand_like(module.running_var) + 0.2)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.weight is not None:
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias)
    return model.eval().requires_grad_(False)


class Block(nn.Module):
    """A residual block; `forward_of` says what it computes."""

    def __init__(self, compute: Callable[[Any, Tensor], Any], *, out: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, out, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(4)
        self.compute = compute

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


def residual(block: Any, x: Tensor) -> Tensor:
    y = block.bn1(block.conv1(x)).relu()
    return (block.bn2(block.conv2(y)) + x).relu()


def untraceable(block: Any, x: Tensor) -> Tensor:
    if float(x.sum()) > 1e9:  # a symbolic trace cannot decide this
        return x
    return residual(block, x)


def used_by_another(block: Any, x: Tensor) -> Tensor:
    y = block.conv1(x)
    return block.bn1(y) + y


def passed_through_another(block: Any, x: Tensor) -> Tensor:
    return block.bn1(block.conv1(x).relu())


def changed_in_place(block: Any, x: Tensor) -> Tensor:
    y = block.conv1(x)
    y += 1
    return block.bn1(y)


def returned_too(block: Any, x: Tensor) -> Any:
    y = block.conv1(x)
    return block.bn1(y), y


def returned_in_a_dictionary(block: Any, x: Tensor) -> Any:
    y = block.conv1(x)
    return {"logits": block.bn1(y), "features": [y]}


def two_norms(block: Any, x: Tensor) -> Tensor:
    y = block.conv1(x)
    return block.bn1(y) + block.bn2(y)


def convolution_called_twice(block: Any, x: Tensor) -> Tensor:
    return block.conv1(block.bn1(block.conv1(x)))


def norm_called_twice(block: Any, x: Tensor) -> Tensor:
    return block.bn1(block.conv2(block.bn1(block.conv1(x))))


def norm_also_of_the_input(block: Any, x: Tensor) -> Tensor:
    return block.bn1(block.conv1(x)) + block.bn1(x)


def asked_for_its_shape(block: Any, x: Tensor) -> Tensor:
    y = block.conv1(x)
    return block.bn1(y).reshape(y.shape[0], y.size(1), -1)


def only_a_slice(block: Any, x: Tensor) -> Tensor:
    return block.bn1(block.conv1(x)[:, :, 1:])


EXAMPLE = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
FOLDED = {residual: {"bn1": "conv1", "bn2": "conv2"}, untraceable: {"bn1": "conv1", "bn2": "conv2"},
          asked_for_its_shape: {"bn1": "conv1"}}  # fmt: skip
NOT_FOLDED = (
    used_by_another, passed_through_another, changed_in_place, returned_too, returned_in_a_dictionary, two_norms,
    convolution_called_twice, norm_called_twice, norm_also_of_the_input, only_a_slice,
)  # fmt: skip


def pairs(model: nn.Module, x: Tensor | None = EXAMPLE) -> FoldReport:
    report = find_pairs(model, None if x is None else lambda: model(x))
    norms = [p for p, m in model.named_modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert sorted([*report.folded, *report.kept]) == sorted(norms)  # every BatchNorm is accounted for
    assert set(report.evidence) == set(report.folded)
    return report


def assert_same_function(model: nn.Module, x: Tensor, report: FoldReport) -> None:
    expected = model(x)
    folded = fold_(model, report)
    assert sqnr_db(expected, folded(x)) > 100
    kinds = {path: type(module) for path, module in folded.named_modules()}
    assert all(kinds[path] is FoldedBatchNorm for path in report.folded)
    assert all(kinds[path] is not FoldedBatchNorm for path in report.kept)


@pytest.mark.parametrize("compute", FOLDED)
def test_a_forward_pass_shows_which_convolution_feeds_a_norm(compute: Callable[..., Any]) -> None:
    model = settle(Block(compute))
    report = pairs(model)
    assert report.folded == FOLDED[compute]
    assert set(report.evidence.values()) == {"a forward pass"}
    assert_same_function(model, EXAMPLE, report)


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("compute", NOT_FOLDED)
def test_a_norm_that_is_not_all_that_uses_the_convolution_stays(compute: Callable[..., Any], data: bool) -> None:
    report = pairs(settle(Block(compute)), EXAMPLE if data else None)
    assert not report.folded
    assert all(report.kept.values())


def test_without_data_a_symbolic_trace_finds_the_pairs() -> None:
    model = settle(nn.Sequential(Block(residual), nn.ReLU(), Block(residual)))
    report = pairs(model, None)
    assert report.folded == {f"{block}.bn{i}": f"{block}.conv{i}" for block in (0, 2) for i in (1, 2)}
    assert set(report.evidence.values()) == {"a symbolic trace"}
    assert_same_function(model, EXAMPLE, report)


def test_without_data_the_traceable_blocks_of_an_untraceable_model_are_found() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.traceable = Block(residual)
            self.hidden = Block(untraceable)
            self.tail = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            if float(x.sum()) > 1e9:
                return x
            return self.tail(self.hidden(self.traceable(x)))

    model = settle(Model())
    report = pairs(model, None)
    assert report.folded == {"traceable.bn1": "traceable.conv1", "traceable.bn2": "traceable.conv2", "tail.1": "tail.0"}
    assert all("give data" in reason for reason in report.kept.values())
    assert_same_function(model, EXAMPLE, report)


def test_without_data_neighbours_in_a_sequential_are_a_pair() -> None:
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    model = settle(nn.Sequential(Guarded(inner)))
    assert pairs(model, None).folded == {"0.0.1": "0.0.0"}


SEQUENTIALS: dict[str, tuple[list[nn.Module], Tensor]] = {
    "plain": ([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)], EXAMPLE),
    "with bias, no affine": ([nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False)], EXAMPLE),
    "grouped": ([nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8)], EXAMPLE),
    "1d": ([nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)], EXAMPLE[0]),
    "transposed": ([nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6)], EXAMPLE),
    "transposed, grouped": ([nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, bias=False), nn.BatchNorm2d(6)], EXAMPLE),
}


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("name", SEQUENTIALS)
def test_every_kind_of_convolution_takes_its_norm_in(name: str, data: bool) -> None:
    modules, x = SEQUENTIALS[name]
    x = x if x.dim() == 4 else x.unsqueeze(0).flatten(-2)
    model = settle(nn.Sequential(*modules))
    report = pairs(model, x if data else None)
    assert report.folded == {"1": "0"}
    assert_same_function(settle(nn.Sequential(*modules)), x, report)
    assert model[0].bias is not None


@pytest.mark.parametrize("data", [True, False])
def test_a_norm_without_running_statistics_stays(data: bool) -> None:
    model = settle(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, track_running_stats=False)))
    report = pairs(model, EXAMPLE if data else None)
    assert report.kept == {"1": "it has no running statistics, so it depends on the batch"}


@pytest.mark.parametrize("data", [True, False])
def test_convolutions_that_share_a_weight_keep_their_norms(data: bool) -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model[2].weight = model[0].weight
    report = pairs(settle(model), EXAMPLE if data else None)
    assert report.kept == {"1": "the weight of 0 is used elsewhere too", "3": "the weight of 2 is used elsewhere too"}


@pytest.mark.parametrize("data", [True, False])
def test_a_convolution_of_its_own_kind_keeps_its_norm(data: bool) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    report = pairs(settle(nn.Sequential(Doubled(4, 4, 1), nn.BatchNorm2d(4))), EXAMPLE if data else None)
    assert "Doubled" in report.kept["1"] or "another operation lies between" in report.kept["1"]


def test_norms_after_other_layers_stay() -> None:
    model = settle(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    assert pairs(model, torch.randn(8, 6)).kept == {"1": "the model has no convolution"}


def test_a_shared_norm_module_stays() -> None:
    norm = nn.BatchNorm2d(4)
    model = settle(nn.Sequential(nn.Conv2d(4, 4, 1), norm, nn.Conv2d(4, 4, 1), norm))
    for x in (EXAMPLE, None):
        report = find_pairs(model, None if x is None else lambda: model(EXAMPLE))
        assert not report.folded and report.kept


class Guarded(nn.Sequential):
    """No symbolic trace goes through it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) < 1e9 else -x)


@pytest.mark.parametrize("guarded", [False, True])
@pytest.mark.parametrize("shared", ["norm", "convolution"])
def test_neighbours_of_which_one_stands_twice_are_no_pair(shared: str, guarded: bool) -> None:
    first, second = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
    norms = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    chain = [first, norms[0], second, norms[0]] if shared == "norm" else [first, norms[0], first, norms[1]]
    model = settle((Guarded if guarded else nn.Sequential)(nn.Sequential(*chain)))
    assert not find_pairs(model, None).folded
    assert not find_pairs(model, lambda: model(EXAMPLE)).folded


def test_a_sequential_that_is_only_a_container_is_no_evidence_against_a_trace() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

        def forward(self, x: Tensor) -> Tensor:
            y = self.parts[0](x)
            return self.parts[1](y) + y

    report = pairs(settle(Model()), None)
    assert report.kept == {
        "parts.1": "in the symbolic trace no convolution fed it alone: another operation lies between or uses the same "
        "tensor"
    }


def test_a_pair_that_runs_many_times_is_a_pair() -> None:
    model = settle(Block(residual))

    def run_many() -> None:
        for _ in range(3):
            model(EXAMPLE)

    assert find_pairs(model, run_many).folded == FOLDED[residual]
    shared = settle(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    twice = nn.Sequential(shared, nn.ReLU(), shared)
    report = find_pairs(twice, lambda: twice(EXAMPLE))
    assert report.folded == {"0.1": "0.0"}
    assert_same_function(twice, EXAMPLE, report)


def test_the_pass_keeps_no_output_alive() -> None:
    model = settle(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()))
    outputs: list[Any] = []
    model[0].register_forward_hook(lambda module, given, output: outputs.append(weakref.ref(output)))
    alive = []

    def run_many() -> None:
        for _ in range(3):
            model(EXAMPLE)
            alive.append(sum(output() is not None for output in outputs))

    assert find_pairs(model, run_many).folded
    assert alive[-1] <= 1


def test_finding_changes_nothing_and_leaves_no_hook() -> None:
    model = settle(Block(residual))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pairs(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_folding_leaves_the_tensors_of_the_callers_model_alone() -> None:
    model = settle(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    weight, copied = model[0].weight, model[0].weight.clone()
    fold_(model, pairs(model))
    assert torch.equal(weight, copied)


@pytest.mark.parametrize("recipe", ["weight-int8", "static-int8"])
def test_the_report_says_what_was_folded_and_what_not(recipe: str) -> None:
    model = settle(nn.Sequential(Block(residual), Block(used_by_another)))
    data = torch.randn(40, 4, 6, 6)
    report = nc.quantize(model, recipe, data, progress=False).report
    rows = {row.layer: row for row in report.layers}
    assert rows["0.bn1.weight"].outcome == "folded" and rows["0.bn1.weight"].reason == "folded into 0.conv1"
    assert rows["1.bn1.weight"].outcome == "kept"
    assert any("2 BatchNorms folded" in note and "a forward pass" in note for note in report.notes)
    assert any("1.bn1" in note and "another operation" in note for note in report.notes)


def test_folding_can_be_turned_off() -> None:
    model = settle(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)))
    recipe = {"rule": [{"weight": "int8"}], "fold_batchnorm": False}
    quantized = nc.quantize(model, recipe, progress=False)
    assert isinstance(quantized.model[1], nn.BatchNorm2d)
    assert not any(row.outcome == "folded" for row in quantized.report.layers)
