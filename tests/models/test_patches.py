"""input_rows: the vectors that a weight matrix multiplies, against torch's own convolutions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from narrowcast.models.layer_kinds import kind_of
from narrowcast.models.patches import evenly, input_rows


@settings(max_examples=40, deadline=None)
@given(
    groups=st.sampled_from([1, 2, 4]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "reflect", "circular"]),
    kind=st.sampled_from(["Conv1d", "Conv2d", "ConvTranspose2d"]),
)
def test_patches_times_the_weight_matrix_are_the_convolution(
    groups: int, kernel: tuple[int, int], stride: int, padding: int, dilation: int, mode: str, kind: str
) -> None:
    torch.manual_seed(0)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups, "bias": False}
    module: nn.Module
    if kind == "Conv1d":
        module, x = nn.Conv1d(4, 8, kernel[0], padding_mode=mode, **options), torch.randn(2, 4, 9)
    elif kind == "Conv2d":
        module, x = nn.Conv2d(4, 8, kernel, padding_mode=mode, **options), torch.randn(2, 4, 9, 8)
    else:
        options["padding"] = min(padding, dilation * (min(kernel) - 1))
        module, x = nn.ConvTranspose2d(4, 8, kernel, output_padding=stride - 1, **options), torch.randn(2, 4, 5, 6)
    layer_kind = kind_of(module)
    assert layer_kind is not None
    matrix = layer_kind.matrix(module, "weight")
    rows = input_rows(module, x, None)
    product = rows @ matrix.view(groups, -1, matrix.shape[1]).transpose(1, 2)  # [groups, vectors, out / groups]
    with torch.no_grad():
        expected = module(x)
        got = product.permute(1, 0, 2).reshape(2, -1, 8).transpose(1, 2).reshape(expected.shape)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_a_weight_matrix_is_restored_to_its_parameter() -> None:
    for module in (
        nn.Linear(6, 4), nn.Conv1d(4, 8, 3, groups=2), nn.Conv2d(4, 8, 3), nn.ConvTranspose2d(4, 8, 3, groups=2),
    ):  # fmt: skip
        kind = kind_of(module)
        assert kind is not None
        matrix = kind.matrix(module, "weight")
        assert torch.equal(kind.restore(module, "weight", matrix), module.weight)


def test_large_images_give_about_as_many_patches_as_asked_for() -> None:
    rows = input_rows(nn.Conv2d(3, 4, 3), torch.randn(2, 3, 66, 66), 256)
    assert rows.shape[0] == 1 and 2 * 200 < rows.shape[1] <= 2 * 256


def test_tokens_are_taken_as_they_are() -> None:
    x = torch.randn(2, 5, 6)
    assert torch.equal(input_rows(nn.Linear(6, 3), x)[0], x.view(10, 6))


@pytest.mark.parametrize(("rows", "most"), [(3, 5), (5, 5), (100, 7)])
def test_evenly_spread_rows_are_no_more_than_asked_for_and_in_order(rows: int, most: int) -> None:
    chosen = evenly(torch.arange(rows).view(rows, 1), most).flatten().tolist()
    assert len(chosen) == min(rows, most) and chosen == sorted(set(chosen)) and chosen[0] == 0
