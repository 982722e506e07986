"""What a model's `forward` takes, as plain data; knows nothing about the values."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True)
class Signature:
    """The parameters of a `forward`.

    Args:
        owner: class name of the model, for messages.
        positional: names that can be given by position, in order.
        required: those of `positional` without a default.
        names: names that can be given by keyword.
        any_positional: whether there is a `*args`.
        any_keyword: whether there is a `**kwargs`.
    """

    owner: str
    positional: tuple[str, ...]
    required: tuple[str, ...]
    names: tuple[str, ...]
    any_positional: bool
    any_keyword: bool

    @classmethod
    def of(cls, model: Any) -> Signature:
        """The signature of a model's `forward`, or of a plain function; looks through `torch.compile`.

        A `forward` with the attribute `input_names` takes these: inputs of ONNX graphs are called `input.1` too, which
        no parameter can be.
        """
        model = getattr(model, "_orig_mod", model)
        forward = getattr(model, "forward", model)
        if (given := getattr(forward, "input_names", None)) is not None:
            return cls(type(model).__name__, tuple(given), tuple(given), tuple(given), False, False)
        parameters = list(inspect.signature(forward).parameters.values())
        kinds = {parameter.kind for parameter in parameters}
        positional = [parameter for parameter in parameters if parameter.kind in POSITIONAL]
        return cls(
            owner=type(model).__name__,
            positional=tuple(parameter.name for parameter in positional),
            required=tuple(p.name for p in positional if p.default is inspect.Parameter.empty),
            names=tuple(parameter.name for parameter in parameters if parameter.kind in BY_NAME),
            any_positional=inspect.Parameter.VAR_POSITIONAL in kinds,
            any_keyword=inspect.Parameter.VAR_KEYWORD in kinds,
        )

    def name_of(self, position: int) -> str:
        """Name of the parameter at a position; `*args` have none."""
        return self.positional[position] if position < len(self.positional) else ""
