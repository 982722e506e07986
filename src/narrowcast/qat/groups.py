"""Parameter groups for optimizers: ranges want no weight decay, and often a learning rate of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from narrowcast.nn.trained_ranges import Range
from narrowcast.qat.state import unwrapped


def parameter_groups(
    model: nn.Module, *, lr: float | None = None, weight_decay: float = 0.0, range_lr: float | None = None,
    decay_vectors: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """The trainable parameters in groups, to be passed to any `torch.optim` optimizer.

    Args:
        model: a prepared one.
        lr: of weights; None leaves the optimizer's.
        weight_decay: of weights that are matrices, kernels or tables.
        range_lr: of ranges; None takes that of weights.
        decay_vectors: whether biases and scales of normalizations decay, too.

    Returns:
        Up to three groups, each with a "name": "weights", "vectors" and "ranges". Ranges never decay: decay would pull
        every scale towards nothing.

    Raises:
        ModelError: the model was not prepared.
    """
    inner = unwrapped(model)
    ranges = {id(p) for module in inner.modules() if isinstance(module, Range) for p in module.parameters()}
    trainable = [p for p in model.parameters() if p.requires_grad]
    weights = [p for p in trainable if id(p) not in ranges and (p.dim() > 1 or decay_vectors)]
    vectors = [p for p in trainable if id(p) not in ranges and p.dim() <= 1 and not decay_vectors]
    scales = [p for p in trainable if id(p) in ranges]
    groups = []
    for name, parameters, decay, rate in (
        ("weights", weights, weight_decay, lr),
        ("vectors", vectors, 0.0, lr),
        ("ranges", scales, 0.0, lr if range_lr is None else range_lr),
    ):
        if parameters:
            group: dict[str, Any] = {"params": parameters, "weight_decay": decay, "name": name}
            groups.append(group if rate is None else group | {"lr": rate})
    return groups
