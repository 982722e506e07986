"""What every transform of the pipeline works on: the model, its feeds, what the data shows, errors of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor

from narrowcast.errors import DataError, ModelError, RecipeError
from narrowcast.methods import Rtn, Seen, WeightMethod, make_method
from narrowcast.models import TorchModel
from narrowcast.models.feeds import Feed, Feeds
from narrowcast.models.modules import get_module
from narrowcast.models.rewrite import groups_of, input_channels, kernel_of, layer_kind, matrix
from narrowcast.observers.input_sample import InputSample
from narrowcast.pipeline.solve_weight import damped
from narrowcast.planning import LayerPlan, Plan
from narrowcast.transforms import diagonal_error, linear_error, multiply_columns, quantized_inputs


@dataclass(frozen=True)
class Step:
    """A part of a rewrite that keeps the function by itself.

    Args:
        layers: paths of the modules that it changes, the producer first.
        apply: changes them.
    """

    layers: tuple[str, ...]
    apply: Callable[[], None]


@dataclass(frozen=True)
class Rewrite:
    """What a transform wants to do.

    Args:
        steps: in order.
        notes: what the report should say of how it was chosen.
    """

    steps: list[Step]
    notes: list[str]


@dataclass
class Stage:
    """What a transform works on.

    Args:
        adapter: the working copy.
        plan: what will happen to every weight.
        data: calibration data; None when there is none.
        probe: the first batch; None without data.
        feeds: who feeds whom.
        inputs: by path, what the data shows at the input of layers.
        outputs: by path, at the output of producers.
        input_scales: by path, what the inputs of a layer have been divided by since they were observed.
    """

    adapter: TorchModel
    plan: Plan
    data: Any
    probe: Any
    feeds: Feeds
    inputs: dict[str, InputSample] = field(default_factory=dict)
    outputs: dict[str, InputSample] = field(default_factory=dict)
    input_scales: dict[str, Tensor] = field(default_factory=dict)

    def module(self, path: str) -> Any:
        """The module at a path of the working copy."""
        return get_module(self.adapter.model, path)

    def row(self, path: str) -> LayerPlan | None:
        """The plan of the layer at a path; None where it stays float."""
        for row in self.plan.layers:
            if row.weight is not None and any(site.path == path for site in row.layer.sites):
                return row
        return None

    def observe(self, inputs: Iterable[str], outputs: Iterable[str] = ()) -> None:
        """One pass over the data, watching the inputs of some layers and the outputs of others.

        Raises:
            DataError: there is no data, or it holds what is not finite; names the layer.
        """
        self.inputs = {path: InputSample() for path in inputs}
        self.outputs = {path: InputSample() for path in outputs}
        handles = [
            self.module(path).register_forward_hook(_watcher(path, sample, self._channel_dim(path)))
            for path, sample in self.outputs.items()
        ]
        try:
            self.adapter.observe(self.data, {path: [sample.update] for path, sample in self.inputs.items()})
        finally:
            for handle in handles:
                handle.remove()

    def _channel_dim(self, path: str) -> int:
        kind = layer_kind(self.module(path))
        return -1 if kind is None else kind.channel_dim

    def select(self, transform: str, pairs: tuple[tuple[str, str], ...]) -> list[Feed]:
        """The feeds that a transform works on: all that keep the function, or the pairs that the recipe names.

        Raises:
            RecipeError: a pattern matches nothing.
            ModelError: a pair does not keep the function; names both layers and says why.
        """
        if not pairs:
            return self.feeds.usable()
        chosen: dict[str, Feed] = {}
        paths = [path for path, _ in self.adapter.model.named_modules()]
        for first, second in pairs:
            producers = [path for path in paths if path and fnmatchcase(path, first)]
            readers = [path for path in paths if path and fnmatchcase(path, second)]
            if not producers or not readers:
                missing = second if producers else first
                raise RecipeError(f"transform {transform}: the pattern {missing!r} of its pairs matches no module")
            for producer in producers:
                chosen[producer] = self._checked(transform, producer, readers)
        return list(chosen.values())

    def _checked(self, transform: str, producer: str, readers: list[str]) -> Feed:
        nearest = max(readers, key=lambda path: common_start(path, producer))
        feed = self.feeds.feeds.get(producer)
        if feed is None:
            why = f"{producer!r} ({type(self.module(producer)).__name__}) is no layer whose output can be scaled"
        elif not bool(feed.free.any()):
            why = feed.reason
        elif nearest not in [reader.path for reader in feed.readers]:
            why = f"{producer!r} feeds {', '.join(repr(reader.path) for reader in feed.readers)}"
        else:
            return feed
        raise ModelError(
            f"transform {transform}: the pair {producer!r} -> {nearest!r} changes the function: {why}; leave it out"
        )

    def dequantized(self, row: LayerPlan, weight: Tensor, mean_square: Tensor | None) -> Tensor:
        """A weight after quantization as the plan has it; solvers that need more than tensors are stood in for by rtn.

        Args:
            row: its plan.
            weight: [out, columns] float32.
            mean_square: [in] of its input channels; None where they are not known.
        """
        method = make_method(row.method)
        if getattr(method, "needs", frozenset()):
            method = Rtn()
        seen = None
        if mean_square is not None and weight.shape[1] % mean_square.numel() == 0:
            spread = mean_square.float().repeat_interleave(weight.shape[1] // mean_square.numel())
            seen = Seen(importance=damped(spread, None)) if bool((spread > 0).any()) else None
        assert row.weight is not None
        return cast(WeightMethod, method).quantize(weight, row.weight, seen).dequantize()

    def mean_square(self, path: str) -> Tensor | None:
        """Mean square of the input channels of a layer as they are now, [in]; None where it is not known or no use."""
        if path not in self.inputs or self.inputs[path].positions == 0 or groups_of(self.module(path)) > 1:
            return None
        return self.inputs[path].mean_square() / self.input_scales.get(path, torch.ones(())).double().square()

    def layer_error(self, path: str, scale: Tensor | None = None) -> tuple[float, float]:
        """What quantizing a layer does to its output on the sample of its inputs.

        Args:
            path: a layer whose input was observed.
            scale: [in] what its input channels would be divided by and its columns multiplied by; None for nothing.

        Returns:
            error, signal: sums of squares; (0, 1) for a layer that stays float.
        """
        row, module = self.row(path), self.module(path)
        if row is None or self.inputs[path].positions == 0:
            return 0.0, 1.0
        weight, groups = matrix(module), groups_of(module)
        rows = self.inputs[path].rows().double()
        if path in self.input_scales:
            rows = rows / self.input_scales[path]
        rows = rows.float()
        square = self.mean_square(path)
        scale = torch.ones(input_channels(module), dtype=torch.float64) if scale is None else scale
        changed = multiply_columns(weight, scale, groups)
        changed = self.dequantized(row, changed, None if square is None else square / scale.square())
        if kernel_of(module) > 1 or groups > 1:
            return diagonal_error(weight, changed, rows, scale, groups), diagonal_error(
                weight, torch.zeros_like(weight), rows, torch.ones_like(scale), groups
            )
        spec = None if row.input is None else row.input.spec
        given = quantized_inputs((rows.double() / scale).float(), spec)
        error = linear_error(weight, changed, rows, given)
        return error, linear_error(weight, torch.zeros_like(weight), rows, torch.zeros_like(rows))


def common_start(first: str, second: str) -> int:
    """How many leading characters two paths share."""
    return next(
        (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second))
    )


def _watcher(path: str, sample: InputSample, channel_dim: int) -> Callable[..., None]:
    def hook(module: Any, args: Any, output: Tensor) -> None:
        try:
            sample.update(output.detach().movedim(channel_dim, -1))
        except DataError as error:
            raise DataError(f"output of layer {path!r}: {error}") from None

    return hook
