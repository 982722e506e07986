"""QuantizedConv: torch's convolutions on the dequantized weight, in every geometry, for every input treatment."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from tests.nn.oracles import CAST, as_the_kernel_sees, close, noise, record, restored, static_activation, taken_in
from torch import Tensor, nn

from narrowcast.core import QuantSpec, spread_channels
from narrowcast.errors import DataError
from narrowcast.nn import FLOAT, Activation, ConvShape, QuantizedConv

# torch's own layers say that 'same' with an even kernel costs a copy; the quantized ones have no such cost
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")

DYNAMIC = Activation(QuantSpec.parse("int8/token"))
MODES = ("float", "dynamic", "static tensor", "static channel")

PLAIN: dict[str, nn.Module] = {
    "1x1": nn.Conv2d(5, 7, 1),
    "3x3": nn.Conv2d(3, 8, 3, padding=1),
    "without bias": nn.Conv2d(3, 8, 3, padding=1, bias=False),
    "strided": nn.Conv2d(4, 6, 3, stride=2, padding=1),
    "uneven": nn.Conv2d(4, 6, (1, 5), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
    "same, odd kernel": nn.Conv2d(4, 6, 3, padding="same"),
    "same, even kernel": nn.Conv2d(4, 6, (4, 2), padding="same"),
    "same, dilated": nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(3, 2)),
    "valid": nn.Conv2d(4, 6, 3, padding="valid"),
    "dilated": nn.Conv2d(4, 6, 3, dilation=2),
    "grouped": nn.Conv2d(8, 12, 3, groups=4, padding=1),
    "depthwise": nn.Conv2d(10, 10, 3, groups=10, padding=1, stride=2),
    "depthwise, two of each": nn.Conv2d(6, 12, 5, groups=6, padding=2),
    "reflect": nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect"),
    "replicate": nn.Conv2d(4, 6, 3, padding=(1, 0), padding_mode="replicate"),
    "circular": nn.Conv2d(4, 6, (3, 5), padding=(1, 2), padding_mode="circular", stride=2),
    "reflect, same": nn.Conv2d(4, 6, (3, 2), padding="same", padding_mode="reflect"),
    "1d": nn.Conv1d(6, 9, 3),
    "1d strided": nn.Conv1d(6, 9, 5, stride=2, padding=2, dilation=2, groups=3),
    "1d same": nn.Conv1d(6, 9, 4, padding="same"),
    "1d depthwise": nn.Conv1d(6, 6, 3, padding=1, groups=6, bias=False),
    "1d circular": nn.Conv1d(6, 9, 3, padding=2, padding_mode="circular"),
    "transposed": nn.ConvTranspose2d(4, 6, 3),
    "transposed, strided": nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "transposed, uneven": nn.ConvTranspose2d(4, 6, (2, 4), stride=(3, 2), padding=(1, 0), output_padding=(2, 1)),
    "transposed, grouped": nn.ConvTranspose2d(8, 12, 3, stride=2, padding=1, groups=4, bias=False),
    "transposed, dilated": nn.ConvTranspose2d(4, 6, 3, stride=2, dilation=2, padding=2, output_padding=1),
    "transposed, depthwise": nn.ConvTranspose2d(6, 6, 4, stride=2, padding=1, groups=6),
}  # fmt: skip


def filled(layer: Any) -> Any:
    with torch.no_grad():
        layer.weight.copy_(noise(*layer.weight.shape, seed=1))
        if layer.bias is not None:
            layer.bias.copy_(noise(*layer.bias.shape, seed=2))
    return layer.eval()


def example(layer: Any, batch: int = 2) -> Tensor:
    size = (13,) if isinstance(layer, nn.Conv1d) else (9, 11)
    x = noise(batch, layer.in_channels, *size) + 0.2
    return x * torch.linspace(0.2, 2, layer.in_channels).view(-1, *[1] * len(size))


def activation_for(layer: Any, x: Tensor, mode: str) -> Activation:
    if mode in ("float", "dynamic"):
        return FLOAT if mode == "float" else DYNAMIC
    return static_activation(x, 1, per_channel=mode == "static channel")


def converted(layer: Any, activation: Activation = FLOAT, spec: str = "int8") -> QuantizedConv:
    shape = ConvShape.of(layer)
    matrix = taken_in(
        shape.to_matrix(layer.weight.detach()),
        activation,
        lambda ratio: spread_channels(ratio, shape.matrix, shape.groups),
    )
    return QuantizedConv(QuantSpec.parse(spec), shape, activation, record=record(matrix, spec), bias=layer.bias)


def on_dequantized(layer: Any, module: QuantizedConv, seen: Tensor, **options: Any) -> Tensor:
    """torch's own layer in float64 with the weight that the quantized module stands for."""
    reference = copy.deepcopy(layer).double()
    with torch.no_grad():
        assert module.weight.shape == layer.weight.shape
        reference.weight.copy_(module.weight)
        return reference(seen.double(), **options).float()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PLAIN)
def test_every_geometry_meets_torch_on_the_dequantized_weight(name: str, mode: str) -> None:
    layer = filled(PLAIN[name])
    x = example(layer)
    activation = activation_for(layer, x, mode)
    module = converted(layer, activation)
    assert module.kernel.startswith("torch" if mode == "float" else "conv2d_int8")
    expected = on_dequantized(layer, module, as_the_kernel_sees(x, activation, 1))
    close(module(x), expected)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("name", ["3x3", "depthwise", "1d strided", "transposed, grouped"])
def test_four_bit_inputs_clip_at_their_range_in_the_integer_kernel(name: str, per_channel: bool) -> None:
    layer = filled(PLAIN[name])
    x = example(layer)
    activation = static_activation(0.5 * x, 1, per_channel=per_channel, format="uint4")
    module = converted(layer, activation, "int4")
    seen = as_the_kernel_sees(x, activation, 1)
    assert module.kernel.startswith("conv2d_int8") and float((seen - x).abs().max()) > 0.1
    close(module(x), on_dequantized(layer, module, seen))
    assert torch.equal(restored(module)(x), module(x))
    x.view(-1)[7] = float("inf")
    with pytest.raises(RuntimeError, match="Non-finite"):
        module(x)


@pytest.mark.parametrize("name", ["3x3", "depthwise", "1d strided", "transposed, grouped"])
def test_the_weight_is_near_the_float_weight(name: str) -> None:
    layer = filled(PLAIN[name])
    for mode in MODES:
        module = converted(layer, activation_for(layer, example(layer), mode))
        close(module.weight, layer.weight.detach(), part=5e-2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PLAIN)
def test_settings_and_stored_tensors_rebuild_the_module_to_the_bit(name: str, mode: str) -> None:
    layer = filled(PLAIN[name])
    x = example(layer)
    module = converted(layer, activation_for(layer, x, mode))
    again = restored(module)
    assert again.quantized_weights() == module.quantized_weights()
    assert torch.equal(again(x), module(x))


@pytest.mark.parametrize("spec", ["int8", "int6", "int4", "int2"])
def test_stored_codes_come_back_from_the_panels(spec: str) -> None:
    layer = filled(PLAIN["grouped"])
    module = converted(layer, DYNAMIC, spec)
    assert module.weight_codes is None
    expected = converted(layer, FLOAT, spec)
    state = module.state_dict()
    assert torch.equal(state["weight_codes"], expected.weight_codes)
    assert module.quantized_weights() == expected.quantized_weights()
    assert module.weight_codes is None
    assert set(state) == {"weight_codes", "weight_scale", "bias"}


@pytest.mark.parametrize(
    "spec", ["fp16", "fp8_e4m3", "int8/asym", "int4/group32/asym", "int3/group8", "nf4/group64", "uint8"]
)
@pytest.mark.parametrize("name", ["3x3", "grouped", "transposed, strided", "1d"])
def test_every_format_convolves_in_float(name: str, spec: str) -> None:
    layer = filled(PLAIN[name])
    x = example(layer)
    module = converted(layer, FLOAT, spec)
    close(module(x), on_dequantized(layer, module, x))
    assert torch.equal(restored(module)(x), module(x))


@pytest.mark.parametrize("target", CAST)
@pytest.mark.parametrize("name", ["3x3", "1d", "transposed, grouped"])
def test_cast_inputs_convolve_in_the_target_dtype(name: str, target: str) -> None:
    layer = filled(PLAIN[name])
    x = example(layer)
    module = converted(layer, Activation(QuantSpec.parse(target)), target)
    reference = copy.deepcopy(layer).to(CAST[target])
    close(module(x), reference(x.to(CAST[target])).float(), part=1e-2)
    assert target in module.kernel


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["3x3", "1d same", "transposed"])
def test_unbatched_inputs_work_as_in_torch(name: str, mode: str) -> None:
    layer = filled(PLAIN[name])
    x = example(layer)
    module = converted(layer, activation_for(layer, x, mode))
    close(module(x[0]), module(x[:1])[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(17, 22), (18, 21)])
def test_a_transposed_convolution_takes_an_output_size(mode: str, size: tuple[int, int]) -> None:
    layer = filled(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1))
    x = example(layer)
    activation = activation_for(layer, x, mode)
    module = converted(layer, activation)
    expected = on_dequantized(layer, module, as_the_kernel_sees(x, activation, 1), output_size=list(size))
    close(module(x, output_size=list(size)), expected)
    close(module(x, [2, 6, *size]), expected)
    close(module(x), on_dequantized(layer, module, as_the_kernel_sees(x, activation, 1)))  # and is not remembered


@pytest.mark.parametrize("size", [(16, 22), (19, 21), (200, 200)])
@pytest.mark.parametrize("mode", MODES)
def test_an_output_size_out_of_reach_is_refused_as_in_torch(mode: str, size: tuple[int, int]) -> None:
    layer = filled(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1))
    x = example(layer)
    with pytest.raises(ValueError):
        layer(x, output_size=list(size))
    with pytest.raises(DataError, match="output_size"):
        converted(layer, activation_for(layer, x, mode))(x, output_size=list(size))


@pytest.mark.parametrize("mode", MODES)
def test_memory_format_of_input_does_not_matter(mode: str) -> None:
    layer = filled(PLAIN["grouped"])
    x = example(layer)
    module = converted(layer, activation_for(layer, x, mode))
    expected = module(x)
    close(module(x.to(memory_format=torch.channels_last)), expected)
    close(module(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)


def test_memory_format_of_output_is_a_setting() -> None:
    layer = filled(PLAIN["3x3"])
    module = converted(layer, DYNAMIC)
    y = module(example(layer))
    assert y.is_contiguous(memory_format=torch.channels_last)
    module.channels_last = False
    flat = module(example(layer))
    assert flat.is_contiguous() and torch.equal(flat, y)
    assert restored(module).channels_last is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_half_precision_inputs_give_half_precision_outputs(mode: str, dtype: torch.dtype) -> None:
    layer = filled(PLAIN["3x3"])
    x = example(layer).to(dtype)
    module = converted(layer, activation_for(layer, x.float(), mode))
    y = module(x)
    assert y.dtype == dtype
    close(y.float(), module(x.float()), part=3e-2)


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_gives_an_empty_answer(mode: str) -> None:
    layer = filled(PLAIN["3x3"])
    module = converted(layer, activation_for(layer, example(layer), mode))
    assert module(torch.zeros(0, 3, 9, 11)).shape == (0, 8, 9, 11)


def test_a_range_per_sample_does_not_see_the_other_samples() -> None:
    layer = filled(PLAIN["3x3"])
    module = converted(layer, DYNAMIC)
    x = example(layer, batch=3) * torch.tensor([1e-3, 1.0, 1e3]).view(3, 1, 1, 1)
    together = module(x)
    for index in range(3):
        assert torch.equal(together[index], module(x[index : index + 1])[0])


def test_copies_are_independent_and_equal() -> None:
    layer = filled(PLAIN["depthwise"])
    module = converted(layer, DYNAMIC)
    again = copy.deepcopy(module)
    x = example(layer)
    assert torch.equal(again(x), module(x))
    again.kernel_panels.zero_()
    assert not torch.equal(again(x), module(x))


@pytest.mark.parametrize("name", PLAIN)
def test_matrix_and_weight_are_inverse(name: str) -> None:
    layer = filled(PLAIN[name])
    shape = ConvShape.of(layer)
    back = shape.from_matrix(shape.to_matrix(layer.weight))
    assert torch.equal(back.view(layer.weight.shape), layer.weight)
    assert ConvShape.from_dict(json.loads(json.dumps(shape.to_dict()))) == shape


def test_inputs_with_the_wrong_number_of_channels_raise() -> None:
    layer = filled(PLAIN["3x3"])
    for mode in MODES:
        module = converted(layer, activation_for(layer, example(layer), mode))
        with pytest.raises(DataError, match="4 channels, expected 3"):
            module(torch.ones(2, 4, 9, 11))
