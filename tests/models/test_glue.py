"""Glue: what a model computes between two blocks is replayed bit for bit, or not at all."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import narrowcast as nc
from narrowcast.models import Blocks, find_blocks
from narrowcast.models.glue import GlueRecorder
from narrowcast.models.modules import get_module


class Written(nn.Module):
    """A network whose activations and pools are written out in `forward`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 3)
        self.parts = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1)) for _ in "abc")
        self.norm = nn.GroupNorm(2, 4)
        self.register_buffer("shift", torch.tensor(0.5))
        self.head = nn.Linear(16, 5)

    def between(self, x: Tensor, index: int) -> Tensor:
        """What stands in front of a part."""
        return functional.relu(x)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.stem(x), 2)
        for index, part in enumerate(self.parts):
            x = part(self.between(x, index))
        x = functional.adaptive_avg_pool2d(self.norm(x) * 2 + self.shift, 2)
        return self.head(x.view(x.size(0), -1))


def images(rows: int = 2) -> Tensor:
    return torch.randn(rows, 3, 18, 18, generator=torch.Generator().manual_seed(rows))


def blocks_of(model: nn.Module, x: Tensor) -> Blocks:
    layers = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        return find_blocks(model.eval(), layers, lambda: model(x))


def linked(model: nn.Module) -> dict[str, bool]:
    return {block.path: block.link is not None for block in blocks_of(model, images()).blocks}


def test_functions_and_modules_between_two_blocks_give_the_second_one_s_inputs() -> None:
    model = Written()
    blocks = blocks_of(model, images()).blocks
    calls: dict[str, Any] = {}
    for block in blocks:
        module = get_module(model, block.path)
        module.register_forward_pre_hook(lambda m, a, k, p=block.path: calls.update({p: (a, k)}), with_kwargs=True)
    other = images() * 3
    with torch.no_grad():
        model(other)
        for before, block in itertools.pairwise(blocks):
            entry = calls[before.path]
            output = get_module(model, before.path)(*entry[0])
            kept = output.clone()
            assert block.link is not None, block.path
            followed = block.link.follow(entry, output)
            assert followed is not None and torch.equal(followed[0][0], calls[block.path][0][0]), block.path
            assert torch.equal(output, kept), "what the block gave is not written to"


def test_glue_is_not_replayed_on_other_shapes() -> None:
    block = blocks_of(Written(), images()).blocks[1]
    assert block.link is not None
    with torch.no_grad():
        assert block.link.follow(((images(3),), {}), torch.randn(3, 4, 16, 16)) is None


class InPlace(Written):
    def between(self, x: Tensor, index: int) -> Tensor:
        return functional.relu(x, inplace=True)


class Skipping(Written):
    def between(self, x: Tensor, index: int) -> Tensor:
        if index == 0:
            self.first = x
        return x + self.first.mean() if index == 2 else x


class Branching(Written):
    def between(self, x: Tensor, index: int) -> Tensor:
        return x * 2 if index == 1 and x.sum() > 0 else x + 1


class Tied(Written):
    def between(self, x: Tensor, index: int) -> Tensor:
        return x * self.head.weight.mean() if index == 1 else x


class Indexed(Written):
    def between(self, x: Tensor, index: int) -> Tensor:
        x = x + 0
        x[:, 0] = 1
        return x


def test_a_function_that_writes_to_what_it_gets_is_replayed_on_a_copy() -> None:
    assert all(list(linked(InPlace()).values())[1:])


@pytest.mark.parametrize(
    ("model", "part"),
    [(Skipping, "parts.2"), (Branching, "parts.1"), (Tied, "parts.1"), (Indexed, "parts.1")],
    ids=["an earlier block has a part", "values are read", "a weight that will change", "written by index"],
)
def test_what_more_than_the_block_before_decides_is_not_replayed(model: type[Written], part: str) -> None:
    assert linked(model())[part] is False


@pytest.mark.parametrize("model", [Written, InPlace, Skipping, Branching, Tied, Indexed])
def test_quantizing_gives_the_same_bits_with_and_without_glue(
    model: type[Written], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [images(4), images(3)]  # the last batch has another shape
    recipe = {"rule": [{"weight": "int4/channel", "method": "gptq"}]}
    replayed = nc.quantize(model().eval(), recipe, data, progress=False).model.state_dict()
    monkeypatch.setattr(GlueRecorder, "slot", lambda self, tensor: None)
    run_again = nc.quantize(model().eval(), recipe, data, progress=False).model.state_dict()
    assert all(torch.equal(tensor, run_again[name]) for name, tensor in replayed.items())


def test_no_block_runs_again_for_every_block_behind_it() -> None:
    def calls_of_the_stem(parts: int) -> int:
        model = Written().eval()
        model.parts = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)) for _ in range(parts)
        )
        model.head = nn.Linear(16, 5)
        count = 0

        def counting(x: Tensor, *args: Any) -> Tensor:
            nonlocal count
            count += 1
            return functional.relu(x)

        model.between = counting  # type: ignore[method-assign]
        nc.quantize(model, {"rule": [{"weight": "int4/channel", "method": "gptq"}]}, [images(4)], progress=False)
        return count

    few, many = calls_of_the_stem(3), calls_of_the_stem(12)
    assert many <= 4.5 * few, "linear in the number of blocks, not quadratic"
