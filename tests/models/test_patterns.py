"""Patterns say what really happens: on every family they agree with the channels followed through the model."""

from __future__ import annotations

import pytest
import torch
from tests.models.decoders import MODELS, tiny
from torch import Tensor, nn

from narrowcast.models.follow import follow_channels
from narrowcast.models.patterns import FAMILIES, family_blocks, find_stream, pattern_feeds


def the(names: dict[str, object], *parts: str) -> list[str]:
    return [name for name in names if all(part in name for part in parts)]


@pytest.mark.parametrize("name", MODELS)
def test_every_feed_that_a_pattern_promises_is_seen_in_a_pass(name: str) -> None:
    model, x = tiny(name)
    promised = pattern_feeds(model)
    seen = follow_channels(model, lambda: model(x))
    assert len(promised.usable()) >= 2, "a pattern of the family fits"
    for feed in promised.usable():
        followed = seen.feeds[feed.producer]
        assert torch.equal(feed.free, followed.free), (feed.producer, followed.reason)
        got = {reader.path: reader.columns for reader in followed.readers}
        for reader in feed.readers:
            assert torch.equal(reader.columns, torch.where(got[reader.path] >= 0, got[reader.path], -1)), reader.path
        assert set(got) == {reader.path for reader in feed.readers}


@pytest.mark.parametrize("name", MODELS)
def test_a_pass_finds_no_feed_within_blocks_that_the_patterns_miss(name: str) -> None:
    model, x = tiny(name)
    promised = {feed.producer for feed in pattern_feeds(model).usable()}
    usable = {feed.producer for feed in follow_channels(model, lambda: model(x)).usable()}
    inside = {path for path in usable if ".0." in path or ".1." in path}
    assert inside == promised


def test_every_family_has_a_name_of_its_own_and_edges() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert all(family.edges for family in FAMILIES)


def test_a_block_belongs_to_one_family_though_several_share_names() -> None:
    for name, expected in (
        ("gemma3", "Gemma 2 and 3"),
        ("phi", "Phi"),
        ("phi3", "Phi-3"),
        ("bert", "BERT, RoBERTa, MiniLM"),
    ):
        families = [family.name for family, _ in family_blocks(tiny(name)[0])]
        assert families == [expected] * 2


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma", "phi3"])
def test_decoders_with_a_stream_have_all_their_norms_and_writers(name: str) -> None:
    stream = find_stream(tiny(name)[0])
    assert stream is not None
    assert stream.embedding == "model.embed_tokens"
    assert stream.head == "lm_head"
    assert len(stream.norms) == 5
    assert len(stream.writers) == 4


@pytest.mark.parametrize("name", ["gemma3", "phi", "gpt2", "opt", "bert", "vit"])
def test_other_families_have_no_stream_that_a_rotation_fits(name: str) -> None:
    assert find_stream(tiny(name)[0]) is None


class Basic(nn.Module):
    """A residual block by torchvision's names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(4, 4, 3, padding=1), nn.Identity(), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))))


class Inverted(nn.Module):
    """An inverted residual by torchvision's names."""

    def __init__(self) -> None:
        super().__init__()
        wide = nn.Sequential(nn.Conv2d(4, 8, 1), nn.Identity(), nn.ReLU6())
        deep = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Identity(), nn.ReLU6())
        self.conv = nn.Sequential(wide, deep, nn.Conv2d(8, 4, 1), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x)


def test_convolution_blocks_are_known_without_data_where_nothing_but_a_relu_lies_between() -> None:
    model = nn.Sequential(Basic(), Inverted())
    promised = pattern_feeds(model)
    pairs = {feed.producer: [reader.path for reader in feed.readers] for feed in promised.usable()}
    assert pairs == {"0.conv1": ["0.conv2"], "1.conv.0.0": ["1.conv.1.0"], "1.conv.1.0": ["1.conv.2"]}
    assert float(promised.feeds["1.conv.0.0"].ceiling.min()) == 6
    model[0].relu = nn.GELU()
    refused = pattern_feeds(model).feeds["0.conv1"]
    assert not refused.free.any()
    assert "GELU" in refused.reason


def test_an_unfolded_batchnorm_or_a_hook_lies_between() -> None:
    model = nn.Sequential(Basic())
    model[0].bn1 = nn.BatchNorm2d(4)
    assert "BatchNorm2d" in pattern_feeds(model).feeds["0.conv1"].reason
    model[0].bn1 = nn.Identity()
    handle = model[0].relu.register_forward_hook(lambda module, args, output: None)
    assert "hooks" in pattern_feeds(model).feeds["0.conv1"].reason
    handle.remove()
    assert pattern_feeds(model).feeds["0.conv1"].reason == ""


def test_plain_sequentials_need_no_pattern() -> None:
    body = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Conv2d(4, 5, 1), nn.SiLU(), nn.Conv2d(5, 6, 1)
    )
    pairs = {feed.producer: [reader.path for reader in feed.readers] for feed in pattern_feeds(body).usable()}
    assert pairs == {"0.0": ["1"]}


def test_tied_layers_are_refused_by_patterns_too() -> None:
    model, _ = tiny("llama")
    block = model.model.layers[0]
    model.model.layers[1].mlp.down_proj.weight = block.mlp.down_proj.weight
    feed = pattern_feeds(model).feeds["model.layers.0.mlp.up_proj"]
    assert "tied" in feed.reason
