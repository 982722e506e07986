"""What a training step is measured on: bits and ranges of weights and inputs, the same for every tool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

EDGES = ("conv1", "linear")
"""First and last layer of ResNet-20, which keep 8 bits where others have fewer."""


@dataclass(frozen=True)
class Format:
    """Bits of weights and inputs.

    Args:
        weight: bits of a weight, symmetric.
        group: inputs that share a scale of the weight; 0 for one scale per output channel.
        input: bits of an input; 0 leaves it float.
        dynamic: whether a row finds its range at run time, with a zero point; False for one range per tensor that is
            found beforehand or while training.
    """

    weight: int
    group: int
    input: int
    dynamic: bool = False

    def of(self, layer: str) -> Format:
        """The format of one layer."""
        return Format(8, 0, 8) if layer in EDGES and self.weight < 8 else self


FORMATS: dict[str, dict[str, Format]] = {
    "resnet20": {"W8A8 static": Format(8, 0, 8), "W4A4 static": Format(4, 0, 4)},
    "minilm": {
        "W8A8 static": Format(8, 0, 8),
        "W8A8 dynamic": Format(8, 0, 8, dynamic=True),
        "W4A8 g32 dynamic": Format(4, 32, 8, dynamic=True),
        "W4 g32": Format(4, 32, 0),
        "W4A4 static": Format(4, 0, 4),
    },
}


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every convolution and linear layer with its path: what each tool quantizes, embeddings stay float."""
    found = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    yield from found


def exchange_(model: nn.Module, made: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """Put `made(path, layer)` in the place of every layer; returns the model."""
    for name, part in layers(model):
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, made(name, part))
    return model
