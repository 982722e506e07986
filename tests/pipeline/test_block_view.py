"""ModuleBlock: inputs are rounded as the installed modules round them, and rows are cut only where that is right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowcast.core import QuantSpec
from narrowcast.methods import InputTraining, Rtn
from narrowcast.models import TorchModel
from narrowcast.nn import Activation
from narrowcast.pipeline.block_view import LayerUse, ModuleBlock
from narrowcast.pipeline.input_rounding import rounded_input, rounding_hook
from narrowcast.transforms import channel_scales


def activation_of(text: str, x: Tensor, channel_dim: int) -> Activation:
    spec = QuantSpec.parse(text)
    if text.endswith("channel"):
        flat = x.movedim(channel_dim, -1).flatten(0, -2)
        return Activation(spec, *channel_scales(flat.amin(0), flat.amax(0), 1.0))
    if text.endswith("tensor"):
        scale = (x.max() - x.min()) / 255
        return Activation(spec, scale.view(1), (-x.min() / scale).round().to(torch.uint8).view(1))
    return Activation(spec)


@pytest.mark.parametrize("layer", ["linear", "conv"])
@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("int8/token", "int8/channel"), ("int8/token", "int4/group32"), ("uint8/token", "int8/channel"),
        ("uint8/tensor", "int8/channel"), ("uint8/channel", "int8/channel"), ("bf16", "int8/channel"),
    ],
)  # fmt: skip
def test_inputs_are_rounded_as_the_installed_module_rounds_them(layer: str, text: str, weight: str) -> None:
    if layer == "conv" and (weight.startswith("int4") or text in ("uint8/token", "bf16")):
        pytest.skip("convolutions have no such kernel")
    torch.manual_seed(0)
    module: nn.Module = nn.Linear(96, 8) if layer == "linear" else nn.Conv2d(6, 8, 3)
    x = torch.randn(5, 96) if layer == "linear" else torch.randn(3, 6, 8, 8)
    x = x + 0.5
    activation = activation_of(text, x, -1 if layer == "linear" else 1)
    adapter = TorchModel(nn.Sequential(module).eval())
    spec, planned = QuantSpec.parse(weight), adapter.layers()[0]
    matrix = adapter.weight(planned)
    ratio = activation.ratio()
    columns = None if ratio is None else ratio.repeat_interleave(matrix.shape[1] // ratio.numel())[None]
    record = Rtn(range="absmax").quantize(matrix if columns is None else matrix * columns, spec)
    use = LayerUse("", "weight", spec, activation, columns)
    block = ModuleBlock(
        adapter, module, {"it": use}, {"it": matrix}, {}, {}, [((x,), {})], [module(x).detach()]
    )  # fmt: skip
    got = block.output({"it": record.dequantize()}, range(block.samples))
    expected = adapter.build("0", {"weight": record}, activation)(x)
    assert block.samples == len(x)
    torch.testing.assert_close(got, expected, atol=2e-4 if text != "bf16" else 5e-2, rtol=1e-3)


def test_rounding_moves_a_value_by_at_most_half_a_step() -> None:
    x = torch.randn(7, 64)
    got = rounded_input(
        x, Activation(QuantSpec.parse("int8/token")), QuantSpec.parse("int8/channel"), convolution=False
    )
    step = x.abs().amax(-1, keepdim=True) / 127
    assert bool(((got - x).abs() <= step / 2 * 1.001).all()) and not torch.equal(got, x)


FOUR_BITS = Activation(QuantSpec.parse("uint4/tensor"), torch.tensor([0.25]), torch.tensor([4], dtype=torch.uint8))


def test_gradients_of_a_static_input_are_those_of_learned_step_sizes() -> None:
    x = torch.tensor([[-3.0, -0.3, 0.1, 2.0, 5.0]], requires_grad=True)  # -1 .. 2.75 is inside
    factor = torch.ones((), requires_grad=True)
    rounded = rounded_input(x, FOUR_BITS, QuantSpec.parse("int4/channel"), convolution=False, factor=factor)
    assert rounded.tolist() == [[-1.0, -0.25, 0.0, 2.0, 2.75]]
    of_x, of_factor = torch.autograd.grad(rounded.sum(), [x, factor])
    assert of_x.tolist() == [[0.0, 1.0, 1.0, 1.0, 0.0]]
    # LSQ: outside the code, inside the code less x / scale; in units of the scale
    torch.testing.assert_close(of_factor, torch.tensor(0.25 * (-4 + (-1 + 1.2) + (0 - 0.4) + 0 + 11)))


def test_a_step_may_leave_a_part_of_the_values_unrounded() -> None:
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    layer = nn.Linear(64, 4)
    rounded = rounded_input(x, FOUR_BITS, QuantSpec.parse("int4/channel"), convolution=False)

    def seen(training: InputTraining | None, activation: Activation = FOUR_BITS) -> Tensor:
        hook = rounding_hook("it", activation, QuantSpec.parse("int4/channel"), training)
        changed = hook(layer, (x,))
        assert changed is not None
        return changed[0]

    assert torch.equal(seen(None), rounded)
    half = seen(InputTraining({}, 0.5, torch.Generator().manual_seed(1)))
    assert bool(((half == x) | (half == rounded)).all()) and 0.45 < float((half == x).float().mean()) < 0.55
    dynamic = Activation(QuantSpec.parse("int8/token"))
    assert torch.equal(seen(InputTraining({}, 0.5), dynamic), seen(None, dynamic))


def view(module: nn.Module, calls: list[tuple[Any, ...]]) -> ModuleBlock:
    adapter = TorchModel(nn.Sequential(module).eval())
    weight = {"it": adapter.weight(adapter.layers()[0])}
    inner = next(name for name, part in module.named_modules() if isinstance(part, nn.Linear))
    use = LayerUse(inner, "weight", QuantSpec.parse("int8/channel"), Activation())
    with torch.no_grad():
        targets = [module(*args) for args in calls]
    return ModuleBlock(adapter, module, {"it": use}, weight, {}, {}, [(args, {}) for args in calls], targets)


class WithTable(nn.Module):
    """Reads a table that has as many rows as the batch, by chance."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        cosine, sine = table
        return self.linear(x) * cosine + sine


class AcrossRows(nn.Module):
    """A row's answer depends on the other rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x - x.mean(0, keepdim=True))


def test_rows_of_calls_of_one_shape_are_samples_and_come_in_the_order_asked_for() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    calls = [(torch.randn(3, 4),), (torch.randn(2, 4),)]
    block = view(module, calls)
    assert block.samples == 5
    every = module(torch.cat([calls[0][0], calls[1][0]])).detach()
    torch.testing.assert_close(block.target([4, 0, 3]), every[[4, 0, 3]])
    torch.testing.assert_close(block.output(block.weights, [4, 0, 3]), every[[4, 0, 3]])


@pytest.mark.parametrize("module", [WithTable(), AcrossRows()])
def test_calls_that_cannot_be_cut_are_samples_as_they_are(module: nn.Module) -> None:
    torch.manual_seed(0)
    extra = (torch.randn(2, 4),) if isinstance(module, WithTable) else ()
    calls = [(torch.randn(2, 4), *extra) for _ in range(3)]
    block = view(module, calls)
    assert block.samples == 3
    torch.testing.assert_close(block.output(block.weights, [1]), module(*calls[1]).detach())
    assert block.target([0, 2]).shape == (4, 4)


def test_a_block_that_writes_into_its_input_gives_the_same_again() -> None:
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))
    x = torch.randn(2, 4)
    block = view(module, [(x.clone(),)])
    first = block.output(block.weights, [0, 1])
    torch.testing.assert_close(block.output(block.weights, [0, 1]), first)
    torch.testing.assert_close(first, module(x.clone()))
