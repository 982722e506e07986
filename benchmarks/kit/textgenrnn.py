"""textgenrnn: two LSTMs over characters, pooled by attention, predicting the next character of a headline."""

from __future__ import annotations

import json
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.kit.base import Batch, KitModel, Scores, build_copied, collect, data_folder

SCORED, OTHER = "hacker_news_2000.txt", "reddit_apple_android_2000.txt"
WINDOW = 40


class TextGenRnn(nn.Module):
    """Embedding, two LSTMs, and a softmax over time of everything they said."""

    def __init__(self, characters: int = 465) -> None:
        """A network over a vocabulary of `characters`."""
        super().__init__()
        self.embedding = nn.Embedding(characters, 100)
        self.rnn_1 = nn.LSTM(100, 128, batch_first=True)
        self.rnn_2 = nn.LSTM(128, 128, batch_first=True)
        self.attention = nn.Linear(356, 1, bias=False)
        self.output = nn.Linear(356, characters)

    def forward(self, ids: Tensor) -> Tensor:
        """Character ids [B, 40] -> logits of the next character [B, 465]; padding is not masked, as published."""
        embedded = self.embedding(ids)
        first, _ = self.rnn_1(embedded)
        second, _ = self.rnn_2(first)
        features = torch.cat([embedded, first, second], dim=-1)
        share = self.attention(features).softmax(dim=1)
        return self.output((features * share).sum(dim=1))


def weights() -> Path:
    """The float32 checkpoint."""
    return data_folder("textgenrnn_lstm") / "model.safetensors"


def build() -> nn.Module:
    """The trained network, eval mode."""
    return build_copied(TextGenRnn, weights())


@lru_cache(maxsize=4)
def windows(file: str, count: int = 10000) -> tuple[Tensor, Tensor]:
    """The first `count` samples of a file of titles: ids [count, 40] left-padded with 0, and next ids [count]."""
    folder = data_folder("textgenrnn_lstm")
    vocabulary: dict[str, int] = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    inputs: list[list[int]] = []
    targets: list[int] = []
    for title in (folder / file).read_text(encoding="utf-8").split("\n")[1:]:
        border = vocabulary["<s>"]
        ids = [border, *(vocabulary[c] for c in title if c in vocabulary), border]
        for position in range(1, len(ids)):
            seen = ids[max(0, position - WINDOW) : position]
            inputs.append([0] * (WINDOW - len(seen)) + seen)
            targets.append(ids[position])
        if len(inputs) >= count:
            break
    return torch.tensor(inputs[:count]), torch.tensor(targets[:count])


def calibration() -> list[Batch]:
    """1024 samples from all over the first 10,000 of the file that is not scored, in batches of 128.

    The first 1024 are 17 titles: neighbours differ in one character.
    """
    return list(windows(OTHER)[0][::9][:1024].split(128))


def file_outputs(model: nn.Module, file: str, samples: slice) -> Tensor:
    """Logits [N, 465] of the chosen samples of one of the two files."""
    return collect(model, windows(file)[0][samples].split(500))


def file_scores(logits: Tensor, file: str, samples: slice) -> Scores:
    """Mean cross-entropy in nats, perplexity and top-1 accuracy in percent against one of the two files."""
    targets = windows(file)[1][samples]
    nll = F.cross_entropy(logits.double(), targets)
    accuracy = 100.0 * (logits.argmax(1) == targets).double().mean().item()
    return {"perplexity": nll.exp().item(), "nll": nll.item(), "top1": accuracy}


def outputs(model: nn.Module, samples: slice) -> Tensor:
    """Logits [N, 465] of the chosen samples of the scored file."""
    return file_outputs(model, SCORED, samples)


def scores(logits: Tensor, samples: slice) -> Scores:
    """Scores against the scored file."""
    return file_scores(logits, SCORED, samples)


def example(shape: tuple[int, ...]) -> Tensor:
    """Character ids [batch, 40] of the scored file."""
    return windows(SCORED)[0][: shape[0], -shape[1] :]


KIT = KitModel(
    name="textgenrnn",
    kind="recurrent",
    metric="perplexity",
    architecture=TextGenRnn,
    weights=weights,
    load=partial(build_copied, TextGenRnn),
    skeleton=TextGenRnn,
    build=build,
    calibration=calibration,
    outputs=outputs,
    scores=scores,
    example=example,
    sets={"all": slice(0, 10000), "held_out": slice(0, 10000), "quick": slice(0, 2000)},
    shapes=((1, 40), (32, 40)),
    published={"all": {"nll": 1.7734, "top1": 49.72}},
)
