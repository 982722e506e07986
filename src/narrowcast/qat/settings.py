"""How the built-in loop trains: every choice in one record, and the optimizer and learning rate that follow from it.

Source:
    Cosine learning rate: Loshchilov and Hutter 2017, arXiv:1608.03983, eq. 5, without restarts. Statistics of
    BatchNorm frozen late: see `FreezeSchedule`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from narrowcast.errors import RecipeError
from narrowcast.qat.freeze import FreezeSchedule
from narrowcast.qat.groups import parameter_groups

OPTIMIZERS = ("adamw", "sgd")
MOMENTUM = 0.9


@dataclass(frozen=True)
class FitSettings:
    """How `fit` trains.

    Args:
        epochs: passes over the data; None leaves the end to `steps`.
        steps: of the optimizer; with both, what ends first. With neither, one epoch.
        batch_size: samples per step, of data that does not come in batches.
        lr: learning rate at the start; it falls to 0 along a cosine.
        optimizer: "adamw" or "sgd" (momentum 0.9, Nesterov).
        weight_decay: of matrices and kernels.
        seed: of the order of samples, and of dropout and augmentation.
        distill: 0..1, weight of the float model's answers as targets; the rest is the task's own loss.
        temperature: of these targets.
        freeze_after: 0..1, share of the steps after which BatchNorms keep their statistics; 1 never. 0 keeps the
            float model's, which is best where training starts close to it; at 2 bits statistics may have to move.
        freeze_ranges_after: 0..1, likewise for ranges.
        patience: evaluations in a row without a better score after which training ends; None trains to the end.
        evaluate_every: steps between evaluations; None evaluates once an epoch.
        checkpoint_every: steps between files; None writes one an epoch, and at least twenty in all.
        range_lr: learning rate of ranges at the start; None takes that of weights.

    Raises:
        RecipeError: a value that cannot be.
    """

    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 32
    lr: float = 1e-4
    optimizer: str = "adamw"
    weight_decay: float = 1e-4
    seed: int = 0
    distill: float = 0.5
    temperature: float = 2.0
    freeze_after: float = 0.0
    freeze_ranges_after: float = 1.0
    patience: int | None = None
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    range_lr: float | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "steps", "batch_size", "patience", "evaluate_every", "checkpoint_every"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise RecipeError(f"{name} is a count from 1 on, got {value!r}")
        for name in ("distill", "freeze_after", "freeze_ranges_after"):
            if not 0 <= getattr(self, name) <= 1:
                raise RecipeError(f"{name} is a share from 0 to 1, got {getattr(self, name)!r}")
        for name in ("lr", "temperature", "range_lr"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise RecipeError(f"{name} is a number above 0, got {value!r}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise RecipeError(f"weight_decay is a number from 0 on, got {self.weight_decay!r}")
        if self.optimizer not in OPTIMIZERS:
            raise RecipeError(f"there is no optimizer {self.optimizer!r}; choose from {', '.join(OPTIMIZERS)}")

    def total(self, per_epoch: int | None) -> int:
        """Steps of the whole training.

        Args:
            per_epoch: steps of one epoch, where that is known.

        Raises:
            RecipeError: epochs are asked for and their length is not known.
        """
        if self.epochs is None and self.steps is not None:
            return self.steps
        if per_epoch is None:
            if self.steps is not None:
                return self.steps
            raise RecipeError("the training data does not say how long an epoch is; give steps")
        by_epochs = (self.epochs or 1) * per_epoch
        return by_epochs if self.steps is None else min(by_epochs, self.steps)

    def rate(self, step: int, total: int, *, ranges: bool = False) -> float:
        """The learning rate of a step, counted from 0: of weights and vectors, or of ranges."""
        start = self.range_lr if ranges and self.range_lr is not None else self.lr
        return start * 0.5 * (1 + math.cos(math.pi * step / total))

    def freeze(self, total: int) -> FreezeSchedule:
        """What is frozen from which step on."""
        shares = (self.freeze_after, self.freeze_ranges_after)
        batchnorm, ranges = (round(share * total) if share < 1 else None for share in shares)
        return FreezeSchedule(batchnorm=batchnorm, ranges=ranges)

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a prepared model's parameters."""
        groups: list[dict[str, Any]] = parameter_groups(
            model, lr=self.lr, weight_decay=self.weight_decay, range_lr=self.range_lr
        )
        if self.optimizer == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=MOMENTUM, nesterov=True)
        return torch.optim.AdamW(groups, lr=self.lr)
