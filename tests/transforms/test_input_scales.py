"""One static scale per input channel: the product stays what it was."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import conv2d, linear

from narrowcast.transforms import channel_scales, fold_input_scales, with_headroom

LOW = torch.tensor([-1.0, 0.0, -4.0, 0.5, 0.0, -3.0])
HIGH = torch.tensor([1.0, 2.0, 4.0, 1.0, 0.0, -1.0])


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_every_value_of_the_range_has_a_code_and_zero_is_exact(balance: float) -> None:
    scale, zero = channel_scales(LOW, HIGH, balance)
    assert scale.dtype == torch.float32 and zero.dtype == torch.uint8 and bool((scale > 0).all())
    for end in (LOW, HIGH):
        code = (end / scale).round() + zero.float()
        assert bool(((code >= -0.5) & (code <= 255.5)).all())
        assert bool((((code.clamp(0, 255) - zero.float()) * scale - end).abs() <= 0.51 * scale).all())


def test_balance_0_is_one_scale_and_balance_1_is_each_channels_own() -> None:
    scale, _ = channel_scales(LOW, HIGH, 0.0)
    assert torch.equal(scale, torch.full((6,), 8 / 255))
    own, _ = channel_scales(LOW, HIGH, 1.0)
    torch.testing.assert_close(own[:4], torch.tensor([2.0, 2.0, 8.0, 1.0]) / 255)
    between, _ = channel_scales(LOW, HIGH, 0.5)
    assert bool(((own <= between) & (between <= scale)).all())


def test_a_channel_that_was_silent_may_yet_speak() -> None:
    scale, _ = channel_scales(LOW, HIGH, 1.0)
    assert float(scale[4]) == pytest.approx(8 / 255 / 64)


def test_inputs_that_are_zero_everywhere_have_scale_1() -> None:
    scale, zero = channel_scales(torch.zeros(3), torch.zeros(3), 1.0)
    assert torch.equal(scale, torch.ones(3)) and torch.equal(zero, torch.zeros(3, dtype=torch.uint8))


@given(seed=st.integers(0, 100), channels=st.integers(1, 9), balance=st.sampled_from([0.0, 0.5, 0.75, 1.0]))
def test_the_product_with_divided_inputs_is_the_product(seed: int, channels: int, balance: float) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(20, channels, generator=random, dtype=torch.float64) * torch.rand(channels, generator=random)
    weight = torch.randn(4, channels, generator=random, dtype=torch.float64)
    scale, _ = channel_scales(x.amin(0), x.amax(0), balance)
    ratio = (scale / scale.max()).double()
    torch.testing.assert_close(
        linear(x / ratio, fold_input_scales(weight, scale)), linear(x, weight), atol=1e-6, rtol=1e-6
    )


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_grouped_convolutions_scale_the_channels_that_a_row_sees(groups: int) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 5, 5, generator=random, dtype=torch.float64)
    weight = torch.randn(12, 6 // groups, 3, 3, generator=random, dtype=torch.float64)
    scale = torch.rand(6, generator=random) + 0.1
    folded = fold_input_scales(weight.reshape(12, -1), scale, groups).view(weight.shape)
    divided = x / (scale / scale.max()).double().view(6, 1, 1)
    torch.testing.assert_close(
        conv2d(divided, folded, groups=groups), conv2d(x, weight, groups=groups), atol=1e-6, rtol=1e-6
    )


def test_arguments_are_not_changed() -> None:
    weight, scale = torch.ones(2, 6), torch.rand(6) + 0.1
    low, high = LOW.clone(), HIGH.clone()
    fold_input_scales(weight, scale)
    channel_scales(low, high, 1.0)
    assert torch.equal(weight, torch.ones(2, 6)) and torch.equal(low, LOW) and torch.equal(high, HIGH)


def test_headroom_widens_free_bounds_only_and_not_beyond_the_widest_channel() -> None:
    low, high = torch.tensor([0.0, -1.0, -2.0]), torch.tensor([4.0, 3.8, 1.0])
    walls = (torch.tensor([True, False, True]), torch.tensor([False, False, True]))
    wider_low, wider_high = with_headroom(low, high, walls)
    assert wider_low.tolist() == [0.0, -1.25, -2.0]
    assert wider_high.tolist() == [4.0, 4.0, 1.0]
