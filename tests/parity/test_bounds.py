"""Bounds are stated from the arithmetic of both sides, before anything is compared."""

from __future__ import annotations

import pytest
import torch

from narrowcast.errors import FormatError
from narrowcast.parity.bounds import ALL_EXACT, EXACT, Arithmetic, Bound, bound_for, bound_for_output, parse_tolerance
from narrowcast.parity.difference import Tally

FLOAT = Arithmetic("float", "float32")
INTEGER = Arithmetic("integer", "int8/channel x int8/token")
WEIGHTS = Arithmetic("weights", "int4/group32/asym")
NETWORK = Arithmetic("network", INTEGER.formats)


def chosen(ours: Arithmetic, theirs: Arithmetic, *, same_runtime: bool = True, same_kernels: bool = True) -> str:
    bound = bound_for(ours, theirs, same_runtime=same_runtime, same_kernels=same_kernels)
    return "none" if bound is None else bound.words


def test_integer_arithmetic_is_exact_whatever_kernels_run() -> None:
    assert chosen(INTEGER, INTEGER, same_kernels=False).startswith("equal: the same integer arithmetic")
    assert chosen(NETWORK, NETWORK, same_kernels=False).startswith("equal")


def test_a_function_behind_the_sums_is_exact_only_on_the_same_kernels() -> None:
    gelu = Arithmetic("integer", INTEGER.formats, behind="gelu")
    relu = Arithmetic("integer", INTEGER.formats, behind="relu")
    assert chosen(gelu, gelu).startswith("equal")
    assert chosen(gelu, gelu, same_kernels=False).startswith("1.5e-6 + 1e-6 |y|: gelu")
    assert chosen(INTEGER, gelu).startswith("1.5e-6 + 1e-6 |y|: gelu")
    assert chosen(INTEGER, relu, same_kernels=False).startswith("equal")


def test_float_sums_are_bounded_by_their_products_where_kernels_differ() -> None:
    assert chosen(WEIGHTS, WEIGHTS).startswith("equal")
    assert chosen(WEIGHTS, WEIGHTS, same_kernels=False).startswith("2^-15 sum |x w|")
    assert chosen(FLOAT, FLOAT).startswith("equal: the same float kernels")
    assert chosen(FLOAT, FLOAT, same_runtime=False).startswith("1e-5 of max |y|")
    assert chosen(FLOAT, Arithmetic("float", "float32", folded=True)).startswith("1e-5 of max |y|")


@pytest.mark.parametrize("other", [FLOAT, WEIGHTS, Arithmetic("integer", "int4/channel x int8/token")])
def test_other_formats_have_no_bound(other: Arithmetic) -> None:
    assert chosen(INTEGER, other) == "none"
    assert bound_for_output([EXACT, None]) is None


def test_an_output_is_exact_where_all_layers_are() -> None:
    assert bound_for_output([EXACT, EXACT]) == ALL_EXACT
    loose = bound_for(WEIGHTS, WEIGHTS, same_runtime=True, same_kernels=False)
    found = bound_for_output([EXACT, loose])
    assert found is not None and found.sqnr_db == 20


def test_the_terms_of_a_bound_add_up() -> None:
    bound = Bound("", absolute=1.0, relative=0.1, of_largest=0.01, of_products=0.5)
    limit = bound.limit(torch.tensor([10.0]), 100.0, torch.tensor([4.0]))
    assert limit.tolist() == pytest.approx([1 + 1 + 1 + 2])


def test_numbers_beyond_the_bound_are_counted_one_by_one() -> None:
    tally = Tally()
    tally.add(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.5, 3.01]), Bound("", absolute=0.1), 4)
    found = tally.result()
    assert found is not None
    assert (found.elements, found.differing, found.beyond, found.first_batch) == (3, 2, 1, 4)
    assert found.max_absolute == 0.5 and not found.within(Bound("", absolute=0.1))


def test_the_sign_of_zero_is_no_difference_and_neither_are_equal_infinities() -> None:
    tally = Tally()
    tally.add(torch.tensor([0.0, float("-inf")]), torch.tensor([-0.0, float("-inf")]), EXACT, 0)
    found = tally.result()
    assert found is not None and found.equal


def test_tolerances_are_read_as_written() -> None:
    assert parse_tolerance("exact").limit(torch.ones(1), 1.0, None).item() == 0
    assert parse_tolerance("37.5 dB").sqnr_db == 37.5
    assert parse_tolerance(1e-3).of_largest == 1e-3
    with pytest.raises(FormatError):
        parse_tolerance("1e3")
