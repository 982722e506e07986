"""Rotations: every matrix is orthogonal, Hadamard where one is known, and a stream keeps its function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard

from narrowcast.transforms import Rotate, hadamard_matrix, rotate_columns, rotate_rows


@pytest.mark.parametrize("width", [1, 2, 4, 64, 12, 20, 24, 28, 36, 60, 576, 768, 896, 2560, 3584, 5120])
def test_hadamard_matrices_of_the_widths_of_decoders(width: int) -> None:
    made = hadamard_matrix(width)
    assert made is not None
    assert bool((made.abs() == 1).all())
    rows = made[:: max(1, width // 40)]  # all of them would take seconds at 5120
    expected = torch.zeros_like(rows)
    expected[torch.arange(rows.shape[0]), torch.arange(width)[:: max(1, width // 40)]] = width
    assert torch.equal(rows @ made.t(), expected)


def test_powers_of_two_are_sylvesters_as_scipy_has_them() -> None:
    made = hadamard_matrix(32)
    assert made is not None
    assert np.array_equal(made.numpy(), hadamard(32))


@pytest.mark.parametrize("width", [3, 6, 7, 172, 0])
def test_other_widths_have_none_here_and_take_a_random_matrix_that_says_so(width: int) -> None:
    if width == 172:
        assert hadamard_matrix(172) is None
    if width:
        matrix, name = Rotate().matrix(width)
        assert "QR" in name
        torch.testing.assert_close(matrix @ matrix.t(), torch.eye(width, dtype=torch.float64))


@given(width=st.integers(1, 40), seed=st.integers(0, 100), kind=st.sampled_from(["hadamard", "random"]))
def test_every_rotation_is_orthogonal_and_depends_on_its_seed_alone(width: int, seed: int, kind: str) -> None:
    matrix, _ = Rotate(kind=kind, seed=seed).matrix(width)  # type: ignore[arg-type]
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(width, dtype=torch.float64))
    assert torch.equal(matrix, Rotate(kind=kind, seed=seed).matrix(width)[0])  # type: ignore[arg-type]


@given(seed=st.integers(0, 100))
def test_a_reader_behind_a_norm_and_a_writer_keep_their_function(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = 12
    x, gain = torch.randn(9, width, generator=generator).double(), torch.randn(width, generator=generator).double()
    reader, writer = (torch.randn(s, generator=generator).double() for s in ((5, width), (width, 5)))
    bias = torch.randn(width, generator=generator).double()
    q, _ = Rotate(seed=seed).matrix(width)

    def norm(values: torch.Tensor) -> torch.Tensor:
        return values / (values.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    expected = x + (norm(x) * gain) @ reader.t() @ writer.t() + bias
    rows, moved = rotate_rows(writer, bias, q)
    assert moved is not None
    got = x @ q + norm(x @ q) @ rotate_columns(reader, q, gain).t() @ rows.t() + moved
    torch.testing.assert_close(got, expected @ q)


def test_an_outlier_is_spread_evenly() -> None:
    x = torch.zeros(64).double()
    x[5] = 8.0
    q, name = Rotate().matrix(64)
    assert "Hadamard" in name
    assert torch.allclose((x @ q).abs(), torch.ones(64).double())
