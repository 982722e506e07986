"""linear_weight_only: float inputs times stored weights; every format, tier and odd size within its stated bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tests.kernels.stored_cases import SPECS, stored_weight
from torch import Tensor

from narrowcast.kernels.reference_linear import FUSED
from narrowcast.kernels.reference_weight_only import linear_weight_only

Tiers = Callable[[], Iterator[str]]
OPS = torch.ops.narrowcast
# Error of an output relative to sum |x| |w|, and of its own rounding: docs/numerics.md, section on float inputs.
PRODUCT = {torch.float32: 2.0**-16, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-16}
ROUNDING = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def assert_within_bound(got: Tensor, x: Tensor, table: Tensor, bias: Tensor | None) -> None:
    exact = x.double() @ table.double().t() + (0 if bias is None else bias.double())
    magnitude = x.double().abs() @ table.double().abs().t() + (0 if bias is None else bias.double().abs())
    allowed = PRODUCT[x.dtype] * magnitude + ROUNDING[x.dtype] * exact.abs() + 1e-7
    assert got.dtype == x.dtype and got.shape == exact.shape
    assert ((got.double() - exact).abs() <= allowed).all()


@pytest.mark.parametrize("spec", SPECS)
def test_every_format_and_size_stays_within_the_bound(every_tier: Tiers, spec: str) -> None:
    for columns, depth in ((1, 1), (5, 33), (70, 640), (49, 301)):
        (*tensors, bits, group), table = stored_weight(spec, columns, depth)
        bias = torch.randn(columns)
        for rows in (1, 2, 3, 4, 7, 9, 30):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = torch.randn(rows, depth).to(dtype)
                for _ in every_tier():
                    assert_within_bound(OPS.linear_weight_only(x, *tensors, bias, bits, group), x, table, bias)


def test_rows_beyond_one_panel_and_depth_beyond_one_chunk(every_tier: Tiers) -> None:
    (*tensors, bits, group), table = stored_weight("int4/group32/asym", 100, 2100)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(200, 2100).to(dtype)
        for _ in every_tier():
            assert_within_bound(OPS.linear_weight_only(x, *tensors, None, bits, group), x, table, None)


def test_bfloat16_inputs_see_unrounded_weights_when_they_are_few(every_tier: Tiers) -> None:
    (*tensors, bits, group), table = stored_weight("int8", 40, 512)
    x = torch.randn(2, 512).bfloat16()
    exact = x.double() @ table.double().t()
    for tier in every_tier():
        if tier == "avx512vnni":
            got = OPS.linear_weight_only(x, *tensors, None, bits, group)
            assert torch.equal(got, exact.bfloat16()) or ((got.double() - exact).abs() <= exact.abs() * 2.0**-8).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_input_that_is_not_finite_spoils_its_own_row_only(every_tier: Tiers, bad: float) -> None:
    (*tensors, bits, group), _ = stored_weight("int4/group32/asym", 9, 160)
    for rows in (3, 20):
        x = torch.randn(rows, 160)
        clean = x.clone()
        x[1, 77] = bad
        for _ in every_tier():
            got = OPS.linear_weight_only(x, *tensors, None, bits, group)
            assert not got[1].isfinite().any()
            others = [row for row in range(rows) if row != 1]
            assert torch.equal(got[others], OPS.linear_weight_only(clean, *tensors, None, bits, group)[others])


def test_denormal_inputs_count_as_themselves_or_as_zero(every_tier: Tiers) -> None:
    (*tensors, bits, group), table = stored_weight("int8", 8, 64)
    for rows in (1, 12):
        x = torch.full((rows, 64), 1e-40)
        x[:, 0] = 1e-30
        exact = x.double() @ table.double().t()
        for _ in every_tier():
            got = OPS.linear_weight_only(x, *tensors, None, bits, group)
            lost = 1e-40 * table.double().abs().sum(1)
            assert ((got.double() - exact).abs() <= lost + 2.0**-16 * x.double().abs() @ table.double().abs().t()).all()


def test_empty_strided_misaligned_and_vector_inputs(every_tier: Tiers) -> None:
    (*tensors, bits, group), table = stored_weight("int4/group32", 10, 96)
    strided, misaligned = torch.randn(96, 5).t(), torch.randn(5 * 96 + 1)[1:].view(5, 96)
    for _ in every_tier():
        for x in (strided, misaligned, torch.randn(96), torch.randn(2, 3, 96)):
            flat = x.reshape(-1, 96)
            got = OPS.linear_weight_only(x, *tensors, None, bits, group)
            assert got.shape == (*x.shape[:-1], 10)
            assert_within_bound(got.reshape(-1, 10), flat, table, None)
        assert OPS.linear_weight_only(torch.empty(0, 96), *tensors, None, bits, group).shape == (0, 10)
        assert OPS.linear_weight_only(torch.empty(2, 0, 96), *tensors, None, bits, group).shape == (2, 0, 10)
    no_depth = (tensors[0][:, :0], tensors[1][:, :0], None, None)
    assert (
        OPS.linear_weight_only(torch.empty(3, 0), *no_depth, torch.ones(10), bits, group).tolist() == [[1.0] * 10] * 3
    )


@pytest.mark.parametrize("fused", ["relu", "gelu", "gelu_tanh", "silu"])
def test_an_activation_function_is_applied_behind_the_bias(every_tier: Tiers, fused: str) -> None:
    (*tensors, bits, group), _ = stored_weight("int4/group32", 10, 128)
    bias = torch.randn(10)
    for rows in (2, 11):
        x = torch.randn(rows, 128)
        for _ in every_tier():
            plain = OPS.linear_weight_only(x, *tensors, bias, bits, group)
            expected = FUSED[fused](plain)
            got = OPS.linear_weight_only(x, *tensors, bias, bits, group, fused)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(RuntimeError, match="fused 'tanh' is not known"):
        OPS.linear_weight_only(x, *tensors, bias, bits, group, "tanh")


@pytest.mark.usefixtures("threads")
def test_threads_do_not_change_anything(every_tier: Tiers) -> None:
    (*tensors, bits, group), _ = stored_weight("int4/group32/asym", 300, 512)
    for _ in every_tier():
        for rows, dtype in ((1, torch.float32), (50, torch.float32), (50, torch.bfloat16)):
            x = torch.randn(rows, 512).to(dtype)
            results = []
            for count in (1, 2, 3, 4):
                torch.set_num_threads(count)
                results.append(OPS.linear_weight_only(x, *tensors, None, bits, group))
            assert all(torch.equal(results[0], other) for other in results)


def test_wrong_arguments_raise() -> None:
    (*tensors, bits, group), _ = stored_weight("int4/group32", 6, 64)
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16"):
        OPS.linear_weight_only(torch.randn(1, 64).double(), *tensors, None, bits, group)
    with pytest.raises(RuntimeError, match="cannot hold 60 codes"):
        OPS.linear_weight_only(torch.randn(1, 60), *tensors, None, bits, group)
    with pytest.raises(RuntimeError, match=r"bias must have shape \[6\]"):
        OPS.linear_weight_only(torch.randn(1, 64), *tensors, torch.randn(5), bits, group)
    with pytest.raises(RuntimeError, match="0 dimensions"):
        OPS.linear_weight_only(torch.tensor(1.0), *tensors, None, bits, group)


def test_opcheck_passes() -> None:
    (*tensors, bits, group), _ = stored_weight("int4/group32/asym", 6, 96)
    x, bias = torch.randn(2, 96), torch.randn(6)
    torch.library.opcheck(OPS.linear_weight_only.default, (x, *tensors, bias, bits, group))
    expected = linear_weight_only(x, *tensors, bias, bits, group)
    torch.testing.assert_close(OPS.linear_weight_only(x, *tensors, bias, bits, group), expected)
