"""How a cell of the low-bits table is scored: the metric per sample, its paired interval, fidelity to float32."""

from __future__ import annotations

import hashlib
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor

from benchmarks.accuracy import compare_outputs
from benchmarks.kit import KitModel
from benchmarks.kit.images import read_images

Array = NDArray[np.float64]
RESAMPLES = 1000


def losses(kit: KitModel, outputs: Tensor, samples: slice) -> Array:
    """Per sample what the metric is made of: [samples, 2] of (sum, count), or of similarity and judgement."""
    module = import_module(f"benchmarks.kit.{kit.name}")
    if kit.kind == "cnn":
        images = module._images("test") if kit.name in ("resnet20", "mobilenetv2") else module._images()
        hit = (outputs.argmax(1) == read_images(images)[1][samples]).double().numpy()
        return np.stack([100.0 * hit, np.ones_like(hit)], 1)
    if kit.kind == "encoder":
        first, second = outputs.double().chunk(2)
        return np.stack([F.cosine_similarity(first, second).numpy(), np.asarray(module.pairs("dev")[2][samples])], 1)
    if kit.kind == "decoder":
        chosen = module.stories()[samples]
        targets, lengths = torch.cat([torch.tensor(ids[1:]) for ids in chosen]), [len(ids) - 1 for ids in chosen]
    else:
        targets = module.windows(module.SCORED)[1][samples]
        lengths = [1] * len(targets)
    nll = F.cross_entropy(outputs.double(), targets, reduction="none").split(lengths)
    return np.array([[part.sum().item(), len(part)] for part in nll])


def score(kit: KitModel, values: Array, chosen: Array | slice = slice(None)) -> float:
    """The metric of some samples."""
    picked = values[chosen]
    if kit.kind == "encoder":
        return 100.0 * float(spearmanr(picked[:, 0], picked[:, 1]).statistic)
    mean = float(picked[:, 0].sum() / picked[:, 1].sum())
    return float(np.exp(mean)) if kit.metric == "perplexity" else mean


def interval(kit: KitModel, reference: Array, candidate: Array) -> tuple[float, float]:
    """95 % interval of candidate - reference, both scored on the same draws."""
    generator = np.random.default_rng(0)
    draws = [generator.integers(0, len(reference), len(reference)) for _ in range(RESAMPLES)]
    differences = [score(kit, candidate, draw) - score(kit, reference, draw) for draw in draws]
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)


def figures(kit: KitModel, samples: str, expected: Tensor, outputs: Tensor) -> dict[str, Any]:
    """The scored part of a row.

    Args:
        kit: the model.
        samples: name of the evaluation set.
        expected: outputs of the float32 model on it.
        outputs: outputs of the quantized model on it.

    Returns:
        Both scores, their difference with its interval, fidelity, and a digest that equal outputs share.
    """
    chosen = kit.sets[samples]
    first, second = losses(kit, expected, chosen), losses(kit, outputs, chosen)
    return {
        "float32": score(kit, first),
        "score": score(kit, second),
        "difference": score(kit, second) - score(kit, first),
        "interval": interval(kit, first, second),
        **compare_outputs(kit, expected, outputs),
        "digest": hashlib.sha256(outputs.contiguous().numpy().tobytes()).hexdigest()[:16],
    }
