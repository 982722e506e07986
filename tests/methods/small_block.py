"""A block of a model as block solvers see it, made from a small module: what the pipeline builds from a large one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from narrowcast.core import QuantSpec
from narrowcast.methods import InputTraining, Seen


@dataclass
class SmallBlock:
    """Linear layers of `module`, its inputs [samples, ...] and the outputs that are wanted for them."""

    module: nn.Module
    inputs: Tensor
    wanted: Tensor
    specs: Mapping[str, QuantSpec]

    def __post_init__(self) -> None:
        self.weights = {name: self.module.get_parameter(f"{name}.weight").detach() for name in self.specs}
        self.seen: dict[str, Seen] = {}
        self.rounds_inputs, self.adjustable = False, frozenset[str]()
        self.samples = len(self.inputs)

    def output(
        self, weights: Mapping[str, Tensor], indices: Sequence[int], training: InputTraining | None = None
    ) -> Tensor:
        named = {f"{name}.weight": weight for name, weight in weights.items()}
        answer: Tensor = functional_call(self.module, named, (self.inputs[list(indices)],))
        return answer

    def target(self, indices: Sequence[int]) -> Tensor:
        return self.wanted[list(indices)]

    def error(self, weights: Mapping[str, Tensor], indices: Sequence[int]) -> float:
        """Mean squared error of the output for these samples."""
        with torch.no_grad():
            return float((self.output(weights, indices) - self.target(indices)).square().mean(dtype=torch.float64))


def perceptron(text: str, seed: int = 0, samples: int = 32, width: int = 24, hidden: int = 40) -> SmallBlock:
    """Two layers with a GELU between, on correlated inputs [samples, 8, width]; both weights in one format."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    mixing = torch.randn(6, width, generator=generator)
    inputs = torch.randn(samples, 8, 6, generator=generator) @ mixing
    inputs += 0.3 * torch.randn(inputs.shape, generator=generator)
    with torch.no_grad():
        wanted = module(inputs)
    spec = QuantSpec.parse(text)
    return SmallBlock(module, inputs, wanted, {"0": spec, "2": spec})
