"""From a float model to one that trains with its quantization in sight; starts where post-training leaves off."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from narrowcast.core import spread_channels
from narrowcast.errors import ModelError
from narrowcast.models.layer_kinds import kind_of
from narrowcast.models.torch_model import WAS_TRAINING
from narrowcast.nn import FLOAT, TRAINING, ConvShape, QuantizedModule, Training
from narrowcast.nn.trained import AnyRange, TrainedModule, WeightCast
from narrowcast.nn.trained_conv import TrainedConv
from narrowcast.nn.trained_ranges import InputRange, WeightRange
from narrowcast.nn.trained_recurrent import TrainedRecurrent
from narrowcast.nn.trained_start import start_at_codes
from narrowcast.nn.twins import TWINS
from narrowcast.pipeline.run import Begun, solve_model
from narrowcast.pipeline.shared_ranges import SharedRanges
from narrowcast.planning import LayerPlan
from narrowcast.qat.state import Prepared, attach_, twins_of
from narrowcast.recipe import Recipe, load_recipe


def prepare(
    model: nn.Module, recipe: str | Path | Mapping[str, Any] | Recipe, data: Any = None, *, progress: bool = True
) -> nn.Module:
    """A model to train whose layers compute as their quantized modules will.

    The recipe is carried out as by `nc.quantize`, with its calibration, transforms and solvers; then every quantized
    module becomes a trainable twin that starts with the same integers. In training mode weights and inputs are
    rounded and gradients pass; in evaluation mode the model is the integer model, bit for bit.

    Args:
        model: any PyTorch module; it is not changed.
        recipe: as in `nc.quantize`; the key `train` of a rule says how ranges are trained ("lsq", "lsq+", "ste",
            "pact").
        data: calibration data, as in `nc.quantize`.
        progress: show progress on standard error.

    Returns:
        A model in training mode with float parameters of the original's names where layers kept theirs; a BatchNorm
        behind a convolution has moved into that. Convert it with `nc.qat.convert`.

    Raises:
        RecipeError, ModelError, DataError, FormatError: as `nc.quantize`; ModelError for a layer that cannot be
            trained: mixtures of experts that are one parameter, and linear layers with outlier channels.
    """
    begun = solve_model(model, load_recipe(recipe), data, progress=progress, keep_floats=True)
    _refuse_untrainable(begun)
    builder = _Builder(begun)
    for path, rows in begun.job.units().items():
        builder.install_(path, rows)
    trained = begun.job.adapter.model
    originals = dict(model.named_parameters())
    for name, parameter in trained.named_parameters():
        source = originals.get(name)
        parameter.requires_grad_(parameter.is_floating_point() and (source is None or source.requires_grad))
    notes = [note for note in [*begun.notes, *builder.notes] if note != WAS_TRAINING]
    _declare_shared_(trained)
    attach_(trained, Prepared.of(begun, type(model).__name__, notes))
    return trained.train()


def _declare_shared_(model: nn.Module) -> None:
    """Tell which tensors of twins another one has, too, in the way in which transformers' models tell it.

    Its Trainer writes checkpoints in which no tensor stands twice, and refuses what shares tensors without saying so.
    """
    first: dict[int, TrainedModule] = {}
    for _, twin in twins_of(model):
        tensors = twin.state_dict(keep_vars=True)
        shared = [name for name, tensor in tensors.items() if first.setdefault(id(tensor), twin) is not twin]
        if shared:
            twin.__dict__["_tied_weights_keys"] = dict.fromkeys(shared, "")


def _refuse_untrainable(begun: Begun) -> None:
    learned = [name for name, solved in begun.job.solved.items() if solved.record.levels is not None]
    if learned:
        raise ModelError(
            f"layer {learned[0]!r} has learned levels, and these have no gradient here; give it a format with scales "
            "such as 'int4/group32', 'nf4/group32', or 'keep'"
        )
    for path, (built, _) in begun.job.modules.items():
        if type(built.module) not in TWINS:
            raise ModelError(
                f"layer {path!r} ({built.module.kind}) cannot be trained: it has no trainable twin; give it a rule "
                "with 'keep', or for outlier channels one without 'outliers'"
            )


class _Builder:
    """Makes the twins; tied weights become one parameter with one range, shared images one input range.

    Args:
        begun: the model with its quantized modules installed.
    """

    def __init__(self, begun: Begun) -> None:
        self.begun, self.adapter = begun, begun.job.adapter
        self.weights: dict[str, nn.Parameter] = {}
        self.ranges: dict[str, AnyRange] = {}
        self.inputs = _shared_inputs(begun)
        self.notes: list[str] = []

    def install_(self, path: str, rows: list[LayerPlan]) -> None:
        """Put the twin of the module at `path` there. Changes the model."""
        quantized = self.begun.job.modules[path][0].module
        training = TRAINING[rows[0].train]
        twin = TWINS[type(quantized)]
        norm = self._norm(path)
        input_range = self._input_range(path, quantized, training)
        weights, ranges = {}, {}
        for row in rows:
            for site in row.layer.sites:
                if site.path == path:
                    name = row.layer.name
                    if name not in self.weights:
                        self.weights[name], self.ranges[name] = self._start(row, path, site.parameter, quantized, norm)
                    weights[site.parameter], ranges[site.parameter] = self.weights[name], self.ranges[name]
        more: dict[str, Any] = {}
        if issubclass(twin, TrainedConv):
            more = {"norm": norm[2], "bias": norm[1]} if norm else {"bias": quantized.bias}
        elif issubclass(twin, TrainedRecurrent):
            more = {"dropout": float(getattr(self.begun.floats[path], "dropout", 0.0))}
        made: TrainedModule = twin(path, quantized, training, ranges, input_range, weights, **more)  # type: ignore[call-arg]
        made.begin_()
        self.adapter.install(path, made)

    def _start(
        self, row: LayerPlan, path: str, parameter: str, quantized: QuantizedModule,
        norm: tuple[Tensor, Tensor | None, nn.Module] | None,
    ) -> tuple[nn.Parameter, AnyRange]:  # fmt: skip
        """The parameter and the range of a weight."""
        record = self.begun.job.solved[row.layer.name].record
        module = self.begun.floats[path]
        kind = kind_of(module)
        assert kind is not None
        keeps_layout = kind.name != "Conv1D"  # transformers' transposed linear layer becomes an ordinary one
        factor = self._factor(path, row, quantized)
        matrix = kind.matrix(module, parameter).detach().float()
        if norm is not None:
            shape = ConvShape.of(module)  # type: ignore[arg-type]
            matrix = shape.to_matrix(norm[0].detach().float())
            factor = factor * _norm_factor(norm[2]).view(-1, 1)
        range_: AnyRange
        if record.scale is None:
            range_ = WeightCast(record)
        else:
            matrix = start_at_codes(matrix, factor, record)
            range_ = WeightRange(record, matrix * factor, TRAINING[row.train], matrix)
        start = kind.restore(module, parameter, matrix) if keeps_layout else matrix
        return nn.Parameter(start.contiguous().clone()), range_

    def _factor(self, path: str, row: LayerPlan, quantized: QuantizedModule) -> Tensor:
        """[1 or out, columns or 1] what the weight takes in from its static input."""
        input_range = self.inputs.get(path)
        ratio = None if input_range is None else input_range.ratio()
        if ratio is None:
            return torch.ones(1, 1)
        site = row.layer.sites[0]
        shape = (row.layer.shape[0], row.layer.shape[1])
        groups = int(getattr(self.begun.floats[path], "groups", 1)) if site.type.startswith("Conv") else 1
        return spread_channels(ratio, shape, groups)

    def _norm(self, path: str) -> tuple[Tensor, Tensor | None, nn.Module] | None:
        """The BatchNorm that the twin at `path` takes over, with the weight and bias before it was folded."""
        found = self.begun.norms.get(path)
        if found is None:
            return None
        weight, bias, norm = found
        folded: Any = self.begun.floats[path]
        matrix = ConvShape.of(folded).to_matrix(folded.weight).float()
        before = ConvShape.of(folded).to_matrix(weight.detach()).float() * _norm_factor(norm).view(-1, 1)
        if not torch.allclose(matrix, before, rtol=1e-4, atol=1e-6 * float(matrix.abs().max())):
            self.notes.append(f"{path}: a transform rewrote its weight, so its BatchNorm stays folded in training")
            return None
        quantized: Any = self.begun.job.modules[path][0].module
        own: Any = _own_norm(norm)
        if quantized.bias is not None and folded.bias is not None:
            correction = quantized.bias - folded.bias  # what bias correction added
            if own.bias is not None:
                own.bias.data += correction
            else:
                raw = correction / _norm_factor(norm)
                bias = raw if bias is None else bias.detach() + raw
        return weight, bias, own

    def _input_range(self, path: str, quantized: QuantizedModule, training: Training) -> InputRange | None:
        ranges = quantized.input_ranges() if hasattr(quantized, "activation") else FLOAT
        if ranges.mode != "static":
            return None
        if path not in self.inputs:
            self.inputs[path] = InputRange(ranges, training)
        return self.inputs[path]


def _norm_factor(norm: Any) -> Tensor:
    factor = torch.rsqrt(norm.running_var.float() + norm.eps)
    return factor if norm.weight is None else factor * norm.weight.detach().float()


def _own_norm(norm: Any) -> nn.Module:
    """A copy of a BatchNorm with tensors of its own."""
    made = type(norm)(
        norm.num_features, norm.eps, norm.momentum, affine=norm.affine, track_running_stats=True,
        device=norm.running_mean.device,
    )  # fmt: skip
    made.load_state_dict(norm.state_dict())
    return made  # type: ignore[no-any-return]


def _shared_inputs(begun: Begun) -> dict[str, InputRange]:
    """One input range for all convolutions that read the same image, or parts of it, where their rules train alike."""
    rows = {path: rows[0] for path, rows in begun.job.units().items()}
    shared: dict[str, InputRange] = {}
    for paths in groups_of(begun.job.shared):
        static = [p for p in paths if p in rows and begun.job.modules[p][0].module.input_ranges().mode == "static"]
        by_codes: list[tuple[Any, str, InputRange]] = []
        factor: nn.Parameter | None = None
        for path in static:
            ranges, train = begun.job.modules[path][0].module.input_ranges(), rows[path].train
            same = next((r for a, t, r in by_codes if t == train and _same(a, ranges)), None)
            if same is None:
                same = InputRange(ranges, TRAINING[train])
                if len(static) > 1 and same.shift is not None:
                    same.shift = (
                        same.shift
                        if all(_same(ranges, begun.job.modules[p][0].module.input_ranges()) for p in static)
                        else None
                    )
                factor = same.factor if factor is None else factor
                if same.factor is not None:
                    same.factor = factor
                by_codes.append((ranges, train, same))
            shared[path] = same
    return shared


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one.scale, other.scale) and torch.equal(one.zero_point, other.zero_point)


def groups_of(shared: SharedRanges) -> list[list[str]]:
    """The paths of convolutions that read a common image, directly or through others, in order."""
    groups: list[tuple[set[str], list[str]]] = []
    for path, calls in shared.origins.items():
        names, paths = {origin.name for call in calls for origin in call}, [path]
        apart = []
        for group in groups:
            if group[0] & names:
                names, paths = names | group[0], [*group[1], *paths]
            else:
                apart.append(group)
        groups = [*apart, (names, paths)]
    return [paths for _, paths in groups]
