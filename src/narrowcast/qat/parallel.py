"""Ranges in data-parallel training: what is cut is the gradient of the whole batch, not that of each process."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from narrowcast.errors import ModelError
from narrowcast.nn.trained_ranges import Range
from narrowcast.qat.state import unwrapped


class _MeanOver:
    """The mean of a tensor over the processes of a group.

    Args:
        group: of torch.distributed; None for all processes.
    """

    def __init__(self, group: Any) -> None:
        self.group = group

    def __call__(self, values: Tensor) -> Tensor:
        total = values.contiguous().clone()
        dist.all_reduce(total, group=self.group)
        return total / dist.get_world_size(self.group)

    def __deepcopy__(self, memo: dict[int, Any]) -> _MeanOver:
        return self  # a group of processes is not copied with a model


def sync_ranges(model: nn.Module, process_group: Any = None) -> nn.Module:
    """Average the gradients of scales over all processes before they are cut; changes `model` and returns it.

    Gradients of scales are cut at 1. Data-parallel wrappers average what each process has cut; with this, the average
    is cut, so that the processes train what one of them would with the whole batch. One small all-reduce per scale and
    step, in the backward pass, as with SyncBatchNorm: every process must run the same layers.

    Args:
        model: a prepared one, before or after it is wrapped.
        process_group: that of the wrapper; None for all processes.

    Raises:
        ModelError: the model was not prepared, or torch.distributed is not initialized.
    """
    inner = unwrapped(model)
    if not dist.is_available() or not dist.is_initialized():
        raise ModelError("sync_ranges: torch.distributed is not initialized; call init_process_group first")
    for module in inner.modules():
        if isinstance(module, Range):
            module.reduce = _MeanOver(process_group)
    return model
