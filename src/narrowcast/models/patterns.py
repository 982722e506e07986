"""Which layer feeds which, as data, for families of models by the names of their modules.

A family's names stand in every block under one prefix; it fits a block when all of them are there. With data the
channels are followed through the model itself (`follow`), which knows what really happens; patterns serve where there
is no data, and say where the residual stream of a decoder is, which rotations need.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from narrowcast.models.feeds import Feed, Feeds, Reader
from narrowcast.models.rewrite import as_norm, input_channels, layer_kind, looks_like_norm, parameters_of, weight_users
from narrowcast.nn import FoldedBatchNorm

Through = Literal["", "values", "product"]


@dataclass(frozen=True)
class Edge:
    """One producer and everything that reads it, by names under the block's prefix.

    Args:
        producer: a layer or normalization.
        readers: the layers that read its output.
        through: "" for one channel to one column; "values" through attention, where groups of query heads share a value
            head; "product" times something elementwise. Where the producer makes more than the readers read, they read
            the last part of it (fused query-key-value and gate-up matrices).
        between: modules on the way that must be there and let a positive factor through.
    """

    producer: str
    readers: tuple[str, ...]
    through: Through = ""
    between: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stream:
    """The residual stream of a decoder.

    Args:
        embedding: name beside the list of blocks.
        norms: names in a block of the normalizations that read the stream (their edges say who reads these).
        writers: layers of a block that add to the stream.
        final_norm: name beside the list of blocks.
        heads: names of the output head, from the root.
    """

    embedding: str
    norms: tuple[str, ...]
    writers: tuple[str, ...]
    final_norm: str
    heads: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """The names of one kind of block.

    Args:
        name: for reports.
        edges: within a block.
        absent: a block that has one of these is another family's.
        stream: where rotations are known to fit; None elsewhere.
    """

    name: str
    edges: tuple[Edge, ...]
    absent: tuple[str, ...] = ()
    stream: Stream | None = None


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_LLAMA_STREAM = Stream(
    "embed_tokens", ("input_layernorm", "post_attention_layernorm"), ("self_attn.o_proj", "mlp.down_proj"), "norm",
    ("lm_head",),
)  # fmt: skip
_VALUES_INTO_OUTPUT = Edge("self_attn.v_proj", ("self_attn.o_proj",), "values")
_UP_INTO_DOWN = Edge("mlp.up_proj", ("mlp.down_proj",), "product")
# Post-norm encoders: what LayerNorm gives goes on into the next sum as well, so only the values can be scaled.
_BERT_VALUES = Edge("attention.self.value", ("attention.output.dense",), "values")

FAMILIES: tuple[Family, ...] = (
    Family(
        "Gemma 2 and 3",
        (
            Edge("input_layernorm", _QKV),
            Edge("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            _VALUES_INTO_OUTPUT,
            _UP_INTO_DOWN,
        ),
    ),
    Family(
        "Llama, Mistral, Qwen, Gemma",
        (
            Edge("input_layernorm", _QKV),
            Edge("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
            _VALUES_INTO_OUTPUT,
            _UP_INTO_DOWN,
        ),
        ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
        _LLAMA_STREAM,
    ),
    Family(
        "Llama by Meta's names",
        (
            Edge("attention_norm", ("attention.wq", "attention.wk", "attention.wv")),
            Edge("ffn_norm", ("feed_forward.w1", "feed_forward.w3")),
            Edge("attention.wv", ("attention.wo",), "values"),
            Edge("feed_forward.w3", ("feed_forward.w2",), "product"),
        ),
        stream=Stream(
            "tok_embeddings", ("attention_norm", "ffn_norm"), ("attention.wo", "feed_forward.w2"), "norm", ("output",)
        ),
    ),
    Family(
        "Phi-3",
        (
            Edge("input_layernorm", ("self_attn.qkv_proj",)),
            Edge("post_attention_layernorm", ("mlp.gate_up_proj",)),
            Edge("self_attn.qkv_proj", ("self_attn.o_proj",), "values"),
            Edge("mlp.gate_up_proj", ("mlp.down_proj",), "product"),
        ),
        stream=_LLAMA_STREAM,
    ),
    Family(
        "Phi",
        (
            Edge("input_layernorm", (*_QKV, "mlp.fc1")),
            Edge("self_attn.v_proj", ("self_attn.dense",), "values"),
        ),
    ),
    Family(
        "GPT-2",
        (
            Edge("ln_1", ("attn.c_attn",)),
            Edge("ln_2", ("mlp.c_fc",)),
            Edge("attn.c_attn", ("attn.c_proj",), "values"),
        ),
        ("ln_cross_attn",),
    ),
    Family(
        "OPT",
        (
            Edge("self_attn_layer_norm", _QKV),
            Edge("final_layer_norm", ("fc1",)),
            Edge("self_attn.v_proj", ("self_attn.out_proj",), "values"),
            Edge("fc1", ("fc2",), between=("activation_fn",)),
        ),
        ("encoder_attn",),
    ),
    Family("BERT, RoBERTa, MiniLM", (_BERT_VALUES,)),
    Family(
        "ViT",
        (
            Edge("layernorm_before", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
            Edge("layernorm_after", ("mlp.fc1",)),
            Edge("attention.v_proj", ("attention.o_proj",), "values"),
        ),
    ),
    Family(
        "ResNet bottleneck",
        (
            Edge("conv1", ("conv2",), between=("bn1", "relu")),
            Edge("conv2", ("conv3",), between=("bn2", "relu")),
        ),
    ),
    Family("ResNet basic block", (Edge("conv1", ("conv2",), between=("bn1", "relu")),), ("conv3", "fc")),
    Family(
        "MobileNetV2 block",
        (
            Edge("conv.0.0", ("conv.1.0",), between=("conv.0.1", "conv.0.2")),
            Edge("conv.1.0", ("conv.2",), between=("conv.1.1", "conv.1.2")),
        ),
    ),
)


def family_blocks(model: nn.Module) -> Iterator[tuple[Family, str]]:
    """Every family with the prefix ("" or ending in a dot) of each block that it fits; a block has one family."""
    modules = dict(model.named_modules())
    taken: set[str] = set()
    for family in FAMILIES:
        anchor = family.edges[0].producer
        needed = {name for edge in family.edges for name in (edge.producer, *edge.readers, *edge.between)}
        for path in modules:
            if path != anchor and not path.endswith(f".{anchor}"):
                continue
            prefix = path[: len(path) - len(anchor)]
            fits = all(prefix + name in modules for name in needed)
            if fits and prefix not in taken and not any(prefix + name in modules for name in family.absent):
                taken.add(prefix)
                yield family, prefix


def pattern_feeds(model: nn.Module) -> Feeds:
    """The feeds that patterns and plain `nn.Sequential`s promise; nothing is run."""
    found = Feeds()
    for family, prefix in family_blocks(model):
        for edge in family.edges:
            _add(found, model, edge, prefix, f"the pattern of {family.name}")
    for edge in _sequential_edges(model):
        if edge.producer not in found.feeds:
            _add(found, model, edge, "", "neighbours in a Sequential")
    return found


def _add(found: Feeds, model: nn.Module, edge: Edge, prefix: str, evidence: str) -> None:
    producer = model.get_submodule(prefix + edge.producer)
    channels = _output_channels(producer)
    if channels is None:
        return
    readers, problem = [], _problem(model, edge, prefix)
    for name in edge.readers:
        reader: Any = model.get_submodule(prefix + name)
        columns = None if layer_kind(reader) is None else _columns(edge, producer, channels, reader, prefix, model)
        if columns is None:
            problem = problem or f"which columns of {prefix + name!r} read it cannot be told from its shape"
        else:
            readers.append(Reader(prefix + name, columns))
    read = torch.zeros(channels, dtype=torch.bool)
    for entry in readers:
        read[entry.columns] = True
    free = read if not problem else torch.zeros_like(read)
    why = tuple("" if bool(ok) else problem or "no layer reads it" for ok in free)
    ceiling = torch.full((channels,), _ceiling(model, edge, prefix))
    shifts = torch.full((channels,), edge.through == "")
    path = prefix + edge.producer
    found.feeds[path] = Feed(path, tuple(readers), free, ceiling, shifts, why, evidence)


def _output_channels(module: Any) -> int | None:
    kind = layer_kind(module)
    if kind is not None:
        return int(kind.shapes(module)["weight"][0])
    return int(module.weight.numel()) if looks_like_norm(module) and as_norm(module) is not None else None


def _columns(edge: Edge, producer: Any, channels: int, reader: Any, prefix: str, model: nn.Module) -> Tensor | None:
    width = input_channels(reader)
    if edge.through == "values" and channels != width:
        return _value_columns(producer, channels, width, prefix + edge.producer, model)
    if edge.through == "product" and channels > width:
        return torch.arange(channels - width, channels)
    return torch.arange(width) if channels == width else None


def _value_columns(producer: Any, channels: int, width: int, path: str, model: nn.Module) -> Tensor | None:
    """The value channel behind every column of an output projection: heads repeat, fused values stand last."""
    values = (channels - width) // 2 if channels > width else channels
    if values == width:
        return torch.arange(channels - values, channels)
    head = getattr(model.get_submodule(path.rpartition(".")[0]), "head_dim", None)
    if not isinstance(head, int) or values <= 0 or values % head or width % values:
        return None
    column = torch.arange(width)
    shared = width // values
    return channels - values + column // head // shared * head + column % head


def _problem(model: nn.Module, edge: Edge, prefix: str) -> str:
    """Why the edge does not hold in this model; "" when nothing speaks against it."""
    users = weight_users(model)
    for name in (edge.producer, *edge.readers):
        module = model.get_submodule(prefix + name)
        if any(users[id(parameter)] > 1 for parameter in parameters_of(module)):
            return f"the weight of {prefix + name!r} is tied to another module's"
    for name in (edge.producer, *edge.between, *edge.readers):
        module = model.get_submodule(prefix + name)
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{prefix + name!r} has hooks, which may look at what it gets or gives"
    for name in edge.between:
        module = model.get_submodule(prefix + name)
        if not isinstance(module, (nn.ReLU, nn.ReLU6, nn.Identity, nn.Dropout, FoldedBatchNorm)):
            return f"{prefix + name!r} ({type(module).__name__}) lies between"
    return ""


def _ceiling(model: nn.Module, edge: Edge, prefix: str) -> float:
    clips = any(isinstance(model.get_submodule(prefix + name), nn.ReLU6) for name in edge.between)
    return 6.0 if clips else float("inf")


_LETS_THROUGH = (nn.ReLU, nn.ReLU6, nn.Identity, nn.Dropout, FoldedBatchNorm)


def _sequential_edges(model: nn.Module) -> Iterator[Edge]:
    """Layers one after another in a plain Sequential (Sequentials inside it are part of it), each standing once."""
    places: dict[int, int] = {}
    for parent in model.modules():
        for child in parent._modules.values():
            places[id(child)] = places.get(id(child), 0) + 1
    inside: set[int] = set()
    for path, module in model.named_modules():
        if type(module) is not nn.Sequential or id(module) in inside:
            continue
        inside |= {id(part) for part in module.modules() if type(part) is nn.Sequential}
        before = ""
        between: list[str] = []
        for name, part in _flat(module, path):
            if places[id(part)] > 1:
                before = ""
            elif layer_kind(part) is not None:
                if before:
                    yield Edge(before, (name,), between=tuple(between))
                before, between = name, []
            elif isinstance(part, _LETS_THROUGH):
                between.append(name)
            else:
                before = ""


def _flat(sequential: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, child in sequential.named_children():
        inner = f"{path}.{name}" if path else name
        if type(child) is nn.Sequential and not child._forward_hooks and not child._forward_pre_hooks:
            yield from _flat(child, inner)
        else:
            yield inner, child


@dataclass(frozen=True)
class Streams:
    """The residual stream of one model, by paths.

    Args:
        family: name of the pattern.
        embedding: path of the table.
        norms: path of each normalization that reads the stream -> paths of the layers that read it.
        writers: paths of the layers that add to it.
        head: path of the output head.
    """

    family: str
    embedding: str
    norms: dict[str, tuple[str, ...]]
    writers: tuple[str, ...]
    head: str


def find_stream(model: nn.Module) -> Streams | None:
    """The residual stream of a decoder of a known family; None where no pattern has one."""
    blocks = [(family, prefix) for family, prefix in family_blocks(model) if family.stream is not None]
    if not blocks:
        return None
    family, first = blocks[0]
    stream = family.stream
    assert stream is not None
    modules = dict(model.named_modules())
    beside = first.rstrip(".").rpartition(".")[0].rpartition(".")[0]  # model.layers.0. -> model
    beside = f"{beside}." if beside else ""
    head = next((name for name in stream.heads if name in modules), "")
    if not head or beside + stream.embedding not in modules or beside + stream.final_norm not in modules:
        return None
    norms: dict[str, tuple[str, ...]] = {beside + stream.final_norm: (head,)}
    writers: list[str] = []
    for _, prefix in blocks:
        for edge in family.edges:
            if edge.producer in stream.norms:
                norms[prefix + edge.producer] = tuple(prefix + name for name in edge.readers)
        writers += [prefix + name for name in stream.writers]
    return Streams(family.name, beside + stream.embedding, norms, tuple(writers), head)
