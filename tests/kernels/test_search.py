"""search_range: every tier finds the reference's scales and zero points, bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narrowcast.core import QuantSpec
from narrowcast.kernels.ops import OPS as TABLE
from narrowcast.methods import Rtn, Seen

OPS = torch.ops.narrowcast
Walk = Callable[[], Iterator[str]]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(
    rows=st.integers(1, 7),
    columns=st.integers(1, 90),
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    group=st.sampled_from([1, 7, 16, 32, 64, 200]),
    symmetric=st.booleans(),
    scale_format=st.integers(0, 2),
    weighted=st.booleans(),
    seed=st.integers(0, 10**6),
    factor=st.sampled_from([1.0, 1e-7, 1e-30, 1e3]),
)
def test_scales_and_zero_points_are_those_of_the_reference(
    every_tier: Walk,
    rows: int,
    columns: int,
    bits: int,
    group: int,
    symmetric: bool,
    scale_format: int,
    weighted: bool,
    seed: int,
    factor: float,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * factor
    weight[0] = weight[0].abs()
    weight[-1, : columns // 2] = 0
    importance = torch.rand(columns, generator=generator) + 1e-3 if weighted else None
    arguments = (weight, importance, group, bits, symmetric, scale_format, 2)
    expected = TABLE["search_range"].reference(*arguments)
    for tier in every_tier():
        got = OPS.search_range(*arguments)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), tier


def test_a_long_block_and_many_threads_give_the_same(every_tier: Walk) -> None:
    weight = torch.randn(70, 1001)
    expected = TABLE["search_range"].reference(weight, None, 1001, 4, False, 0, 1)
    for count in (1, 3):
        torch.set_num_threads(count)
        for _ in every_tier():
            got = OPS.search_range(weight, None, 1001, 4, False, 0, 1)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    torch.set_num_threads(1)


@pytest.mark.parametrize("text", ["int4/group32/asym", "int3/group16", "int4/channel", "int8/group32/scale:e8m0"])
def test_the_method_gives_what_the_reference_method_gives(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, spec = torch.randn(20, 70), QuantSpec.parse(text)
    seen = Seen(importance=torch.rand(70), samples=1)
    natively = Rtn(range="mse").quantize(weight, spec, seen)
    monkeypatch.setattr("narrowcast.methods.native.has_native_body", lambda spec: False)
    assert Rtn(range="mse").quantize(weight, spec, seen) == natively


def test_bad_arguments_are_python_errors() -> None:
    weight = torch.randn(2, 32)
    with pytest.raises(RuntimeError, match="weight must be float32"):
        OPS.search_range(weight.half(), None, 32, 4, True, 0, 2)
    with pytest.raises(RuntimeError, match=r"importance must have shape \[32\]"):
        OPS.search_range(weight, torch.ones(31), 32, 4, True, 0, 2)
    with pytest.raises(RuntimeError, match="group must be in"):
        OPS.search_range(weight, None, 0, 4, True, 0, 2)
    with pytest.raises(RuntimeError, match="refinements"):
        OPS.search_range(weight, None, 32, 4, True, 0, -1)
    with pytest.raises(RuntimeError, match="bits must be"):
        OPS.search_range(weight, None, 32, 7, True, 0, 1)


def test_the_op_passes_opcheck() -> None:
    torch.library.opcheck(OPS.search_range.default, (torch.randn(3, 40), torch.rand(40), 32, 4, False, 1, 1))
