"""Error metrics against their definitions in numpy and scipy, and at their edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch

from narrowcast.core import QuantSpec, bits_per_weight, cosine, kl_divergence, quantize, sqnr_db
from narrowcast.errors import FormatError


def test_sqnr_is_the_ratio_of_energies_in_decibel() -> None:
    torch.manual_seed(0)
    reference, noise = torch.randn(50, 40), 0.01 * torch.randn(50, 40)
    exact, other = reference.double().numpy(), (reference + noise).double().numpy()
    expected = 10 * np.log10((exact**2).sum() / ((exact - other) ** 2).sum())
    assert sqnr_db(reference, reference + noise) == pytest.approx(expected)


def test_sqnr_of_equal_tensors_is_infinite_and_of_noise_on_silence_minus_infinite() -> None:
    assert sqnr_db(torch.ones(3), torch.ones(3)) == math.inf
    assert sqnr_db(torch.zeros(0), torch.zeros(0)) == math.inf
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf


def test_sqnr_does_not_overflow_or_underflow() -> None:
    assert sqnr_db(torch.full((4,), 3e38), torch.full((4,), 2.7e38)) == pytest.approx(20, abs=1e-4)
    assert sqnr_db(torch.full((4,), 1e-38), torch.full((4,), 0.9e-38)) == pytest.approx(20, abs=1e-4)


def test_int8_of_a_uniform_signal_has_six_decibel_per_bit() -> None:
    torch.manual_seed(0)
    values = torch.rand(64, 256) * 2 - 1
    by_bits = [sqnr_db(values, quantize(values, QuantSpec.parse(f"int{bits}/tensor")).dequantize()) for bits in (6, 8)]
    assert by_bits[1] == pytest.approx(6.02 * 8, abs=0.3)
    assert by_bits[1] - by_bits[0] == pytest.approx(2 * 6.02, abs=0.3)


def test_cosine_is_the_mean_over_rows() -> None:
    reference = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 1.0]])
    candidate = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, -1.0]])
    assert cosine(reference, candidate) == pytest.approx(0.0)
    assert cosine(reference[0], candidate[0]) == 1.0


def test_cosine_of_zero_rows_is_1_only_where_both_are_zero() -> None:
    zero, one = torch.zeros(1, 3), torch.ones(1, 3)
    assert cosine(zero, zero) == 1.0
    assert cosine(zero, one) == 0.0
    assert cosine(torch.zeros(0, 3), torch.zeros(0, 3)) == 1.0


def test_cosine_never_leaves_its_range() -> None:
    torch.manual_seed(0)
    values = torch.randn(1000, 7)
    assert -1.0 <= cosine(values, -3 * values) <= cosine(values, 3 * values) <= 1.0


def test_kl_divergence_is_that_of_scipy() -> None:
    torch.manual_seed(0)
    p, q = torch.rand(100), torch.rand(100)
    assert kl_divergence(p, q) == pytest.approx(scipy.stats.entropy(p.double().numpy(), q.double().numpy()))


def test_kl_divergence_of_counts_does_not_depend_on_their_sum() -> None:
    counts = torch.tensor([3, 0, 5, 2**40])
    assert kl_divergence(counts, counts * 7) == 0.0
    assert kl_divergence(torch.tensor([1, 1]), torch.tensor([2, 0])) == math.inf
    assert kl_divergence(torch.tensor([2, 0]), torch.tensor([1, 1])) == pytest.approx(math.log(2))


@pytest.mark.parametrize("histogram", [[0.0, 0.0], [1.0, -0.5], [math.nan, 1.0], [math.inf, 1.0]])
def test_kl_divergence_of_what_is_no_histogram_is_an_error(histogram: list[float]) -> None:
    with pytest.raises(FormatError, match="the reference is no histogram"):
        kl_divergence(torch.tensor(histogram), torch.ones(2))
    with pytest.raises(FormatError, match="the candidate is no histogram"):
        kl_divergence(torch.ones(2), torch.tensor(histogram))


@pytest.mark.parametrize("metric", [sqnr_db, cosine, kl_divergence])
def test_shapes_that_differ_are_an_error_and_never_broadcast(metric: object) -> None:
    with pytest.raises(FormatError, match=r"got \(2, 3\) and \(3,\)"):
        metric(torch.ones(2, 3), torch.ones(3))  # type: ignore[operator]


def test_bits_per_weight_counts_the_scales() -> None:
    assert bits_per_weight(quantize(torch.ones(4, 64), QuantSpec.parse("int4/group32"))) == 4.5
    assert bits_per_weight(quantize(torch.ones(4, 64), QuantSpec.parse("bf16"))) == 16
