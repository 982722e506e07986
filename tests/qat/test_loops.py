"""What training loops do to a model: autocast, checkpointing, compiling, averaging, freezing, groups, data parallel."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from tests.pipeline.models import example
from tests.qat.prepared import CHANNELS, STATIC, answer, prepared, recipe, train_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import narrowcast as nc
from narrowcast.nn.trained_conv import TrainedConv
from narrowcast.nn.trained_ranges import Range, WeightRange

CNN = ("cnn", "int8/channel", CHANNELS)


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    run().float().square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def steady(name: str, weight: str, given: str | None) -> tuple[nn.Module, Tensor]:
    """A model whose BatchNorms are frozen, so that two passes see the same."""
    model, x = prepared(name, weight, given)
    nc.qat.FreezeSchedule(batchnorm=0).apply(model, 0)
    return model, x


def test_checkpointing_gives_the_same_gradients() -> None:
    model, x = steady(*CNN)
    plain = gradients(model, lambda: model(x))
    again = gradients(model, lambda: checkpoint(model, x, use_reentrant=False))
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("case", [CNN, ("transformer", "int4/group32/asym", "int8/token")])
def test_autocast_computes_in_bfloat16_and_keeps_gradients_near(case: tuple[str, str, str]) -> None:
    model, x = steady(*case)
    plain = gradients(model, lambda: model(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    cast = gradients(model, lambda: out)
    assert plain.keys() == cast.keys()
    for name in plain:
        if plain[name].numel() > 64 and plain[name].norm() > 1e-6:
            assert torch.cosine_similarity(plain[name].flatten(), cast[name].flatten(), 0) > 0.95, name
            assert cast[name].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does
@pytest.mark.parametrize("case", [CNN, ("tied", "int4/group32", "int8/token")])
def test_the_compiler_takes_a_training_step_whole(case: tuple[str, str, str]) -> None:
    model, x = steady(*case)
    plain = gradients(model, lambda: model(x))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    again = gradients(model, lambda: compiled(x))
    for name in plain:
        torch.testing.assert_close(again[name], plain[name], rtol=1e-3, atol=1e-5)
    assert torch.equal(answer(nc.qat.convert(compiled).model, x), answer(model, x))
    torch.compiler.reset()


def test_an_averaged_copy_answers_with_its_own_weights_however_they_are_written() -> None:
    model, x = steady(*CNN)
    average = copy.deepcopy(model).eval()
    before = answer(average, x)
    train_(model, x, steps=4)
    for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
        mine.data.lerp_(theirs.data, 0.5)  # through .data no version is counted
    after = answer(average, x)
    assert not torch.equal(before, after)
    assert torch.equal(answer(nc.qat.convert(average).model, x), after)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert torch.equal(answer(nc.qat.convert(averaged).model, x), answer(model, x))


def test_a_prepared_model_and_its_state_are_pickled() -> None:
    model, x = steady(*CNN)
    train_(model, x, steps=2)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True).keys() == model.state_dict().keys()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(answer(torch.load(file, weights_only=False), x), answer(model, x))


def test_statistics_follow_batches_until_they_are_frozen() -> None:
    model, x = prepared(*CNN)
    stem = model.stem[0]
    assert isinstance(stem, TrainedConv)
    start = stem.norm.running_mean.clone()
    schedule = nc.qat.FreezeSchedule(batchnorm=2, ranges=3)
    schedule.apply(model, 0)
    model.train()(x + 1.0)
    assert not torch.equal(stem.norm.running_mean, start)
    schedule.apply(model, 2)
    frozen = stem.norm.running_mean.clone()
    model.train()(x - 1.0)
    assert torch.equal(stem.norm.running_mean, frozen)
    schedule.apply(model, 1)
    model(x - 1.0)
    assert not torch.equal(stem.norm.running_mean, frozen), "an earlier count lets it go on"


def test_live_statistics_train_as_a_batchnorm_behind_the_convolution_does() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8) + 0.5
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    model[1].weight.data.uniform_(-1, 2)
    model[1].running_var.uniform_(0.1, 3)
    made = nc.qat.prepare(model.eval(), {"rule": [{"weight": "int8/channel"}]}, [x], progress=False)
    torch.testing.assert_close(made.train()(x), model.train()(x), rtol=0.02, atol=0.05)
    made[0].norm.load_state_dict(model[1].state_dict())  # running statistics of the same batch
    torch.testing.assert_close(made.eval()(x), model.eval()(x), rtol=0.02, atol=0.05)


@pytest.mark.parametrize("train", ["lsq", "lsq+", "ste"])
def test_frozen_ranges_stay_whatever_the_optimizer_does_and_through_a_state_dict(train: str) -> None:
    model, x = prepared("cnn", "int4/channel", STATIC, train=train)
    train_(model, x, steps=3)
    nc.qat.FreezeSchedule(batchnorm=0, ranges=0).apply(model, 0)

    def scales(of: nn.Module) -> dict[str, Tensor]:
        twins = {path: m for path, m in of.named_modules() if isinstance(m, TrainedConv)}
        return {f"{path} weight": twin.records()["weight"].scale for path, twin in twins.items()} | {
            f"{path} input": twin.activation().scale for path, twin in twins.items()
        }

    for parameter in [p for name, p in model.named_parameters() if "norm" in name]:
        parameter.requires_grad_(False)  # scales of rows follow gamma
    held = scales(model)
    train_(model, x, steps=3)
    assert all(torch.equal(held[name], scale) for name, scale in scales(model).items())
    parts = [part for part in model.modules() if isinstance(part, Range) and part.factor is not None]
    assert all(part.factor.grad is not None and not part.factor.grad.any() for part in parts), "zero, not missing"
    again, _ = prepared("cnn", "int4/channel", STATIC, train=train)
    again.load_state_dict(model.state_dict())
    for parameter in [p for name, p in again.named_parameters() if "norm" in name]:
        parameter.requires_grad_(False)
    train_(again, x, steps=2)
    assert train == "ste" or all(torch.equal(held[name], scale) for name, scale in scales(again).items())


def test_scales_of_rows_follow_the_batchnorm_behind() -> None:
    model, _ = prepared(*CNN)
    stem = model.stem[0]
    before = stem.records()["weight"]
    stem.norm.running_var.mul_(9.0)
    stem.norm.eps = 0.0
    after = stem.records()["weight"]
    assert torch.equal(before.codes, after.codes)
    torch.testing.assert_close(after.scale, before.scale / 3, rtol=1e-4, atol=0)


def test_weights_that_are_followed_keep_their_largest_code() -> None:
    model, _ = prepared("tied", "int4/channel", None, train="ste")
    twin = model.up
    part = twin.weight_range()
    assert isinstance(part, WeightRange) and part.factor is None
    before = part.record(twin.matrix("weight")).scale
    twin.weight.data.mul_(2.0)
    torch.testing.assert_close(part.record(twin.matrix("weight")).scale, before * 2)


def test_ranges_have_a_group_without_decay_and_with_a_rate_of_their_own() -> None:
    model, _ = prepared(*CNN)
    groups = {g["name"]: g for g in nc.qat.parameter_groups(model, lr=0.1, weight_decay=1e-4, range_lr=0.01)}
    assert [groups[name]["lr"] for name in ("weights", "vectors", "ranges")] == [0.1, 0.1, 0.01]
    assert [groups[name]["weight_decay"] for name in ("weights", "vectors", "ranges")] == [1e-4, 0.0, 0.0]
    listed = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(listed) == sorted(id(p) for p in model.parameters())
    torch.optim.SGD(list(groups.values()), momentum=0.9)


def test_convolutions_that_read_one_image_share_its_range() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3, padding=1)
            self.joined, self.alone = nn.Conv2d(12, 4, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x).relu()
            left = self.left(x)
            return self.joined(torch.cat([left, self.right(x)], 1)) + self.alone(left)

    torch.manual_seed(0)
    x = torch.randn(16, 3, 9, 9)
    rules = {"rule": [{"weight": "int8/channel", "input": CHANNELS}]}
    model = nc.qat.prepare(Fork(), rules, x.split(8), progress=False)
    assert model.left.input_range is model.right.input_range
    assert model.joined.input_range.factor is model.alone.input_range.factor, "one reads what is a part of the other's"
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
    one, other = model.left.activation(), model.right.activation()
    assert torch.equal(one.scale, other.scale) and not torch.equal(one.scale, model.left.input_range.start_scale)
    converted = nc.qat.convert(model)
    assert any("5 convolutions run as 1 network" in note for note in converted.report.notes)


def test_distillation_is_zero_between_equals_and_passes_gradients_to_the_student_alone() -> None:
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    states = [torch.randn(3, 4, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    same = nc.qat.distill_loss(logits, logits, temperature=2.0, hidden=(states, states))
    assert float(same) == pytest.approx(0.0, abs=1e-6)
    student, teacher = logits.clone().requires_grad_(), (logits + 1.0).flip(1).requires_grad_()
    loss = nc.qat.distill_loss(student, teacher, hidden=([states[0]], [states[1]]), hidden_weight=0.5)
    loss.backward()
    target = teacher.detach().softmax(-1)
    divergence = (target * (target.log() - logits.log_softmax(-1))).sum(-1).mean()
    relative = (states[0] - states[1]).square().mean() / states[1].square().mean()
    assert float(loss.detach()) == pytest.approx(float(divergence + 0.5 * relative), rel=1e-5)
    torch.testing.assert_close(student.grad, (logits.softmax(-1) - target) / 3)
    assert teacher.grad is None


def test_health_sees_flips_oscillation_clipping_and_unused_codes() -> None:
    model, x = steady("cnn", "int4/channel", STATIC)
    model.train()(x)
    first = {row.layer: row for row in nc.qat.report(model).layers}
    assert all(row.flipped is None and row.passes == 1 for row in first.values())
    assert all(row.clipped is not None and row.clipped < 0.05 for row in first.values())
    pointwise = model.pointwise
    start = pointwise.weight.detach().clone()
    shares = []
    for step in range(6):  # to and fro
        pointwise.weight.data = start * (1.0 if step % 2 else -1.0)
        model(x * 10)
        shares.append(next(row for row in nc.qat.report(model).layers if row.layer == "pointwise"))
    assert shares[-1].flipped > 0.5 and shares[-1].oscillating > 0.5
    assert shares[0].oscillating is None
    stem = next(row for row in nc.qat.report(model).layers if row.layer == "stem.0")
    assert stem.flipped == 0.0
    assert shares[-1].clipped is not None and shares[-1].clipped > 0.05
    assert "pointwise" in str(nc.qat.report(model)) and nc.qat.report(model).to_dict()["layers"]


def test_looking_changes_nothing() -> None:
    model, x = prepared("cnn", "int4/channel", STATIC)
    train_(model, x, steps=2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    nc.qat.report(model)
    nc.qat.report(model)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_recipes_train_ranges_in_every_way_of_the_table() -> None:
    for train in ("lsq", "lsq+", "ste", "pact"):
        model, x = prepared("tied", "int4/channel", STATIC, train=train)
        losses = train_(model, x, steps=6)
        assert losses[-1] < losses[0], train
    with pytest.raises(nc.RecipeError, match=r"rule 1: train 'sgd' is not known; use 'lsq'"):
        nc.plan(example("tied")[0], recipe("tied", "int4/channel", None, train="sgd"))
