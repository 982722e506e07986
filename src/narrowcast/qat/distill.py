"""Distillation: the float model as the teacher of the one that is trained with quantization.

Source:
    Soft targets with temperature: Hinton et al. 2015, arXiv:1503.02531, section 2. Hidden states by relative squared
    error: after FitNets (Romero et al. 2015, arXiv:1412.6550) and TinyBERT (Jiao et al. 2020, arXiv:1909.10351);
    relative, so that layers of different size count alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from narrowcast.errors import DataError


def distill_loss(
    student: Tensor, teacher: Tensor, *, temperature: float = 1.0,
    hidden: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None, hidden_weight: float = 1.0,
) -> Tensor:  # fmt: skip
    """How far a student's logits, and if given its hidden states, are from its teacher's.

    Args:
        student: [..., classes] logits; gradients flow.
        teacher: [..., classes] logits of the float model; no gradient flows.
        temperature: > 0, divides both; the result is multiplied by its square, so that it weighs as at 1.
        hidden: (of the student, of the teacher), tensors of equal shapes, pair by pair.
        hidden_weight: of the mean relative squared error of the hidden states.

    Returns:
        A scalar: KL(teacher || student) in nats, mean over all but the last dimension, plus the weighted hidden part.

    Raises:
        DataError: shapes differ, or the temperature is not positive.
    """
    if temperature <= 0:
        raise DataError(f"distill_loss: temperature is a positive number, got {temperature}")
    _same_shape("logits", student, teacher)
    target = functional.log_softmax(teacher.detach().float() / temperature, -1).flatten(0, -2)
    predicted = functional.log_softmax(student.float() / temperature, -1).flatten(0, -2)
    loss = functional.kl_div(predicted, target, reduction="batchmean", log_target=True) * temperature**2
    if hidden is None:
        return loss
    mine, theirs = hidden
    if len(mine) != len(theirs):
        raise DataError(f"distill_loss: {len(mine)} hidden states of the student, {len(theirs)} of the teacher")
    parts = [_relative_error(a, b) for a, b in zip(mine, theirs, strict=True)]
    return loss + hidden_weight * torch.stack(parts).mean() if parts else loss


def _relative_error(mine: Tensor, theirs: Tensor) -> Tensor:
    _same_shape("hidden states", mine, theirs)
    target = theirs.detach().float()
    return (mine.float() - target).square().mean() / target.square().mean().clamp(min=torch.finfo(torch.float32).tiny)


def _same_shape(what: str, mine: Tensor, theirs: Tensor) -> None:
    if mine.shape != theirs.shape:
        raise DataError(
            f"distill_loss: {what} of shape {tuple(mine.shape)} from the student and {tuple(theirs.shape)} from the "
            "teacher; give both the same batch"
        )
