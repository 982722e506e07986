"""What the pipeline knows of a model: layers that are weights, and an adapter per framework."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from narrowcast.core import QuantizedTensor, QuantSpec
from narrowcast.nn import Activation


@dataclass(frozen=True)
class Site:
    """One place that uses a weight.

    Args:
        path: name of the module in the model ("" for the model itself).
        parameter: name of the weight in that module.
        type: the module's type as recipes name it ("Linear", "Conv2d", "Embedding", ...).
    """

    path: str
    parameter: str
    type: str


@dataclass(frozen=True)
class Layer:
    """One weight, with every place that uses it.

    Args:
        name: the module's name, followed by the weight's where the module has several.
        type: type of the first site; "Parameter" for a weight that no supported module owns.
        shape: (out, in * kernel) of the weight matrix; the tensor's own shape for a "Parameter".
        sites: all uses; more than one for tied weights.
        role: "embedding", "head" (maps features to an embedding's vocabulary), "tied" (both) or "".
        reason: why it cannot be quantized; empty when it can.
        bytes: bytes of the weight as it is.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    sites: tuple[Site, ...]
    role: str = ""
    reason: str = ""
    bytes: int = 0

    @property
    def parameters(self) -> int:
        """Number of weights."""
        total = 1
        for side in self.shape:
            total *= side
        return total

    @property
    def types(self) -> frozenset[str]:
        """The types of all sites."""
        return frozenset(site.type for site in self.sites) | {self.type}


@dataclass
class Sample:
    """A small input of one module, kept to judge it: positional and named arguments of its first call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Observation:
    """What one streaming pass over the data left behind.

    Args:
        calls: how often each module ran, by path.
        positions: how often each module's weight matrix was multiplied with one column of inputs, by path.
        experts: [experts] how many tokens each expert of a fused mixture got, by path.
        samples: one kept input of each module, by path.
        batches: number of batches.
        notes: what the user should know of how the data was taken.
    """

    calls: dict[str, int] = field(default_factory=dict)
    positions: dict[str, int] = field(default_factory=dict)
    experts: dict[str, Tensor] = field(default_factory=dict)
    samples: dict[str, Sample] = field(default_factory=dict)
    batches: int = 0
    notes: list[str] = field(default_factory=list)


Watcher = Callable[[Tensor], None]


@dataclass(frozen=True)
class Possible:
    """What a target can make of a weight and its input.

    Args:
        weight: format of the weight; None keeps it float.
        input: format of the input; None leaves it float.
        reason: why it is kept, or what is worth knowing.
        fallback: why it is not what was asked for; "" where it is.
    """

    weight: QuantSpec | None
    input: QuantSpec | None
    reason: str = ""
    fallback: str = ""


class ModelAdapter(ABC):
    """The only way the pipeline touches a model; one implementation per framework.

    Attributes:
        name: of the model, for people.
        model: the working copy, called like a torch module.
        notes: decisions that concern no single layer.
    """

    name: str
    model: Any
    notes: list[str]

    @abstractmethod
    def layers(self) -> list[Layer]:
        """Every weight of the model, in the model's order."""

    @abstractmethod
    def weight(self, layer: Layer) -> Tensor:
        """The float weight as a matrix [out, in * kernel]."""

    def possible(self, layer: Layer, weight: QuantSpec, given: QuantSpec | None) -> Possible:
        """What becomes of a weight and its input that are to have these formats; here what is asked for."""
        return Possible(weight, given)

    @abstractmethod
    def takes_activation(self, site: Site) -> bool:
        """Whether the input of a site can be quantized."""

    @abstractmethod
    def input_groups(self, site: Site) -> int:
        """Groups of a convolution, 1 elsewhere: the input channels that a row of the weight does not see."""

    def sees_inside(self, site: Site) -> bool:
        """Whether it can be told what multiplies the weights of a layer that has several."""
        return False

    @abstractmethod
    def is_depthwise(self, site: Site) -> bool:
        """Whether no two input channels are summed."""

    @abstractmethod
    def kernel_elements(self, site: Site) -> int:
        """Columns of the weight per input channel."""

    @abstractmethod
    def kernel_name(self, op: str) -> str:
        """The body that runs an integer operation, as the report says it."""

    @abstractmethod
    def float_kernel(self, layer: Layer, spec: QuantSpec) -> str:
        """What multiplies float inputs with a weight of this format."""

    @abstractmethod
    def integer_op(self, site: Site, spec: QuantSpec, mode: str) -> str | None:
        """The integer kernel that would run this site; None where there is none."""

    @abstractmethod
    def observe(self, data: Any, watchers: Mapping[str, Iterable[Watcher]]) -> Observation:
        """Run the data once; every watcher of a module path sees that module's inputs, channels last."""

    @abstractmethod
    def build(self, path: str, weights: Mapping[str, QuantizedTensor], activation: Activation) -> Any:
        """The quantized module that could stand at `path`; `weights` by parameter name. Changes nothing."""

    @abstractmethod
    def install(self, path: str, module: Any) -> None:
        """Put a built module at `path`, and wherever the module that stands there stands too."""
