"""stories260K: a Llama-2 decoder of 260 thousand parameters that writes children's stories; tied head, GQA, RoPE."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.kit.base import Batch, KitModel, Scores, build_copied, data_folder

CALIBRATION = slice(0, 32)
DIM, LAYERS, HEADS, KV_HEADS, HIDDEN, VOCABULARY, CONTEXT = 64, 5, 8, 4, 172, 512, 512
BOS = 1


def rotation_table(head_dim: int = DIM // HEADS, positions: int = CONTEXT, theta: float = 10000.0) -> Tensor:
    """Cosines and sines of the rotary embedding, [2, positions, head_dim / 2] (Su et al. 2021, arXiv:2104.09864)."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device="cpu").float() / head_dim)
    angle = torch.outer(torch.arange(positions, device="cpu").float(), frequency)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates the interleaved pairs (2i, 2i+1) of x [B, T, heads, head_dim] by its positions."""
    cosine, sine = table[:, : x.shape[1], None, :].to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cosine - odd * sine, even * sine + odd * cosine], dim=-1).flatten(-2)


class Attention(nn.Module):
    """Causal self-attention in which two query heads share a key and value head."""

    def __init__(self) -> None:
        """Four projections without bias."""
        super().__init__()
        self.wq = nn.Linear(DIM, DIM, bias=False)
        self.wk = nn.Linear(DIM, DIM * KV_HEADS // HEADS, bias=False)
        self.wv = nn.Linear(DIM, DIM * KV_HEADS // HEADS, bias=False)
        self.wo = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """[B, T, DIM] -> [B, T, DIM]."""
        batch, tokens, _ = x.shape
        query = rotate(self.wq(x).view(batch, tokens, HEADS, -1), table)
        key = rotate(self.wk(x).view(batch, tokens, KV_HEADS, -1), table)
        value = self.wv(x).view(batch, tokens, KV_HEADS, -1)
        shared = HEADS // KV_HEADS
        key, value = key.repeat_interleave(shared, dim=2), value.repeat_interleave(shared, dim=2)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True
        )
        return self.wo(mixed.transpose(1, 2).reshape(batch, tokens, DIM))


class FeedForward(nn.Module):
    """SwiGLU of width 172, which no group of 32 divides."""

    def __init__(self) -> None:
        """Three projections without bias."""
        super().__init__()
        self.w1 = nn.Linear(DIM, HIDDEN, bias=False)
        self.w2 = nn.Linear(HIDDEN, DIM, bias=False)
        self.w3 = nn.Linear(DIM, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, DIM] -> [B, T, DIM]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual."""

    def __init__(self) -> None:
        """One decoder layer."""
        super().__init__()
        self.attention = Attention()
        self.feed_forward = FeedForward()
        self.attention_norm = nn.RMSNorm(DIM, eps=1e-5)
        self.ffn_norm = nn.RMSNorm(DIM, eps=1e-5)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        """[B, T, DIM] -> [B, T, DIM]."""
        x = x + self.attention(self.attention_norm(x), table)
        return x + self.feed_forward(self.ffn_norm(x))


class Stories(nn.Module):
    """The decoder; its output head is the embedding matrix."""

    rotation: Tensor

    def __init__(self) -> None:
        """Untrained weights, tied."""
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCABULARY, DIM)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(DIM, eps=1e-5)
        self.output = nn.Linear(DIM, VOCABULARY, bias=False)
        self.output.weight = self.tok_embeddings.weight
        self.register_buffer("rotation", rotation_table(), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] -> logits of the next token [B, T, 512]."""
        x = self.tok_embeddings(ids)
        for layer in self.layers:
            x = layer(x, self.rotation)
        return self.output(self.norm(x))


def weights() -> Path:
    """The float32 checkpoint; the tied matrix is stored once."""
    return data_folder("stories260k_llama") / "model.safetensors"


def build() -> nn.Module:
    """The trained decoder, eval mode."""
    return build_copied(Stories, weights())


@lru_cache(maxsize=1)
def stories() -> list[list[int]]:
    """Token ids of the 174 stories, BOS first, at most 512 each."""
    records = json.loads((data_folder("stories260k_llama") / "stories.json").read_text(encoding="utf-8"))
    return [record["ids"] for record in records]


def calibration() -> list[Batch]:
    """The first 32 stories, one [1, T] batch each, so no padding is ever observed."""
    return [torch.tensor([ids]) for ids in stories()[CALIBRATION]]


def _padded_batches(chosen: list[list[int]], size: int = 16) -> Iterator[tuple[list[int], Tensor]]:
    """Positions and right-padded ids [size, T] of stories of similar length; a causal model never sees the padding."""
    order = sorted(range(len(chosen)), key=lambda i: len(chosen[i]))
    for start in range(0, len(order), size):
        positions = order[start : start + size]
        rows = [torch.tensor(chosen[i]) for i in positions]
        yield positions, nn.utils.rnn.pad_sequence(rows, batch_first=True)


@torch.inference_mode()
def outputs(model: nn.Module, samples: slice) -> Tensor:
    """Logits [tokens, 512] of every predicted token of the chosen stories, story after story."""
    chosen = stories()[samples]
    logits: list[Tensor] = [torch.empty(0)] * len(chosen)
    for positions, ids in _padded_batches(chosen):
        answer = model(ids)
        for row, i in enumerate(positions):
            logits[i] = answer[row, : len(chosen[i]) - 1].float()
    return torch.cat(logits)


def scores(logits: Tensor, samples: slice) -> Scores:
    """Mean next-token cross-entropy in nats and its exponential."""
    targets = torch.cat([torch.tensor(ids[1:]) for ids in stories()[samples]])
    nll = F.cross_entropy(logits.double(), targets).item()
    return {"perplexity": torch.tensor(nll).double().exp().item(), "nll": nll, "tokens": float(len(targets))}


def example(shape: tuple[int, ...]) -> Tensor:
    """Token ids [batch, tokens]: the beginnings of stories that calibration does not see."""
    batch, tokens = shape
    long_enough = [ids[:tokens] for ids in stories()[CALIBRATION.stop :] if len(ids) >= tokens]
    return torch.tensor(long_enough[:batch])


@torch.inference_mode()
def generate(model: nn.Module, tokens: int) -> str:
    """The text of greedy decoding from BOS."""
    pieces = json.loads((data_folder("stories260k_llama") / "tokenizer.json").read_text(encoding="utf-8"))
    ids = [BOS]
    for _ in range(tokens):
        ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return "".join(pieces[i]["piece"] for i in ids[1:]).encode("latin-1").decode("utf-8").strip()


KIT = KitModel(
    name="stories260k",
    kind="decoder",
    metric="perplexity",
    architecture=Stories,
    weights=weights,
    load=partial(build_copied, Stories),
    skeleton=Stories,
    build=build,
    calibration=calibration,
    outputs=outputs,
    scores=scores,
    example=example,
    sets={"all": slice(0, 174), "held_out": slice(32, 174), "quick": slice(32, 64)},
    shapes=((1, 128), (32, 128)),
    published={"all": {"perplexity": 4.298, "nll": 1.4582}, "held_out": {"perplexity": 4.4366}},
)
