"""What verifying asks of a runtime: run a batch and tell of every layer as it runs, and run one layer alone.

A runtime (torch, ONNX Runtime with its intermediate outputs exposed) is a subclass of `Runtime` and a row of
`RUNTIMES`; nothing else changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from narrowcast.data import Batch
from narrowcast.parity.bounds import Arithmetic


@dataclass(frozen=True)
class Unit:
    """A layer as one side has it.

    Args:
        name: as both sides call it.
        type: class or operator name.
        arithmetic: how it is computed.
        end: name of the module whose output is the layer's, where another has become part of it on one side (the
            BatchNorm behind a convolution); "" for its own.
        inside: the module inside whose network the layer runs, so that its output exists as codes at most; None where
            the layer runs by itself.
    """

    name: str
    type: str
    arithmetic: Arithmetic
    end: str = ""
    inside: str | None = None


class Watcher(Protocol):
    """What a runtime tells while it runs; both are called in the order in which layers run."""

    def enter(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A layer gets these inputs; what is kept of them must be copied."""

    def leave(self, name: str, output: Any) -> None:
        """A layer gave this output, which later layers may overwrite."""


class Runtime(ABC):
    """One side of the comparison.

    Attributes:
        name: of the model, for people.
        kernels: what computes ("reference", a tier); sides with one name compute one function with one code.
    """

    name: str
    kernels: str

    def meet(self, other: Runtime) -> list[str]:
        """Told what it is compared with, before anything is asked.

        Returns:
            What the runtime computes otherwise than the artefact says, in sentences.
        """
        return []

    def handed(self, unit: Unit, outputs: list[Tensor]) -> list[Tensor]:
        """What would be left of a layer's outputs if this runtime handed them on."""
        return outputs

    @abstractmethod
    def names(self) -> set[str]:
        """Every part of the model that has a name, whether it is a layer or a group of layers."""

    @abstractmethod
    def units(self) -> dict[str, Unit]:
        """The layers in the model's order, by name."""

    @abstractmethod
    def unit(self, name: str, end: str) -> Unit:
        """A part of the model as one layer, with what follows it up to `end` ("" for nothing)."""

    @abstractmethod
    def watching(self, units: Mapping[str, Unit], watcher: Watcher) -> AbstractContextManager[None]:
        """While it lasts, `run` tells the watcher of these layers."""

    @abstractmethod
    def run(self, batch: Batch) -> Any:
        """The model's answer to a batch."""

    @abstractmethod
    def call(self, unit: Unit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of one layer alone."""

    @abstractmethod
    def products(self, unit: Unit, args: tuple[Any, ...]) -> Tensor | None:
        """[...] sums of magnitudes of the products behind each number of the output; None where it is not known."""

    @abstractmethod
    def stored(self, unit: Unit) -> dict[str, Tensor]:
        """The tensors that a layer holds, by names that mean the same on every side: codes, scale, bias."""
