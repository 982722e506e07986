"""What a prepared model remembers of how it was prepared; conversion needs it for the report and for fusing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from narrowcast.errors import ModelError
from narrowcast.nn.frozen import FrozenLinear
from narrowcast.nn.trained import TrainedModule
from narrowcast.pipeline.fuse import Flows
from narrowcast.pipeline.run import Begun
from narrowcast.planning import Plan
from narrowcast.report import Finding, LayerChange, LayerOutcome

_NAME = "_narrowcast_prepared"


@dataclass(frozen=True)
class Prepared:
    """How a model was prepared.

    Args:
        plan: what the recipe said of every weight.
        model: class name of the float model.
        outcomes: of post-training quantization, one per weight.
        flows, probe: see `pipeline.run.Begun`.
        notes, changes, findings: for the report.
        source: hash of the float model's tensors.
        before: its parameters and bytes.
    """

    plan: Plan
    model: str
    outcomes: list[LayerOutcome]
    flows: Flows
    probe: Any
    notes: list[str]
    changes: list[LayerChange]
    findings: list[Finding]
    source: str
    before: tuple[int, int]

    @classmethod
    def of(cls, begun: Begun, model: str, notes: list[str]) -> Prepared:
        """What is to be remembered of the work that was done."""
        return cls(
            begun.job.plan, model, begun.outcomes, begun.flows, begun.probe, notes, begun.changes, begun.findings,
            begun.source, begun.before,
        )  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> Prepared:
        return self  # nothing in it changes: copies of the model (moving averages) share it


def attach_(model: nn.Module, prepared: Prepared) -> None:
    """Let a model remember how it was prepared."""
    model.__dict__[_NAME] = prepared


def marked(model: Any, name: str) -> nn.Module | None:
    """The module that has an attribute, inside of what torch.compile and data-parallel wrappers make of it."""
    inner = model
    while isinstance(inner, nn.Module) and name not in inner.__dict__:
        inner = next((m for key in ("_orig_mod", "module") if (m := inner._modules.get(key)) is not None), None)
    return inner if isinstance(inner, nn.Module) else None


def unwrapped(model: Any) -> nn.Module:
    """The prepared model inside of what torch.compile and data-parallel wrappers make of it.

    Raises:
        ModelError: it was not prepared.
    """
    inner = marked(model, _NAME)
    if inner is None and isinstance(model, nn.Module) and any(isinstance(m, FrozenLinear) for m in model.modules()):
        raise ModelError(
            f"{type(model).__name__} has low-rank adapters over frozen integers and was not prepared for training of "
            "the integers themselves; nc.qat.merge_adapters merges them into the quantized model"
        )
    if inner is None:
        raise ModelError(
            f"{type(model).__name__} was not prepared for quantization-aware training; call nc.qat.prepare(model, "
            "recipe, data) first, train what it returns, and pass that"
        )
    return inner


def prepared_of(model: nn.Module) -> Prepared:
    """How an unwrapped model was prepared."""
    found: Prepared = model.__dict__[_NAME]
    return found


def twins_of(model: nn.Module) -> Iterator[tuple[str, TrainedModule]]:
    """The trainable twins of a model, by path; one that stands in several places once."""
    for path, module in model.named_modules():
        if isinstance(module, TrainedModule):
            yield path, module
