"""What every trainable twin of a quantized module is: the float weight, its ranges, and the module it will become.

In training mode a twin computes in float with its weight and input rounded; in evaluation mode it *is* the quantized
module: it builds the one that conversion would install, and calls that. It is built anew when a tensor has changed.
"""

from __future__ import annotations

import copy
import json
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from narrowcast.core import QuantizedTensor, all_finite
from narrowcast.errors import FormatError, ModelError, RecipeError
from narrowcast.nn.activation import FLOAT, Activation
from narrowcast.nn.base import QuantizedModule
from narrowcast.nn.input_watch import InputWatch, first_samples
from narrowcast.nn.trained_inputs import Rounding, StaticRange, unclamped_codes
from narrowcast.nn.trained_ranges import InputRange, WeightRange, finite_range, scale_error
from narrowcast.nn.training import Training


class WeightCast(nn.Module):
    """A weight in a format without scales: a cast, gradients pass through it.

    Args:
        start: the weight as post-training quantization left it.
    """

    def __init__(self, start: QuantizedTensor) -> None:
        super().__init__()
        self.spec, self.shape = start.spec, start.shape

    by_rows = False

    def quantized(self, weight: Tensor, grown: Tensor | None = None) -> Tensor:
        """The weight as the format holds it, float32."""
        return weight + (weight.detach().to(self.spec.format.storage).float() - weight.detach())

    def record(self, weight: Tensor, grown: Tensor | None = None) -> QuantizedTensor:
        """See `WeightRange.record`."""
        return QuantizedTensor(self.spec.format.encode(weight.detach()), None, None, self.spec)

    def freeze_(self, frozen: bool = True) -> None:
        """Does nothing: there is no range."""


AnyRange = WeightRange | WeightCast


class TrainedModule(nn.Module):
    """Base of the trainable twins.

    Args:
        path: name of the module in its model, for errors and reports.
        quantized: the module that post-training quantization built.
        training: how ranges are trained.
        ranges: of every weight, by name.
        input_range: of a static input; convolutions that read the same image share one.

    Attributes:
        twin_of: the quantized module that this is the twin of.
        steps: [1] int64, forward passes in training mode.
        start: [1] int64, a sum over the bits of what is trained as it was at the start.
    """

    twin_of: ClassVar[type[QuantizedModule]]
    steps: Tensor
    start: Tensor
    settings: Tensor
    input_range: InputRange | None

    def __init__(
        self, path: str, quantized: QuantizedModule, training: Training, ranges: dict[str, AnyRange],
        input_range: InputRange | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.path, self.method = path, training.name
        self.ranges = nn.ModuleDict(ranges)
        self.input_range = input_range
        self.spec_of_input = getattr(quantized, "activation", FLOAT).spec  # an embedding has none
        self.clips = input_range is not None and input_range.clips
        self.register_buffer("steps", torch.zeros(1, dtype=torch.int64))
        self.register_buffer("start", torch.zeros(1, dtype=torch.int64))
        config = {"module": quantized.kind, "train": training.name, "config": quantized.config()}
        text = json.dumps(config, sort_keys=True).encode()
        self.register_buffer("settings", torch.frombuffer(bytearray(text), dtype=torch.uint8).clone())
        self.watch = InputWatch()
        self.__dict__["_built"] = None

    @abstractmethod
    def matrix(self, name: str) -> Tensor:
        """The weight as it is quantized, [out, in * kernel] float32: input scales and BatchNorm taken in."""

    def grown(self) -> Tensor | None:
        """[out, 1] what has multiplied the rows of the weight since the start besides training; None for 1."""
        return None

    @abstractmethod
    def build(self) -> QuantizedModule:
        """The quantized module that this twin stands for now, with tensors of its own."""

    @abstractmethod
    def trained_forward(self, *arguments: Any, **named: Any) -> Any:
        """The forward pass in float with weights and inputs rounded."""

    def weight_range(self, name: str = "weight") -> AnyRange:
        """The ranges of one weight."""
        found: AnyRange = self.ranges[name]  # type: ignore[assignment]
        return found

    def records(self) -> dict[str, QuantizedTensor]:
        """The weights as they would be stored now, by name.

        Raises:
            ModelError: a weight or a range is not finite; the message names the layer.
        """
        return {name: self._record(name, part) for name, part in self.ranges.items()}  # type: ignore[arg-type]

    def _record(self, name: str, part: AnyRange) -> QuantizedTensor:
        matrix = self.matrix(name).detach()
        if not all_finite(matrix):
            raise ModelError(
                f"layer {self.path!r}: its trained {name} is not finite; the loss was probably NaN or infinite: lower "
                "the learning rate, clip gradients, and go on from the last good state_dict"
            )
        if isinstance(part, WeightRange):
            finite_range(part, f"layer {self.path!r}")
        try:
            return part.record(matrix, self.grown())
        except FormatError as error:
            raise scale_error(f"layer {self.path!r}", error) from None

    def activation(self) -> Activation:
        """The treatment of the input as it is now."""
        if self.input_range is None:
            return Activation(self.spec_of_input)
        finite_range(self.input_range, f"layer {self.path!r}, input")
        return self.input_range.activation()

    def rounding(self, channel_dim: int, group: int = 0) -> Rounding:
        """How the input is rounded."""
        return Rounding.of(Activation(self.spec_of_input), channel_dim, group, clips=self.clips)

    def static_range(self, x: Tensor) -> StaticRange | None:
        """The range of a static input for one pass; None where it is not static."""
        if self.input_range is None:
            return None
        return StaticRange(*self.input_range.range(x.numel() // max(x.shape[0], 1)))

    def forward(self, *arguments: Any, **named: Any) -> Any:
        """As the float module; in evaluation mode as the quantized one."""
        if not self.training:
            return self._evaluated(arguments, named)
        with torch.no_grad():
            self.steps.add_(1)
        return self.trained_forward(*arguments, **named)

    def built(self) -> QuantizedModule:
        """The quantized module as of now; built anew when a tensor has changed since the last call."""
        state = self._fingerprint()
        kept = self.__dict__["_built"]
        if kept is None or kept[0] != state:
            with torch.no_grad():
                kept = (state, self.build().eval())
            self.__dict__["_built"] = kept
        module: QuantizedModule = kept[1]
        return module

    def train(self, mode: bool = True) -> TrainedModule:
        """As in torch; what evaluation built is dropped when training goes on."""
        if mode:
            self.__dict__["_built"] = None
        return super().train(mode)

    def look_(self, x: Tensor, how: Rounding, static: StaticRange | None) -> None:
        """Take a thin sample of a static input for the health report, in some passes."""
        if static is None or torch.compiler.is_compiling() or not self.watch.due() or not x.numel():
            return
        with torch.no_grad():
            self.watch.see_(unclamped_codes(first_samples(x), how, static), how.high)

    def freeze_ranges_(self, frozen: bool = True) -> None:
        """Hold all ranges where they are, or let them go on."""
        for part in (*self.ranges.values(), self.input_range):
            if part is not None:
                part.freeze_(frozen)  # type: ignore[operator]

    @torch.compiler.disable
    def _evaluated(self, arguments: Any, named: Any) -> Any:
        return self.built()(*arguments, **named)

    def begin_(self) -> None:
        """Remember the parameters as they are: what training starts from."""
        self.start.fill_(sum(_bits(p) for p in self.parameters()))

    def was_trained(self) -> bool:
        """Whether it ran in training mode, or, as a moving average does, got other parameters."""
        return int(self.steps) > 0 or int(self.start) != sum(_bits(p) for p in self.parameters())

    def _fingerprint(self) -> tuple[Any, ...]:
        """Changes when a tensor does, also one that is written through `.data`, which counts no version."""
        return tuple((t.data_ptr(), t._version, _bits(t)) for t in self._deciding())

    def _deciding(self) -> Iterator[Tensor]:
        yield from self.parameters()
        for name, buffer in self.named_buffers():
            if name not in ("steps", "start", "settings") and not name.endswith("num_batches_tracked"):
                yield buffer

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        given = state.get(prefix + "settings")
        if given is not None and not torch.equal(given.cpu(), self.settings.cpu()):
            raise RecipeError(
                f"layer {self.path!r}: the state_dict belongs to another recipe: it has {_said(given)}, this model was "
                f"prepared as {_said(self.settings)}; prepare with the recipe that the state was trained with"
            )
        super()._load_from_state_dict(state, prefix, *rest)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_built": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> TrainedModule:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "_built"})
        made.__dict__["_built"] = None
        return made

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"train={self.method}, input={Activation(self.spec_of_input).mode}"


def _bits(tensor: Tensor) -> int:
    """The sum of a tensor's elements read as integers."""
    values = tensor.detach()
    whole = {4: torch.int32, 2: torch.int16, 8: torch.int64, 1: torch.int8}[values.element_size()]
    return int(values.contiguous().view(whole).sum(dtype=torch.int64)) if values.numel() else 0


def _said(settings: Tensor) -> str:
    values = json.loads(bytes(settings.cpu().tolist()).decode())
    config = values["config"]
    formats = config.get("spec") or ", ".join(sorted(set(config.get("specs", {}).values())))
    given = (config.get("activation") or {}).get("spec") or "float"
    return f"{values['module']} {formats} with input {given}, trained by {values['train']}"
