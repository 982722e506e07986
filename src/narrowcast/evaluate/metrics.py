"""The built-in metrics: what every sample of a batch contributes to a score.

A metric gives two numbers per sample, a sum and a weight; the score is sum of sums / sum of weights, for perplexity
the exponential of that. So one paired bootstrap serves them all, and a sequence is resampled with all its tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from narrowcast.errors import DataError
from narrowcast.evaluate.answers import Answer

IGNORED = -100  # the label that PyTorch's cross entropy and Hugging Face leave out
Terms = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Metric:
    """A score that is a quotient of two sums over samples.

    Args:
        name: how reports and users call it.
        unit: "share" (shown in percent) or "number".
        per: what one sample is: "sample", "sequence" or "batch"; the bootstrap resamples these.
        higher_is_better: None where only the user knows.
        terms: (answer, the reference's answer) -> (sum [samples], weight [samples]).
        finish: applied to the quotient.
    """

    name: str
    unit: str
    per: str
    higher_is_better: bool | None
    terms: Callable[[Answer, Answer], Terms]
    finish: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None


def class_dimension(logits: Tensor, targets: Any) -> int | None:
    """The dimension of `logits` that holds the classes of integer `targets`, or None where they are no class labels.

    Args:
        logits: [N, classes], [N, ..., classes] or [N, classes, ...].
        targets: labels [N] or [N, ...].
    """
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.dtype == torch.bool:
        return None
    shape = tuple(logits.shape)
    for dimension in (logits.ndim - 1, 1):
        if 1 <= dimension < logits.ndim and shape[dimension] > 1:
            without = shape[:dimension] + shape[dimension + 1 :]
            in_range = targets.numel() > 0 and int(targets.max()) < shape[dimension]
            if tuple(targets.shape) == without and in_range:
                return dimension
    return None


def _labels(answer: Answer) -> Any:
    """The targets, the first of several; a trailing dimension of one is dropped."""
    targets = answer.batch.targets
    if isinstance(targets, tuple) and targets:
        targets = targets[0]
    if isinstance(targets, Tensor) and targets.ndim == answer.tensor.ndim and targets.shape[-1] == 1:
        return targets.squeeze(-1)
    return targets


def _per_sample(values: Tensor, counted: Tensor) -> Terms:
    """Sums and weights [N] of values [N, ...] at the positions that are counted."""
    values, counted = values.flatten(1) if values.ndim > 1 else values[:, None], counted.reshape(len(counted), -1)
    zero = torch.zeros((), dtype=torch.float64, device=values.device)
    return torch.where(counted, values.to(torch.float64), zero).sum(1), counted.sum(1).to(torch.float64)


def top1_terms(answer: Answer, reference: Answer) -> Terms:
    """1 for every label that is the model's first choice."""
    targets = _labels(answer)
    dimension = class_dimension(answer.tensor, targets)
    if dimension is None:
        shape = list(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise DataError(
            f"top1 needs integer class labels that fit the output {list(answer.tensor.shape)}, got targets {shape}; "
            "yield (input, label) pairs, or choose another metric"
        )
    right = answer.tensor.argmax(dimension) == targets.to(answer.tensor.device)
    return _per_sample(right, targets.to(right.device) != IGNORED)


def perplexity_terms(answer: Answer, reference: Answer) -> Terms:
    """Negative log-likelihood in nats of every next token of a sequence, and the number of tokens predicted."""
    ids, logits = answer.token_ids, answer.tensor
    if ids is None or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise DataError(
            f"perplexity needs token ids [B, T] as input and logits [B, T, vocabulary], got an output of shape "
            f"{list(logits.shape)}; choose another metric"
        )
    labels = answer.batch.targets if isinstance(answer.batch.targets, Tensor) else ids
    if labels.shape != ids.shape:
        raise DataError(f"labels of shape {list(labels.shape)} do not fit token ids {list(ids.shape)}")
    labels = labels.to(logits.device)[:, 1:]
    counted = labels != IGNORED
    mask = answer.token_mask
    if mask is not None:
        counted = counted & mask[:, 1:] & mask[:, :-1]
    scores = logits[:, :-1].float().transpose(1, 2)
    loss = F.cross_entropy(scores, labels.clamp(min=0).long(), reduction="none")
    return _per_sample(loss, counted)


def agreement_terms(answer: Answer, reference: Answer) -> Terms:
    """1 where the model's first choice is the reference's; per token where the output has tokens."""
    dimension = class_dimension(reference.tensor, _labels(reference))
    if dimension is None:
        dimension = reference.tensor.ndim - 1 if reference.tensor.ndim < 4 else 1
    same = answer.tensor.argmax(dimension) == reference.tensor.argmax(dimension)
    mask = reference.token_mask
    counted = mask if mask is not None and mask.shape == same.shape else torch.ones_like(same)
    return _per_sample(same, counted)


def difference_terms(answer: Answer, reference: Answer) -> Terms:
    """Mean absolute difference from the reference's output."""
    a, b = answer.tensor.to(torch.float64), reference.tensor.to(torch.float64)
    distance = (a - b).abs().masked_fill(a == b, 0)  # equal infinities are no difference
    mask = reference.token_mask
    counted = torch.ones_like(distance, dtype=torch.bool) if mask is None else mask.unsqueeze(-1).expand_as(distance)
    return _per_sample(distance, counted)


METRICS = {
    "top1": Metric("top1", "share", "sample", True, top1_terms),
    "perplexity": Metric("perplexity", "number", "sequence", False, perplexity_terms, np.exp),
    "agreement": Metric("agreement", "share", "sample", True, agreement_terms),
    "difference": Metric("difference", "number", "sample", False, difference_terms),
}
SPEARMAN = "spearman"  # no quotient of sums: see judge.py
NAMES = (*METRICS, SPEARMAN)


def built_in(model: nn.Module, first: Answer) -> tuple[str, str]:
    """The built-in metric that fits a model's first answer, and a note that says why.

    Args:
        model: the reference.
        first: its answer to the first batch.

    Returns:
        (name, note).
    """
    if _predicts_tokens(model, first):
        return "perplexity", "metric: perplexity, as the output has one logit per token of the vocabulary"
    if class_dimension(first.tensor, _labels(first)) is not None:
        return "top1", "metric: top-1 accuracy, as the targets are class labels"
    why = "no targets" if first.batch.targets is None else "targets that are no class labels of the output"
    return "difference", f"metric: mean absolute output difference, as the data has {why}; pass metric= for another"


def _predicts_tokens(model: nn.Module, first: Answer) -> bool:
    ids, logits = first.token_ids, first.tensor
    if ids is None or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        return False
    targets = first.batch.targets
    if targets is not None and not (isinstance(targets, Tensor) and targets.shape == ids.shape):
        return False
    can_generate = getattr(model, "can_generate", None)  # transformers' own answer; false for masked language models
    if callable(can_generate):
        return bool(can_generate())
    sizes = (getattr(module, "num_embeddings", None) for module in model.modules())
    return int(logits.shape[2]) == next((size for size in sizes if size is not None), -1)


def per_sample(metric: Callable[..., Any]) -> Metric:
    """A user's `metric(outputs, targets)` as a Metric; it may return one score per sample or one number per batch."""
    name = getattr(metric, "__name__", type(metric).__name__)

    def terms(answer: Answer, reference: Answer) -> Terms:
        scores = torch.as_tensor(metric(answer.output, answer.batch.targets)).detach().to("cpu", torch.float64)
        if scores.ndim == 0:
            weight = torch.tensor([float(answer.batch.samples)], dtype=torch.float64)
            return scores[None] * weight, weight
        if scores.ndim != 1:
            raise DataError(f"metric {name} returned scores of shape {list(scores.shape)}; return one score per sample")
        return scores, torch.ones_like(scores)

    return Metric(name, "number", "sample", None, terms)
