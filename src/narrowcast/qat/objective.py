"""What training makes smaller: the task's own loss, the distance from the float model, or a mix of both.

Source:
    The mix: Hinton et al. 2015, arXiv:1503.02531, section 2; for quantized students Polino et al. 2018,
    arXiv:1802.05668, eq. 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.data import Batch
from narrowcast.errors import DataError
from narrowcast.evaluate.answers import Answer, answer
from narrowcast.evaluate.metrics import IGNORED, built_in, class_dimension
from narrowcast.qat.distill import distill_loss

Loss = Callable[[Any, Any], Tensor]
_TASKS = {"perplexity": "tokens", "top1": "classes"}


class Objective:
    """The loss of a batch.

    Args:
        model: in training; shows by its answer what the task is, if there is no teacher that could.
        first: a batch of the training data.
        teacher: the float model, in evaluation mode; None for none.
        distill: 0..1, weight of the teacher's part; the task's loss weighs the rest.
        temperature: of the teacher's part.
        loss: (model's own output, targets) -> scalar, in place of the task's loss.

    Attributes:
        task: "tokens" (next token), "classes", "own loss" or "teacher alone".
        notes: decisions taken.

    Raises:
        DataError: the data has nothing that could be learned.
    """

    def __init__(
        self, model: nn.Module, first: Batch, *, teacher: nn.Module | None = None, distill: float = 0.0,
        temperature: float = 1.0, loss: Loss | None = None,
    ) -> None:  # fmt: skip
        self.teacher = None if distill == 0 else teacher
        self.distill, self.temperature, self.loss = distill, temperature, loss
        self.notes: list[str] = []
        self.task = "own loss" if loss is not None else self._task(teacher or model, first)

    def __call__(self, model: nn.Module, batch: Batch, where: str) -> Tensor:
        """The loss of a model in training mode, a scalar; `where` says in errors which batch it is."""
        given = answer(batch, model)
        if self.teacher is None:
            return self._own(given, where)
        with torch.no_grad():
            target = answer(batch, self.teacher)
        counted = self._counted(given)
        near = distill_loss(given.tensor[counted], target.tensor[counted], temperature=self.temperature)
        if self.distill == 1:
            return near
        return self.distill * near + (1 - self.distill) * self._own(given, where)

    def _task(self, model: nn.Module, first: Batch) -> str:
        if first.call is not None:
            raise DataError(
                "training data is a callable that runs the model by itself, so nothing could be learned from its "
                "answer; pass batches"
            )
        with torch.no_grad():
            given = answer(first, model)
        task = _TASKS.get(built_in(model, given)[0])
        if task is None and (self.teacher is None or (self.distill < 1 and first.targets is not None)):
            found = "no targets" if first.targets is None else f"targets {_labels_text(first.targets)}"
            raise DataError(
                f"training data has {found}, and the output is {list(given.tensor.shape)}: neither class labels from "
                "0 on nor token ids, so there is no loss; mend the labels, learn from the float model alone "
                "(distill 1), or give a loss of your own"
            )
        if task is None and self.distill < 1:
            self.distill = 1.0
            self.notes.append("the training data has no labels: what is learned is the float model's output alone")
        return task or "teacher alone"

    def _own(self, given: Answer, where: str) -> Tensor:
        if self.loss is not None:
            value = self.loss(given.output, given.batch.targets)
            if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
                found = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
                raise DataError(f"{where}: the loss function returned {found}; return a scalar tensor with a gradient")
            return value.reshape(())
        return next_token_loss(given, where) if self.task == "tokens" else class_loss(given, where)

    def _counted(self, given: Answer) -> Any:
        """Which rows of the output the teacher is listened to at: not padding, nor what labels leave out."""
        targets = given.batch.targets
        mask = given.token_mask
        if self.task == "tokens" and isinstance(targets, Tensor) and targets.shape == given.tensor.shape[:2]:
            real = targets.to(given.tensor.device) != IGNORED
            return real if mask is None else real & mask
        return slice(None) if mask is None else mask


def class_loss(given: Answer, where: str) -> Tensor:
    """Mean cross entropy of class labels; labels of -100 count for nothing.

    Raises:
        DataError: labels do not fit the output.
    """
    targets = given.batch.targets
    targets = targets[0] if isinstance(targets, tuple) and targets else targets
    if isinstance(targets, Tensor) and targets.ndim == given.tensor.ndim and targets.shape[-1] == 1:
        targets = targets.squeeze(-1)
    dimension = class_dimension(given.tensor, targets)
    if dimension is None or not isinstance(targets, Tensor) or bool(((targets < 0) & (targets != IGNORED)).any()):
        found = "none" if targets is None else _labels_text(targets)
        raise DataError(
            f"{where}: class labels are integers from 0 on, one for each row of the output "
            f"{list(given.tensor.shape)}, below its number of classes; got {found}"
        )
    return F.cross_entropy(given.tensor.float().movedim(dimension, 1), targets.to(given.tensor.device).long())


def next_token_loss(given: Answer, where: str) -> Tensor:
    """Mean cross entropy of every next token of a sequence; padding, and labels of -100, count for nothing.

    Raises:
        DataError: the batch has no token to predict.
    """
    ids, logits, mask = given.token_ids, given.tensor, given.token_mask
    assert ids is not None
    targets = given.batch.targets
    labels = (targets if isinstance(targets, Tensor) else ids).to(logits.device)
    if labels.shape != ids.shape:
        raise DataError(f"{where}: labels of shape {list(labels.shape)} do not fit token ids {list(ids.shape)}")
    labels = labels[:, 1:].long()
    if mask is not None:
        labels = labels.masked_fill(~(mask[:, 1:] & mask[:, :-1]), IGNORED)
    if not bool((labels != IGNORED).any()):
        raise DataError(f"{where}: no token to predict: sequences are shorter than two tokens, or all is masked")
    return F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels)


def _labels_text(targets: Any) -> str:
    if not isinstance(targets, Tensor) or not targets.numel():
        return type(targets).__name__
    return f"{targets.dtype} {list(targets.shape)} from {targets.min()} to {targets.max()}"
