"""Channels are followed through cuts, joins, groups of heads and padding; what is not linear in them stops them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.models.feeds import Feed
from narrowcast.models.follow import follow_channels


class Net(nn.Module):
    """A producer, a reader, and the function between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], *, width: int = 6, reads: int = 6) -> None:
        super().__init__()
        self.first, self.second, self.between = nn.Linear(4, width), nn.Linear(reads, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.between(self.first(x)))


def feed(between: Callable[[Tensor], Tensor], **sizes: int) -> Feed:
    torch.manual_seed(0)
    model = Net(between, **sizes).eval()
    return follow_channels(model, lambda: model(torch.randn(2, 5, 4))).feeds["first"]


LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda h: h,
    "relu": torch.relu,
    "relu in place": lambda h: F.relu(h, inplace=True),
    "leaky": F.leaky_relu,
    "clamp at zero": lambda h: h.clamp(min=0),
    "number": lambda h: 0.5 * h / 3,
    "mask": lambda h: h * torch.ones(1, 5, 1),
    "dropout": lambda h: F.dropout(h, training=False),
    "mixture of positions": lambda h: torch.softmax(torch.randn(2, 5, 5), -1) @ h,
    "heads and back": lambda h: h.view(2, 5, 3, 2).transpose(1, 2).transpose(1, 2).reshape(2, 5, 6),
    "mean over positions": lambda h: h.mean(1),
    "dtype": lambda h: h.double().contiguous().clone().float(),
}


@pytest.mark.parametrize("name", LINEAR)
def test_what_lets_a_positive_factor_through_is_passed(name: str) -> None:
    found = feed(LINEAR[name])
    assert found.free.all(), found.reason
    assert found.readers[0].columns.tolist() == list(range(6))


STOPS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "silu": F.silu,
    "softmax": lambda h: h.softmax(-1),
    "add": lambda h: h + 1,
    "pow": lambda h: h**2,
    "square by product": lambda h: h * h,
    "norm": lambda h: F.layer_norm(h, (6,)),
    "clamp elsewhere": lambda h: h.clamp(-1, 1),
    "swish by hand": lambda h: h * torch.sigmoid(h),
    "divided by": lambda h: 1 / h,
    "compared": lambda h: h * (h > 0.1),
    "set in place": lambda h: h.add_(1),
    "assigned": lambda h: h.index_fill(1, torch.tensor([0]), 1.0),
    "rows mixed": lambda h: h.transpose(1, 2) @ torch.randn(5, 6),
}


@pytest.mark.parametrize("name", STOPS)
def test_what_does_not_stops_the_channels_with_a_reason(name: str) -> None:
    found = feed(STOPS[name])
    assert not found.free.any()
    assert found.reason


def test_cuts_joins_and_repeats_are_read_off_at_the_reader() -> None:
    cut = feed(lambda h: h[..., 2:5], reads=3)
    assert cut.readers[0].columns.tolist() == [2, 3, 4]
    assert cut.free.tolist() == [False, False, True, True, True, False]
    assert cut.reason == "no layer reads it"
    joined = feed(lambda h: torch.cat([torch.zeros(2, 5, 1), h, torch.ones(2, 5, 1)], -1), reads=8)
    assert joined.readers[0].columns.tolist() == [-1, 0, 1, 2, 3, 4, 5, -1]
    heads = feed(lambda h: h.view(2, 5, 3, 2).repeat_interleave(2, 2).flatten(2), reads=12)
    assert heads.readers[0].columns.tolist() == [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5]
    half = feed(lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1], reads=3)
    assert half.free.tolist() == [False] * 3 + [True] * 3
    assert "silu" in half.reason


@pytest.mark.parametrize("groups", [1, 2])
def test_attention_passes_values_and_stops_queries(groups: int) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(4, 8), nn.Linear(4, 8 // groups), nn.Linear(4, 8 // groups)
            self.o = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (m(x).unflatten(-1, (-1, 2)).transpose(1, 2) for m in (self.q, self.k, self.v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups > 1)
            return self.o(mixed.transpose(1, 2).flatten(2))

    model = Attention().eval()
    feeds = follow_channels(model, lambda: model(torch.randn(2, 5, 4))).feeds
    assert not feeds["q"].free.any()
    assert not feeds["k"].free.any()
    assert feeds["v"].free.all()
    column = torch.arange(8)
    expected = column if groups == 1 else column // 4 * 2 + column % 2
    assert feeds["v"].readers[0].columns.tolist() == expected.tolist()


def test_images_go_through_padding_pooling_flattening_and_a_clip() -> None:
    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Linear(16, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(F.pad(F.relu6(self.a(x)), (0, 1, 0, 1)), 2)
            return self.c(F.adaptive_avg_pool2d(self.b(x), 2).flatten(1))

    model = Image().eval()
    feeds = follow_channels(model, lambda: model(torch.randn(2, 3, 12, 12))).feeds
    assert feeds["a"].free.all()
    assert feeds["a"].ceiling.tolist() == [6.0] * 4
    assert not feeds["a"].shifts.any(), "a constant does not go on into the padding"
    assert feeds["b"].readers[0].columns.tolist() == [i // 4 for i in range(16)]


def test_following_leaves_no_hooks_and_changes_nothing() -> None:
    model, x = Net(torch.relu).eval(), torch.randn(2, 5, 4)
    expected = model(x)
    follow_channels(model, lambda: model(x))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(model(x), expected)
