"""Whether a model's recipe said `portable = true`: known to the model, so that its export on any later day heeds it."""

from __future__ import annotations

from torch import nn

_MARK = "narrowcast_portable"


def mark_portable_(model: nn.Module, portable: bool) -> None:
    """Note at a model whether its products have to be the same on CPUs without VNNI wherever it is exported to."""
    if portable or is_portable(model):
        setattr(model, _MARK, portable)


def is_portable(model: nn.Module) -> bool:
    """Whether a model was marked; copies of a marked model are."""
    return bool(getattr(model, _MARK, False))
