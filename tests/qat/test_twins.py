"""One layer in training: the codes of its quantized module, gradients as the papers have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import narrowcast as nc
from narrowcast.kernels.reference import quantize_rows, quantize_rows_asymmetric
from narrowcast.nn import trained_inputs
from narrowcast.nn.trained import TrainedModule

INPUTS = ("int8/token", "uint8/token", "uint8/tensor static:minmax", "uint8/channel static:minmax", None)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def twin_of(layer: nn.Module, x: Tensor, weight: str, given: str | None, train: str = "lsq") -> Any:
    rule = {"weight": weight, "train": train, "method": "rtn"} | ({} if given is None else {"input": given})
    made = nc.qat.prepare(nn.Sequential(layer), {"rule": [rule]}, [x], progress=False)
    assert isinstance(made[0], TrainedModule)
    return made[0]


CONVOLUTIONS = {
    "plain": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "strided, grouped": lambda: nn.Conv2d(6, 8, 3, stride=2, groups=2, bias=False),
    "depthwise, dilated": lambda: nn.Conv2d(6, 6, 3, padding=2, dilation=2, groups=6),
    "same, even kernel": lambda: nn.Conv2d(6, 8, 2, padding="same"),
    "reflect": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "transposed": lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1, output_padding=1),
    "one dimension": lambda: nn.Conv1d(6, 8, 5, padding=2),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_convolution_in_training_answers_as_its_quantized_module(name: str, given: str | None) -> None:
    if given == "uint8/token":
        pytest.skip("no kernel convolves inputs with a zero point found at run time")
    torch.manual_seed(0)
    layer = CONVOLUTIONS[name]()
    x = noise(4, 6, 16) if isinstance(layer, nn.Conv1d) else noise(4, 6, 9, 9)
    twin = twin_of(layer, x, "int8/channel", given)
    trained = twin.train()(x)
    torch.testing.assert_close(trained, twin.eval()(x), rtol=1e-4, atol=1e-4)
    twin.train()(x).square().mean().backward()
    assert twin.weight.grad.abs().sum() > 0
    if not isinstance(layer, nn.Conv1d):
        torch.testing.assert_close(twin.train()(x[0]), trained[0], rtol=1e-4, atol=1e-4)


def test_a_transposed_convolution_takes_an_output_size() -> None:
    x = noise(2, 6, 5, 5)
    twin = twin_of(nn.ConvTranspose2d(6, 8, 3, stride=2, padding=1), x, "int8/channel", None)
    got = twin.train()(x, output_size=[10, 10])
    torch.testing.assert_close(got, twin.eval()(x, output_size=[10, 10]), rtol=1e-4, atol=1e-4)


@given(seed=st.integers(0, 1000), size=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]))
def test_codes_of_inputs_are_those_of_the_kernels(seed: int, size: float) -> None:
    x = noise(5, 48, seed=seed)
    x[0] = 0.0
    wide = x * size
    symmetric = twin_of(nn.Linear(48, 4), x, "int8/channel", "int8/token")
    assert torch.equal(symmetric.input_codes(wide), quantize_rows(wide)[0])
    asymmetric = twin_of(nn.Linear(48, 4), x, "int8/channel", "uint8/token")
    assert torch.equal(asymmetric.input_codes(wide), quantize_rows_asymmetric(wide)[0])
    grouped = twin_of(nn.Linear(48, 4), x, "int4/group32", "int8/token")
    parts = [quantize_rows(part)[0] for part in wide.split(32, 1)]
    assert torch.equal(grouped.input_codes(wide), torch.cat(parts, 1))
    static = twin_of(nn.Linear(48, 4), x, "int8/channel", "uint8/channel static:minmax")
    ranges = static.activation()
    inverse, zero = 1.0 / ranges.scale, ranges.zero_point.float()
    assert torch.equal(static.input_codes(wide), ((wide * inverse).round() + zero).clamp(0, 255))


@pytest.mark.parametrize("given", INPUTS)
@pytest.mark.parametrize("weight", ["int8/channel", "int4/channel", "int8/tensor"])
def test_a_linear_layer_in_training_answers_as_its_quantized_module(weight: str, given: str | None) -> None:
    x = noise(3, 7, 48)
    twin = twin_of(nn.Linear(48, 20), x, weight, given)
    torch.testing.assert_close(twin.train()(x), twin.eval()(x), rtol=1e-4, atol=1e-4)


def test_ragged_groups_of_weights_and_inputs_agree() -> None:
    x = noise(7, 50)
    twin = twin_of(nn.Linear(50, 20), x, "int4/group16/asym", "int8/token")
    torch.testing.assert_close(twin.train()(x), twin.eval()(x), rtol=1e-4, atol=1e-4)


def _straight(x: Tensor, scale: Tensor, zero: Tensor, high: int) -> Tensor:
    """A static input by autograd: rounding is passed, clamping is not."""
    steps = x / scale
    nearest = steps + (steps.round() - steps).detach()
    return ((nearest + zero).clamp(0, high) - zero) * scale


@given(seed=st.integers(0, 200))
def test_gradients_of_a_static_input_are_those_of_lsq(seed: int) -> None:
    x = noise(16, 12, seed=seed)
    twin = twin_of(nn.Linear(12, 5), x * 0.7, "int8/channel", "uint8/tensor static:minmax").train()
    part = twin.input_range
    given, upstream = x.clone().requires_grad_(), noise(16, 5, seed=seed + 1) * 1e-3
    twin(given).backward(upstream)
    plain, scale = x.clone().requires_grad_(), part.start_scale.clone().requires_grad_()
    weight = twin.weight_range().quantized(twin.matrix("weight")).detach()
    (_straight(plain, scale, part.start_zero, 255) @ weight.t()).backward(upstream)
    torch.testing.assert_close(given.grad, plain.grad, rtol=1e-4, atol=1e-8)
    sized = scale.grad / (255 * 12) ** 0.5 / part.start_scale  # 12 features of each sample, and an SGD step's size
    torch.testing.assert_close(part.factor.grad, sized, rtol=1e-3, atol=1e-5)


def test_pact_learns_from_clipped_values_alone() -> None:
    x = noise(16, 12).abs()
    twin = twin_of(nn.Linear(12, 5), x, "int8/channel", "uint8/tensor static:minmax", train="pact").train()
    twin(x * 0.99).sum().backward()
    assert float(twin.input_range.factor.grad) == 0.0
    twin(x * 2).sum().backward()
    plain, top = (x * 2).clone(), (part := twin.input_range).start_scale * 255
    alpha = top.clone().requires_grad_()
    weight = twin.weight_range().quantized(twin.matrix("weight")).detach()
    (torch.minimum(plain, alpha) @ weight.t()).sum().backward()
    torch.testing.assert_close(part.factor.grad, alpha.grad / top, rtol=1e-3, atol=1e-4)
    assert twin.weight_range().factor is None, "weights follow their largest value"


@pytest.mark.parametrize("given", INPUTS)
def test_the_gradient_of_the_weight_is_that_of_the_rounded_product(given: str | None) -> None:
    x = noise(16, 12)
    twin = twin_of(nn.Linear(12, 5), x, "int8/channel", given, train="ste").train()
    upstream = noise(16, 5, seed=3)
    twin(x).backward(upstream)
    torch.testing.assert_close(twin.weight.grad, upstream.t() @ x, rtol=0.05, atol=0.1)
    torch.testing.assert_close(twin.bias.grad, upstream.sum(0))


@pytest.mark.parametrize("given", ["int8/token", "uint8/token"])
def test_layers_that_read_one_input_round_it_once_each_way_and_answer_as_alone(given: str, monkeypatch: Any) -> None:
    x = noise(6, 32).requires_grad_()
    twins = [twin_of(nn.Linear(32, 8), x.detach(), "int4/channel", given).train() for _ in range(3)]
    alone = []
    for twin in twins:
        copied = x.detach().clone().requires_grad_()
        out = twin(copied)
        out.square().sum().backward()
        alone.append((out.detach(), copied.grad, twin.weight.grad.clone()))
        twin.weight.grad = None
    counted, rounded = [], trained_inputs.rounded
    monkeypatch.setattr(trained_inputs, "rounded", lambda *given: counted.append(1) or rounded(*given))
    outs = [twin(x) for twin in twins]
    assert len(counted) == 1
    sum(out.square().sum() for out in outs).backward()
    assert len(counted) <= 2
    for twin, out, (expected, _, of_weight) in zip(twins, outs, alone, strict=True):
        assert torch.equal(out.detach(), expected)
        assert torch.equal(twin.weight.grad, of_weight)
    torch.testing.assert_close(x.grad, sum(gradient for _, gradient, _ in alone))


def test_an_input_that_is_written_to_between_two_layers_is_rounded_again() -> None:
    first, second = (twin_of(nn.Linear(32, 8), noise(6, 32), "int4/channel", "int8/token").train() for _ in range(2))
    x = noise(6, 32)
    with torch.no_grad():
        first(x)
        x.mul_(-3.0)
        assert torch.equal(second(x), second(x.clone()))


def test_convolutions_get_torchs_own_gradients_of_the_rounded_product() -> None:
    x = noise(4, 6, 9, 9)
    twin = twin_of(nn.Conv2d(6, 8, 3, padding=1, stride=2), x, "int8/channel", None, train="ste").train()
    given = x.clone().requires_grad_()
    upstream = noise(4, 8, 5, 5, seed=3)
    twin(given).backward(upstream)
    weight = twin.weight_range().quantized(twin.matrix("weight")).detach().view(8, 6, 3, 3).requires_grad_()
    plain = x.clone().requires_grad_()
    functional.conv2d(plain, weight, twin.bias.detach(), stride=2, padding=1).backward(upstream)
    torch.testing.assert_close(given.grad, plain.grad)
    torch.testing.assert_close(twin.weight.grad, weight.grad)


def test_a_step_of_sgd_moves_the_scale_as_lsq_does() -> None:
    x = noise(16, 12)
    twin = twin_of(nn.Linear(12, 5), x, "int4/tensor", None).train()
    part = twin.weight_range()
    twin(x).square().mean().backward()
    before, moved = part.start_scale, part.factor.grad * part.start_scale
    learned = before.clone().requires_grad_()
    matrix = twin.matrix("weight").detach()
    steps = matrix / learned
    nearest = (steps + (steps.round() - steps).detach()).clamp(-7, 7) * learned
    functional.linear(x, nearest, twin.bias.detach()).square().mean().backward()
    torch.testing.assert_close(moved, learned.grad / (60 * 7) ** 0.5, rtol=1e-3, atol=1e-5)


def test_small_channels_and_small_gammas_change_their_scale_no_faster_than_others() -> None:
    torch.manual_seed(0)
    x, layer, norm = noise(16, 3, 6, 6), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
    layer.weight.data[0] *= 1e-3
    norm.weight.data[1] = 1e-4
    rules = {"rule": [{"weight": "int4/channel", "method": "rtn"}]}
    made: Any = nc.qat.prepare(nn.Sequential(layer, norm).eval(), rules, [x], progress=False)
    made(x).square().sum().backward()
    moves = made[0].weight_range().factor.grad.abs().flatten()
    assert float(moves[:2].max()) < 5 * float(moves[2:].max())


def test_weights_outside_of_their_range_are_left_alone_and_those_inside_move() -> None:
    x, layer = noise(16, 12), nn.Linear(12, 5)
    layer.weight.data = noise(5, 12, seed=2)
    twin = twin_of(layer, x, "int2/channel", None).train()
    twin(x).square().mean().backward()
    scaled = twin.matrix("weight") / twin.weight_range().start_scale
    assert bool((twin.weight.grad[scaled.abs() > 1.5] == 0).all()) and bool((scaled.abs() > 1.5).any())


def test_only_looked_up_rows_of_a_table_get_a_gradient() -> None:
    indices = torch.tensor([[1, 5, 5], [2, 1, 0]])
    twin = twin_of(nn.Embedding(10, 16, padding_idx=0), indices, "int8/channel/asym", None).train()
    assert torch.equal(twin(indices), twin.eval()(indices))
    twin.train()(indices).sum().backward()
    assert twin.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [1, 2, 5]
    torch.testing.assert_close(twin.weight.grad[5], torch.full((16,), 2.0), rtol=0, atol=2.0)


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU])
def test_recurrent_layers_take_every_form_of_input(cell: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = noise(4, 6, 10)
    twin = twin_of(cell(10, 8, num_layers=2, bidirectional=True, batch_first=True), x, "int8/channel", None)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, 6, 3, 5]), batch_first=True, enforce_sorted=False)
    for form in (x, x[0], packed):
        trained, evaluated = twin.train()(form), twin.eval()(form)
        one, other = [
            out[0].data if isinstance(out[0], nn.utils.rnn.PackedSequence) else out[0] for out in (trained, evaluated)
        ]
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(trained[1], evaluated[1], rtol=1e-4, atol=1e-4)
