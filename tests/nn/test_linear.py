"""QuantizedLinear: torch's linear on the dequantized weight, in every format, for every treatment of the input."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.nn.oracles import CAST, as_the_kernel_sees, close, noise, record, restored, static_activation, taken_in
from torch.nn.functional import linear

from narrowcast.core import QuantSpec
from narrowcast.errors import DataError, FormatError
from narrowcast.kernels.reference_linear import FUSED, input_group_of
from narrowcast.nn import FLOAT, Activation, QuantizedLinear, linear_op

EVERY_FORMAT = (
    "fp32", "fp16", "bf16",
    "fp8_e4m3", "fp8_e5m2/tensor", "fp8_e4m3/group32",
    "int8", "int8/tensor", "int8/asym", "int8/group32", "int8/block4x16", "int8/scale:fp16", "int8/group16/scale:e8m0",
    "uint8", "uint8/channel", "uint8/group32",
    "int6", "int5", "int5/group8/asym", "int4", "int4/scale:fp16", "int4/asym/scale:fp16", "int4/group32",
    "int4/group32/asym", "int4/group64", "int4/group24/asym", "int4/group32/scale:int8",
    "int3", "int3/group16/asym", "int2", "int2/group8/asym", "uint4", "uint4/group32",
    "nf4/group32", "nf4/group64/scale:int8", "fp4_e2m1/group16", "mxfp4", "mxfp8",
    "int4/group32/asym/scale:k6", "int3/group16/scale:k6", "nf4/group64/scale:k6",
    "codebook4", "codebook3/group32", "codebook2/tensor",
)  # fmt: skip
INT8_PER_ROW = ("int8", "int8/tensor", "int6", "int5", "int4", "int3", "int2", "int8/scale:fp16")
LOW_BIT = (
    "int8/group32", "int6", "int5", "int4", "int4/scale:fp16", "int4/asym/scale:fp16", "int4/group32",
    "int4/group32/asym", "int4/group64", "int3", "int3/group16/asym", "int2", "uint4/group32", "nf4/group32",
    "fp4_e2m1/group16", "int3/group16/scale:k6", "int6/group32/asym/scale:k6", "nf4/group64/scale:k6",
)  # fmt: skip
DYNAMIC = Activation(QuantSpec.parse("int8/token"))
ASYMMETRIC = Activation(QuantSpec.parse("uint8/token"))


def made(spec: str, rows: int, columns: int, activation: Activation = FLOAT, *, bias: bool = True) -> QuantizedLinear:
    weight = taken_in(noise(rows, columns, seed=1), activation, lambda ratio: ratio[None, :])
    offset = noise(rows, seed=2) if bias else None
    return QuantizedLinear(QuantSpec.parse(spec), (rows, columns), activation, record=record(weight, spec), bias=offset)


@pytest.mark.parametrize("per_channel", [False, True])
def test_four_bit_inputs_clip_at_their_range_in_the_integer_kernel(per_channel: bool) -> None:
    x = noise(5, 76) * torch.linspace(0.2, 2, 76)
    activation = static_activation(0.5 * x, -1, per_channel=per_channel, format="uint4")
    module = made("int4", 10, 76, activation)
    close(module(x), linear(as_the_kernel_sees(x, activation, -1), module.weight, module.bias))
    assert module.kernel.startswith("linear_int8_static")
    with pytest.raises(RuntimeError, match="Non-finite"):
        module(x / 0)


@pytest.mark.parametrize("spec", EVERY_FORMAT)
def test_float_inputs_meet_the_dequantized_weight(spec: str) -> None:
    x = noise(2, 3, 76)
    module = made(spec, 10, 76)
    weight = record(noise(10, 76, seed=1), spec).dequantize()
    assert torch.equal(module.weight, weight)
    assert torch.equal(module.quantized_weights()["weight"].dequantize(), weight)
    close(module(x), linear(x, weight, module.bias))


@pytest.mark.parametrize("target", CAST)
@pytest.mark.parametrize("spec", ["fp16", "bf16", "int8", "int4/group32/asym", "nf4/group32"])
def test_cast_inputs_multiply_in_the_target_dtype(spec: str, target: str) -> None:
    x = noise(5, 64)
    module = made(spec, 8, 64, Activation(QuantSpec.parse(target)))
    dtype = CAST[target]
    expected = linear(x.to(dtype), module.weight.to(dtype), module.bias.to(dtype)).float()
    assert torch.equal(module(x), expected)
    assert target in module.kernel


@pytest.mark.parametrize("spec", INT8_PER_ROW)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [DYNAMIC, ASYMMETRIC], ids=["symmetric", "asymmetric"])
def test_dynamic_inputs_have_a_range_per_token(spec: str, bias: bool, activation: Activation) -> None:
    x = (noise(2, 7, 77) + 0.7) * torch.logspace(-3, 2, 7)[:, None]
    x[0, 3], x[1, 3] = x[0, 3].abs(), 0.0  # a range that begins at zero, and none at all
    module = made(spec, 9, 77, activation, bias=bias)
    name = "linear_int8_dynamic" if activation is ASYMMETRIC or spec.startswith("int8") else "linear_lowbit_dynamic"
    assert module.kernel.startswith(name)
    expected = linear(as_the_kernel_sees(x, activation, -1).double(), module.weight.double(), None)
    expected = expected if module.bias is None else expected + module.bias.double()
    for token in range(7):
        close(module(x)[:, token], expected.float()[:, token])


@pytest.mark.parametrize("spec", LOW_BIT)
@pytest.mark.parametrize("columns", [32, 76, 172])
def test_dynamic_inputs_of_low_bit_weights_have_a_range_per_group(spec: str, columns: int) -> None:
    x = noise(5, columns)
    module = made(spec, 9, columns, DYNAMIC)
    assert module.kernel.startswith("linear_lowbit_dynamic")
    group = input_group_of(module.stored("weight").group, columns)
    seen = as_the_kernel_sees(x, DYNAMIC, -1, group=group).double()
    expected = linear(seen, module.weight.double(), module.bias.double()).float()
    close(module(x), expected, 1e-2 if spec.startswith("nf4") else 1e-5)  # the levels of nf4 are rounded to int8


@pytest.mark.parametrize("fused", ["relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("spec", ["int8", "int3/group32/asym", "fp16", "int8/group8"])
def test_a_fused_activation_function_follows_the_layer_and_is_saved(spec: str, fused: str) -> None:
    weight, x = noise(9, 64, seed=1), noise(4, 64)
    for activation in (DYNAMIC, static_activation(x, -1, per_channel=False)):
        plain = QuantizedLinear(QuantSpec.parse(spec), (9, 64), activation, record=record(weight, spec))
        module = QuantizedLinear(QuantSpec.parse(spec), (9, 64), activation, record=record(weight, spec), fused=fused)
        torch.testing.assert_close(module(x), FUSED[fused](plain(x)), atol=1.5e-6, rtol=2e-6)
        again = restored(module)
        assert again.fused == fused and torch.equal(again(x), module(x))
        assert restored(plain).fused == "none" and "fused" not in plain.config()


def test_an_unknown_fused_function_raises() -> None:
    with pytest.raises(FormatError, match="fused 'tanh' is not known"):
        QuantizedLinear(QuantSpec.parse("int8"), (4, 4), fused="tanh")


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("spec", INT8_PER_ROW)
def test_static_inputs_use_the_given_ranges(spec: str, per_channel: bool) -> None:
    x = noise(2, 6, 45) * torch.linspace(0.1, 3, 45) + 0.3
    activation = static_activation(x, -1, per_channel=per_channel)
    module = made(spec, 11, 45, activation)
    assert module.kernel.startswith("linear_int8_static")
    seen = as_the_kernel_sees(x, activation, -1).double()
    close(module(x), linear(seen, module.weight.double(), module.bias.double()).float())


def test_static_inputs_beyond_the_range_are_clipped_to_its_ends() -> None:
    activation = static_activation(torch.tensor([[-1.0], [2.0]]), -1, per_channel=False)
    module = made("int8", 3, 1, activation, bias=False)
    ends = module(torch.tensor([[-1.0], [2.0]]))
    close(module(torch.tensor([[-50.0], [50.0]])), ends)


def test_weight_is_the_weight_before_it_took_in_the_input_scales() -> None:
    x = noise(64, 16) * torch.logspace(-1, 1, 16)
    module = made("int8", 12, 16, static_activation(x, -1, per_channel=True))
    float_weight = noise(12, 16, seed=1)
    # within one step of the row's scale, seen through the ratio of the channel
    step = module.weight_scale.view(-1, 1) / module.input_ranges().ratio()
    assert bool(((module.weight - float_weight).abs() <= 0.5001 * step).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("spec", "activation"), [
    ("int8", FLOAT), ("int8", DYNAMIC), ("int4/group32/asym", DYNAMIC), ("nf4/group32", FLOAT), ("bf16", FLOAT),
])  # fmt: skip
def test_half_precision_inputs_give_half_precision_outputs(
    dtype: torch.dtype, spec: str, activation: Activation
) -> None:
    x = noise(4, 64).to(dtype)
    module = made(spec, 8, 64, activation)
    y = module(x)
    assert y.dtype == dtype
    close(y.float(), module(x.float()), part=2e-2)


def test_half_precision_inputs_of_static_ranges_work_too() -> None:
    x = noise(4, 64)
    module = made("int8", 8, 64, static_activation(x, -1, per_channel=True))
    close(module(x.bfloat16()).float(), module(x.bfloat16().float()), part=1e-2)


@pytest.mark.parametrize("activation", [FLOAT, DYNAMIC])
@pytest.mark.parametrize("shape", [(76,), (1, 76), (0, 76), (2, 0, 76), (2, 3, 4, 76)])
def test_any_leading_dimensions_work(shape: tuple[int, ...], activation: Activation) -> None:
    module = made("int8", 5, 76, activation)
    assert module(torch.ones(shape)).shape == (*shape[:-1], 5)


def test_strided_inputs_give_the_same_answer() -> None:
    module = made("int8", 5, 76, DYNAMIC)
    x = noise(76, 6).t()
    assert torch.equal(module(x), module(x.contiguous()))


@pytest.mark.parametrize("spec", EVERY_FORMAT)
def test_settings_and_stored_tensors_rebuild_the_module(spec: str) -> None:
    module = made(spec, 10, 76)
    again = restored(module)
    assert again.quantized_weights() == module.quantized_weights()
    assert torch.equal(again(x := noise(3, 76)), module(x))


@pytest.mark.parametrize("mode", ["symmetric", "asymmetric", "static tensor", "static channel"])
@pytest.mark.parametrize("bias", [True, False])
def test_integer_modules_rebuild_to_the_bit(mode: str, bias: bool) -> None:
    x = noise(4, 33)
    static = static_activation(x, -1, per_channel=mode == "static channel")
    activation = {"symmetric": DYNAMIC, "asymmetric": ASYMMETRIC}.get(mode, static)
    module = made("int8", 6, 33, activation, bias=bias)
    again = restored(module)
    assert torch.equal(again(x), module(x))
    assert set(again.state_dict()) == set(module.state_dict())
    assert torch.equal(again.weight, module.weight)


def test_what_is_derived_for_kernels_is_not_stored() -> None:
    module = made("int8", 6, 33, DYNAMIC)
    assert set(module.state_dict()) == {"weight_codes", "weight_scale", "bias"}


def test_the_kernel_reads_the_stored_codes_without_a_second_copy() -> None:
    module = made("int8", 6, 33, DYNAMIC)
    assert module.kernel_codes.data_ptr() == module.weight_codes.data_ptr()
    again = copy.deepcopy(module)
    assert again.kernel_codes.data_ptr() == again.weight_codes.data_ptr() != module.weight_codes.data_ptr()
    assert torch.equal(again(x := noise(4, 33)), module(x))


def test_packed_weights_take_their_bits_and_no_more() -> None:
    module = made("int4/group32/asym", 6, 64)
    stored = sum(t.numel() * t.element_size() for name, t in module.state_dict().items() if name != "bias")
    assert stored == 6 * 64 // 2 + 6 * 2 * 2 + 6 * 2  # codes, float16 scales, zero points
    spec = module.stored("weight").spec
    assert stored * 8 == spec.bits_per_value((6, 64)) * 6 * 64


def test_the_integer_op_is_chosen_by_format_and_treatment() -> None:
    for spec in EVERY_FORMAT:
        parsed = QuantSpec.parse(spec)
        dynamic = "linear_int8_dynamic" if spec in INT8_PER_ROW else None
        dynamic = "linear_lowbit_dynamic" if spec in (*LOW_BIT, "nf4/group64") else dynamic
        assert linear_op(parsed, (10, 76), "dynamic") == dynamic, spec
        asymmetric = "linear_int8_dynamic" if spec in (*INT8_PER_ROW, "int4/scale:fp16") else None
        assert linear_op(parsed, (10, 76), "asymmetric") == asymmetric, spec
        static = "linear_int8_static" if spec in (*INT8_PER_ROW, "int4/scale:fp16") else None
        assert linear_op(parsed, (10, 76), "static") == static, spec
        assert linear_op(parsed, (10, 76), "float") is linear_op(parsed, (10, 76), "cast") is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_raise(value: float) -> None:
    module = made("int8", 6, 33, DYNAMIC)
    x = torch.ones(3, 33)
    x[1, 5] = value
    with pytest.raises(RuntimeError, match="row 1"):
        module(x)


def test_inputs_of_the_wrong_width_raise() -> None:
    for spec, activation in (("int8", DYNAMIC), ("int4/group32", DYNAMIC), ("int8", FLOAT)):
        with pytest.raises((RuntimeError, DataError)):
            made(spec, 6, 33, activation)(torch.ones(3, 34))


@given(rows=st.integers(1, 20), columns=st.integers(1, 80), tokens=st.integers(0, 5), group=st.sampled_from([32, 64]))
def test_every_size_works_in_groups_that_do_not_divide_it(rows: int, columns: int, tokens: int, group: int) -> None:
    x = noise(tokens, columns)
    module = made(f"int4/group{group}/asym", rows, columns, DYNAMIC)
    seen = as_the_kernel_sees(x, DYNAMIC, -1, group=columns if group >= columns else group).double()
    close(module(x), linear(seen, module.weight.double(), module.bias.double()).float())
    close(made(f"int4/group{group}/asym", rows, columns)(x), linear(x, module.weight, module.bias))
