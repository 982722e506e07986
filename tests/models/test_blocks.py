"""find_blocks: the parts of a model in the order in which they run, and how each one's inputs follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowcast.models import Blocks, find_blocks
from narrowcast.models.modules import get_module


class Mixer(nn.Module):
    """A residual block of two linear layers that also reads a table."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)

    def forward(self, x: Tensor, table: Tensor, *, scale: bool = True) -> tuple[Tensor, None]:
        return x + self.down(self.up(x + table).relu()), None


class Decoder(nn.Module):
    """Embedding, blocks in a list, a norm as glue, a head."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(Mixer() for _ in range(blocks))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 20)
        self.register_buffer("position", torch.randn(5, 8))

    def forward(self, indices: Tensor) -> Tensor:
        x = self.table(indices)
        for layer in self.layers:
            x = layer(x, self.position, scale=True)[0]
        return self.head(self.norm(x))


class Stages(nn.Module):
    """Two stages of convolutions, a bare layer between them, a functional in front of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(
            nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Conv2d(4, 4, 1)) for _ in "ab")),
            nn.Conv2d(4, 4, 1),
            nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()) for _ in "ab")),
        )
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(x).mean((2, 3)))


def layers_of(model: nn.Module) -> list[str]:
    kinds = (nn.Linear, nn.Conv2d, nn.Embedding, nn.LSTM)
    return [path for path, module in model.named_modules() if isinstance(module, kinds)]


def found(model: nn.Module, *args: Any) -> Blocks:
    with torch.no_grad():
        return find_blocks(model.eval(), layers_of(model), lambda: model(*args))


INDICES = torch.arange(10).view(2, 5)


def test_members_of_a_list_are_blocks_and_what_stands_around_them_are_blocks_of_one_layer() -> None:
    result = found(Decoder(), INDICES)
    assert [block.path for block in result.blocks] == ["table", "layers.0", "layers.1", "layers.2", "head"]
    assert result.blocks[2].layers == ("layers.1.up", "layers.1.down")
    assert result.loose == () and result.notes == ()


def test_stages_are_taken_apart_into_their_blocks_and_single_convolutions_in_a_row_are_one() -> None:
    result = found(Stages(), torch.randn(2, 4, 12, 12))
    assert [block.path for block in result.blocks] == [
        "stages.0.0", "stages.0.1", "stages.1", "stages.2", "head",
    ]  # fmt: skip
    assert result.blocks[0].layers == ("stages.0.0.0", "stages.0.0.2")


def test_modules_of_one_class_side_by_side_are_blocks() -> None:
    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Mixer(), Mixer()
            self.third = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.third(self.second(self.first(x, x)[0], x)[0])

    result = found(Pairs(), torch.randn(2, 8))
    assert [block.path for block in result.blocks] == ["first", "second", "third.0", "third.1"]


def test_towers_of_one_class_are_not_blocks_but_what_repeats_in_them_is() -> None:
    class Towers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = Decoder(2), Decoder(2)

        def forward(self, indices: Tensor) -> Tensor:
            return self.left(indices) + self.right(indices)

    paths = [block.path for block in found(Towers(), INDICES).blocks]
    assert "left" not in paths and {"left.layers.0", "right.layers.1"} < set(paths)


def test_a_block_is_linked_to_the_one_before_where_nothing_else_has_a_part_in_its_inputs() -> None:
    links = {block.path: block.link is not None for block in found(Decoder(), INDICES).blocks}
    # the position table of the first block comes from neither input nor output of the embedding
    assert links == {"table": False, "layers.0": False, "layers.1": True, "layers.2": True, "head": True}


def test_following_a_link_gives_what_the_block_is_called_with() -> None:
    model = Decoder()
    blocks = found(model, INDICES).blocks
    other = torch.randint(0, 20, (3, 5))
    calls: dict[str, Any] = {}
    for block in blocks:
        module = get_module(model, block.path)
        module.register_forward_pre_hook(lambda m, a, k, p=block.path: calls.update({p: (a, k)}), with_kwargs=True)
    model(other)
    before = calls["layers.1"]
    output = model.layers[1](*before[0], **before[1])
    link = blocks[3].link
    assert link is not None
    followed = link.follow(before, output)
    assert followed is not None
    args, kwargs = followed
    assert kwargs == {"scale": True} and len(args) == 2
    assert torch.equal(args[0], calls["layers.2"][0][0]) and args[1] is model.position


def test_a_tensor_that_is_written_to_in_between_is_another_tensor() -> None:
    class Written(Decoder):
        def forward(self, indices: Tensor) -> Tensor:
            x = self.table(indices)
            for layer in self.layers:
                x = layer(x, self.position)[0]
                x += 1
            return self.head(x)

    assert all(block.link is None for block in found(Written(), INDICES).blocks)


def test_a_part_that_runs_twice_makes_the_whole_model_one_block() -> None:
    class Shared(Decoder):
        def forward(self, indices: Tensor) -> Tensor:
            x = self.table(indices)
            for layer in [*self.layers, *self.layers]:
                x = layer(x, self.position)[0]
            return self.head(x)

    model = Shared()
    result = found(model, INDICES)
    assert [block.path for block in result.blocks] == [""]
    assert sorted(result.blocks[0].layers) == sorted(layers_of(model))
    assert "layers.0 runs 2 times" in result.notes[0]


def test_a_layer_that_is_used_from_outside_of_its_block_makes_the_whole_model_one_block() -> None:
    class Reaching(Decoder):
        def forward(self, indices: Tensor) -> Tensor:
            x = self.table(indices)
            x = x + self.layers[0].down(self.layers[0].up(x))
            return self.head(self.layers[1](x, self.position)[0])

    result = found(Reaching(), INDICES)
    assert [block.path for block in result.blocks] == [""]
    assert "outside" in result.notes[0]


def test_what_never_runs_and_a_layer_that_runs_often_are_left_over() -> None:
    class Odd(Decoder):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.often = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, indices: Tensor) -> Tensor:
            x = self.often(self.often(self.table(indices)))
            for layer in self.layers:
                x = layer(x, self.position)[0]
            return self.head(x)

    result = found(Odd(), INDICES)
    assert set(result.loose) == {"unused", "often"}
    assert [block.path for block in result.blocks] == ["table", "layers.0", "layers.1", "layers.2", "head"]
    assert "often" in result.notes[0] and "unused" not in result.notes[0]


def test_data_that_never_calls_the_model_itself_gives_one_block() -> None:
    model = Decoder()
    result = find_blocks(model, layers_of(model), lambda: model.head(torch.randn(2, 8)))
    assert [block.path for block in result.blocks] == [""]
    assert "never its forward" in result.notes[0]


def test_only_the_first_of_several_passes_is_looked_at() -> None:
    model = Decoder()
    result = find_blocks(model, layers_of(model), lambda: [model(INDICES) for _ in range(3)])
    assert len(result.blocks) == 5 and not result.notes


def test_the_bytes_of_a_row_are_those_of_inputs_and_outputs() -> None:
    block = found(Decoder(), INDICES).blocks[2]
    x = 2 * 5 * 8 * 4  # rows, tokens, features, bytes
    assert block.row_bytes == (2 * x + 5 * 8 * 4) / 2


def test_looking_leaves_no_hooks_behind() -> None:
    model = Decoder()
    found(model, INDICES)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2"])
def test_transformers_models_fall_into_their_layers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
    if family == "bert":
        model = transformers.BertModel(transformers.BertConfig(vocab_size=40, **sizes))
        prefix = "encoder.layer."
    elif family == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=40, use_cache=False, **sizes))
        prefix = "model.layers."
    else:
        config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=16, use_cache=False)
        model = transformers.GPT2LMHeadModel(config)
        prefix = "transformer.h."
    from narrowcast.models import TorchModel

    adapter = TorchModel(model)
    paths = [s.path for layer in adapter.layers() if layer.type != "Parameter" for s in layer.sites]
    result = find_blocks(adapter.model, dict.fromkeys(paths), lambda: adapter.model(INDICES))
    repeated = [block for block in result.blocks if block.path.startswith(prefix)]
    assert [block.path for block in repeated] == [f"{prefix}{i}" for i in range(3)]
    assert all(block.link is not None for block in repeated[1:]), "every layer gets the output of the one before"
