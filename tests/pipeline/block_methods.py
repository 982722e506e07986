"""Two solvers that exist for tests only: one that asks for a Hessian, one that asks for a block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from narrowcast.core import QuantizedTensor, QuantSpec
from narrowcast.errors import DataError
from narrowcast.methods import InputTraining, Rtn, Seen, Solved
from narrowcast.methods.base import Block

INPUTS = ("", "int8/token", "uint8/token", "uint8/channel static:minmax", "uint4/tensor static:mse", "bf16")


@dataclass
class Notebook:
    """What the solvers were given, and when they are to fail."""

    weights: list[Tensor] = field(default_factory=list)
    seen: list[Seen | None] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)
    fail_at: int | None = None

    def count(self) -> None:
        """One more solve."""
        if self.fail_at is not None and len(self.weights) + len(self.blocks) >= self.fail_at:
            raise KeyboardInterrupt


NOTEBOOK = Notebook()


@dataclass(frozen=True)
class SeesHessian:
    """Rounds to nearest with a range weighted by the diagonal of the Hessian: depends on all that it is given."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "inputs"})

    def solve(self, weight: Tensor, spec: QuantSpec, seen: Seen | None = None) -> Solved:
        NOTEBOOK.count()
        if seen is None or seen.hessian is None:
            raise DataError("no Hessian")
        NOTEBOOK.weights.append(weight)
        NOTEBOOK.seen.append(seen)
        record = Rtn().quantize(weight, spec, Seen(seen.hessian.diagonal().clone(), None, seen.samples))
        return Solved(record, (f"{seen.samples} samples",))

    def quantize(self, weight: Tensor, spec: QuantSpec, seen: Seen | None = None) -> QuantizedTensor:
        return self.solve(weight, spec, seen).record


@dataclass(frozen=True)
class SeesOnlyHessian(SeesHessian):
    """The same without input vectors, so that it works on grouped convolutions too."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})


@dataclass(frozen=True)
class SeesDrift(SeesHessian):
    """The same with how far the inputs have moved from the float model's."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "drift"})


@dataclass(frozen=True)
class SeesBlock:
    """Chooses for the whole block between two ranges, by the error of its output; static inputs are made narrower."""

    needs: ClassVar[frozenset[str]] = frozenset({"block"})

    def solve_block(self, block: Block) -> dict[str, Solved]:
        NOTEBOOK.count()
        indices = list(range(block.samples))
        target = block.target(indices)
        tried = []
        for method in (Rtn(range="absmax"), Rtn(range="mse")):
            records = {n: method.quantize(w, block.specs[n], block.seen[n]) for n, w in block.weights.items()}
            weights = {name: record.dequantize().requires_grad_() for name, record in records.items()}
            error = (block.output(weights, indices) - target).square().mean()
            gradients = torch.autograd.grad(error, list(weights.values()))
            tried.append((float(error.detach()), records, weights, gradients))
        best = min(tried, key=lambda entry: entry[0])
        NOTEBOOK.blocks.append(block)
        factors = dict.fromkeys(block.adjustable, 0.8)
        training = InputTraining({name: torch.tensor(factor) for name, factor in factors.items()})
        NOTEBOOK.answers.append(
            {"error": best[0], "weights": best[2], "gradients": best[3], "training": training},
        )
        notes = (f"{block.samples} samples",)
        return {name: Solved(record, notes, factors.get(name, 1.0)) for name, record in best[1].items()}


METHODS = {
    "sees_hessian": SeesHessian,
    "sees_only_hessian": SeesOnlyHessian,
    "sees_drift": SeesDrift,
    "sees_block": SeesBlock,
}
