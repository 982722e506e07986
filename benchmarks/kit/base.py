"""What every kit model offers, where its data lies, and how a model is run over batches; knows no model."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

Batch = Tensor | dict[str, Tensor]
Scores = dict[str, float]


class MissingDataError(RuntimeError):
    """The data or the weights of a kit model are not on this machine; the message says what and where it was sought."""


@dataclass(frozen=True)
class KitModel:
    """A trained model, its data split into calibration and evaluation, and its metric.

    Attributes:
        name: how benchmarks call it.
        kind: "cnn", "encoder", "decoder" or "recurrent"; decides which peers apply.
        metric: the main entry of `scores`: "top1" (percent), "spearman" (times 100) or "perplexity".
        architecture: the untrained module; works under `torch.device("meta")`.
        weights: the float32 safetensors file.
        load: reads that file the quickest idiomatic way, eval mode.
        skeleton: an untrained module to load weights into, built the quickest way: on the meta device, except where a
            nn.Embedding would make torch import its Python decompositions (0.8 s) to initialise nothing.
        build: the trained module with memory of its own, eval mode.
        calibration: the batches of the calibration split.
        outputs: (model, samples) -> [rows, features] float32 outputs for those evaluation samples, in their order.
        scores: (outputs, samples) -> every metric of those outputs, `metric` among them.
        example: one batch of real input of one of the `shapes`.
        sets: named evaluation samples: "all", "held_out" (never seen in calibration) and "quick".
        shapes: natural input shapes for timing: (batch,) or (batch, tokens).
        published: float32 scores by evaluation set, from the data's manifest.
    """

    name: str
    kind: str
    metric: str
    architecture: Callable[[], nn.Module]
    weights: Callable[[], Path]
    load: Callable[[Path], nn.Module]
    skeleton: Callable[[], nn.Module]
    build: Callable[[], nn.Module]
    calibration: Callable[[], list[Batch]]
    outputs: Callable[[nn.Module, slice], Tensor]
    scores: Callable[[Tensor, slice], Scores]
    example: Callable[[tuple[int, ...]], Batch]
    sets: Mapping[str, slice]
    shapes: tuple[tuple[int, ...], ...]
    published: Mapping[str, Scores] = field(default_factory=dict)

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger main score is the better one."""
        return self.metric != "perplexity"

    def evaluate(self, model: nn.Module, samples: str = "all") -> Scores:
        """Scores of `model` on the evaluation set called `samples`."""
        chosen = self.sets[samples]
        return self.scores(self.outputs(model, chosen), chosen)


def data_folder(name: str) -> Path:
    """Folder of one kit model's data: below $NARROWCAST_DATA, or ../shared/data beside the repository.

    Args:
        name: folder name as in the data's manifest, for example "resnet20_cifar10".

    Returns:
        The existing folder.

    Raises:
        MissingDataError: it does not exist.
    """
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    root = Path(os.environ.get("NARROWCAST_DATA") or beside)
    if not (root / name).is_dir():
        raise MissingDataError(f"no folder {name!r} in {root}; set NARROWCAST_DATA to the folder of the kit's data")
    return root / name


def build_copied(architecture: Callable[[], nn.Module], path: Path) -> nn.Module:
    """The module with the weights of `path` copied into its own, aligned memory; tied weights stay tied."""
    model = architecture()
    load_model(model, path)
    return model.eval()


def on_meta(architecture: Callable[[], nn.Module]) -> nn.Module:
    """The untrained module without memory."""
    with torch.device("meta"):
        return architecture()


def load_mapped(architecture: Callable[[], nn.Module], path: Path) -> nn.Module:
    """The module with the weights of `path` used where they lie in the mapped file: no initialisation, no copy."""
    model = on_meta(architecture)
    model.load_state_dict(load_file(path), assign=True)
    return model.eval()


def run(model: nn.Module, batch: Batch) -> Any:
    """The model's answer to a batch: keyword arguments for a dictionary, one positional argument for a tensor."""
    return model(**batch) if isinstance(batch, dict) else model(batch)


@torch.inference_mode()
def collect(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """[rows, features] float32 outputs of a model that maps a batch [b, ...] to [b, features]."""
    return torch.cat([model(batch).float() for batch in batches])
