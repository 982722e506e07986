"""Native quantizing: codes, scales and zero points of every tier equal `core` bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from narrowcast.core import FORMATS, pack
from narrowcast.kernels import reference_encode as reference

OPS = torch.ops.narrowcast
Walk = Callable[[], Iterator[str]]

PROPERTY = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 150))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(draw(st.integers(0, 10**6))))
    weight = weight * 10.0 ** draw(st.sampled_from([-30, -8, -5, 0, 2]))
    kind = draw(st.sampled_from(["normal", "ties", "positive", "negative", "sparse", "denormal"]))
    if kind == "ties":  # many quotients end in exactly one half
        return (weight * 4).round() / 8
    if kind == "positive":
        return weight.abs()
    if kind == "negative":
        return -weight.abs()
    if kind == "sparse":
        return weight * (weight.abs() > weight.abs().mean())
    return weight * 1e-38 if kind == "denormal" else weight


@PROPERTY
@given(
    weight=weights(),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([1, 7, 16, 32, 64, 128, 1000]),
    symmetric=st.booleans(),
    scale_format=st.integers(0, 2),
)
def test_codes_scales_and_zero_points_are_those_of_core(
    every_tier: Walk, weight: Tensor, bits: int, group: int, symmetric: bool, scale_format: int
) -> None:
    arguments = (weight, group, bits, symmetric, scale_format)
    codes, scale, zero_point = reference.quantize_weight(*arguments)
    zeros = None if symmetric else zero_point
    error = reference.quantization_error(weight, codes, scale, zeros, group)
    for tier in every_tier():
        for got, expected in zip(OPS.quantize_weight(*arguments), (codes, scale, zero_point), strict=True):
            assert got.dtype == expected.dtype and torch.equal(got, expected), tier
        assert torch.equal(OPS.encode_weight(weight, scale, zeros, group, bits), codes), tier
        measured = OPS.quantization_error(weight, codes, scale, zeros, group)
        torch.testing.assert_close(measured, error, rtol=1e-12, atol=0)


@PROPERTY
@given(
    name=st.sampled_from(["int2", "int3", "int4", "int5", "int6", "uint4", "nf4"]),
    rows=st.integers(0, 4),
    columns=st.integers(0, 90),
    seed=st.integers(0, 999),
)
def test_packing_is_that_of_core_and_unpacking_undoes_it(
    every_tier: Walk, name: str, rows: int, columns: int, seed: int
) -> None:
    number = FORMATS[name]
    offset = int(number.low) if number.kind == "int" else 0
    generator = torch.Generator().manual_seed(seed)
    fields = torch.randint(0, 2**number.bits, (rows, columns), generator=generator)
    codes = (fields + offset).to(number.storage)
    expected = pack(codes, number)
    for tier in every_tier():
        packed = OPS.pack_codes(codes, number.bits, offset)
        assert torch.equal(packed, expected), tier
        unpacked = OPS.unpack_codes(packed, number.bits, offset, columns, codes.dtype == torch.int8)
        assert torch.equal(unpacked, codes) and unpacked.dtype == codes.dtype, tier


def test_a_group_that_is_not_finite_has_no_finite_scale_and_leaves_the_others_alone(every_tier: Walk) -> None:
    weight = torch.randn(2, 96)
    expected = reference.quantize_weight(weight, 32, 4, False, 1)
    for bad in (float("nan"), float("inf"), -float("inf")):
        broken = weight.clone()
        broken[1, 40] = bad
        for _ in every_tier():
            _, scale, _ = OPS.quantize_weight(broken, 32, 4, False, 1)
            assert not scale[1, 1].isfinite()
            assert torch.equal(scale[0], expected[1][0]) and scale[1, 0] == expected[1][1, 0]


def test_a_scale_beyond_its_format_is_infinite(every_tier: Walk) -> None:
    for _ in every_tier():
        assert OPS.quantize_weight(torch.full((1, 8), 1e9), 8, 4, True, 1)[1].isinf().all()


def test_strided_misaligned_and_empty_weights(every_tier: Walk) -> None:
    strided = torch.randn(80, 7).t()
    misaligned = torch.randn(3 * 70 + 1)[1:].view(3, 70)
    for weight in (strided, misaligned, torch.empty(0, 32), torch.empty(3, 0)):
        expected = reference.quantize_weight(weight, 32, 4, False, 1)
        for _ in every_tier():
            got = OPS.quantize_weight(weight, 32, 4, False, 1)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            codes, scale, zero_point = expected
            assert OPS.quantization_error(weight, codes, scale, zero_point, 32).shape == (2,)


@pytest.mark.usefixtures("threads")
def test_threads_do_not_change_anything() -> None:
    weight = torch.randn(300, 700)
    results = []
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        codes, scale, zero_point = OPS.quantize_weight(weight, 32, 4, False, 1)
        error = OPS.quantization_error(weight, codes, scale, zero_point, 32)
        results.append((codes, scale, zero_point, error, OPS.pack_codes(codes, 4, -8)))
    assert all(torch.equal(a, b) for other in results for a, b in zip(results[0], other, strict=True))


def test_bad_arguments_are_python_errors() -> None:
    weight = torch.randn(2, 32)
    codes, scale, zero_point = OPS.quantize_weight(weight, 32, 4, False, 1)
    with pytest.raises(RuntimeError, match="weight must be float32"):
        OPS.quantize_weight(weight.double(), 32, 4, True, 0)
    with pytest.raises(RuntimeError, match="2 dimensions"):
        OPS.quantize_weight(weight[0], 32, 4, True, 0)
    with pytest.raises(RuntimeError, match="group must be positive"):
        OPS.quantize_weight(weight, 0, 4, True, 0)
    with pytest.raises(RuntimeError, match="bits must be"):
        OPS.quantize_weight(weight, 32, 9, True, 0)
    with pytest.raises(RuntimeError, match="scale_format"):
        OPS.quantize_weight(weight, 32, 4, True, 3)
    with pytest.raises(RuntimeError, match="scale must have shape"):
        OPS.encode_weight(weight, scale, zero_point, 16, 4)
    with pytest.raises(RuntimeError, match="zero_point must be int32"):
        OPS.encode_weight(weight, scale, scale, 32, 4)
    with pytest.raises(RuntimeError, match="codes have shape"):
        OPS.quantization_error(weight, codes[:, :8], scale, zero_point, 32)
    with pytest.raises(RuntimeError, match=r"a code is outside -8\.\.7"):
        OPS.pack_codes(torch.full((1, 9), 8, dtype=torch.int8), 4, -8)
    with pytest.raises(RuntimeError, match="codes must be int8"):
        OPS.pack_codes(weight, 4, -8)
    with pytest.raises(RuntimeError, match="bits must be"):
        OPS.pack_codes(codes, 8, -128)
    with pytest.raises(RuntimeError, match="cannot hold"):
        OPS.unpack_codes(torch.zeros(2, 4, dtype=torch.uint8), 4, -8, 9, True)


def test_the_ops_pass_opcheck() -> None:
    weight = torch.randn(2, 40)
    codes, scale, zero_point = OPS.quantize_weight(weight, 32, 4, False, 1)
    torch.library.opcheck(OPS.quantize_weight.default, (weight, 32, 4, False, 1))
    torch.library.opcheck(OPS.encode_weight.default, (weight, scale, zero_point, 32, 4))
    torch.library.opcheck(OPS.quantization_error.default, (weight, codes, scale, zero_point, 32))
    torch.library.opcheck(OPS.pack_codes.default, (codes, 4, -8))
    torch.library.opcheck(OPS.unpack_codes.default, (OPS.pack_codes(codes, 4, -8), 4, -8, 40, True))
