"""The PyTorch adapter: finds weights in any `nn.Module`, watches its inputs, exchanges modules. No tracing needed."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from narrowcast.core import QuantizedTensor, QuantSpec
from narrowcast.data import iterate
from narrowcast.errors import DataError, ModelError
from narrowcast.kernels import kernel_name
from narrowcast.models.base import Layer, ModelAdapter, Observation, Sample, Site, Watcher
from narrowcast.models.layer_kinds import LayerKind, kind_of, why_unsupported
from narrowcast.models.modules import get_module, replace_everywhere_
from narrowcast.models.patches import input_rows
from narrowcast.nn import (
    Activation,
    InstalledModule,
    MultiheadAttention,
    QuantizedModule,
    StoredWeight,
    weight_only_kernel,
)
from narrowcast.nn.trained import TrainedModule

# A kept sample has at most this many elements: enough to judge a layer, small beside any model.
_SAMPLE_ELEMENTS = 1 << 20
_HOOK_TABLES = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip
# Types whose matrix is not the parameter as it lies: tied weights of such a type and another are not one matrix.
_OTHER_LAYOUTS = frozenset({"Conv1D", "ConvTranspose2d"})


WAS_TRAINING = "the model was in training mode; it was quantized, and is returned, in evaluation mode"


class TorchModel(ModelAdapter):
    """A PyTorch module as the pipeline sees it.

    Args:
        model: any module; `nn.MultiheadAttention` inside it is taken apart into linear layers.
        inplace: work on `model` itself; otherwise on a copy that shares the tensors until they are replaced.
    """

    def __init__(self, model: nn.Module, *, inplace: bool = False) -> None:
        if not isinstance(model, nn.Module):
            raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}; load or build the model first")
        if any(isinstance(module, TrainedModule) for module in model.modules()):
            raise ModelError(
                "the model is prepared for training already; train and convert it, or start from the float model"
            )
        if any(isinstance(module, InstalledModule) for module in model.modules()):
            raise ModelError("the model is quantized already; start from the float model")
        if lazy := next((name for name, tensor in model.named_parameters() if is_lazy(tensor)), ""):
            raise ModelError(f"parameter {lazy!r} is not initialized; run the model once first")
        self.original = model
        self.name = type(model).__name__
        self.model: nn.Module = model if inplace else _structural_copy(model)
        self.notes: list[str] = []
        if inplace:
            self.notes.append(
                "quantized in place: no float model is left to judge the whole model's error and speed by"
            )
        if self.model.training:
            self.model.eval()
            self.notes.append(WAS_TRAINING)
        self._take_attention_apart_()
        self._layers: list[Layer] | None = None

    @classmethod
    def around(cls, model: nn.Module, *, copy: bool = True) -> TorchModel:
        """An adapter of a model whose modules narrowcast has installed already; it finds no layers in it.

        Args:
            model: any module.
            copy: work on a copy that shares the tensors until they are replaced.
        """
        made = cls.__new__(cls)
        made.original, made.model = model, _structural_copy(model) if copy else model
        made.name, made.notes, made._layers = type(model).__name__, [], []
        return made

    def layers(self) -> list[Layer]:
        """See `ModelAdapter`."""
        if self._layers is None:
            self._layers = _find_layers(self.model)
        return self._layers

    def weight(self, layer: Layer) -> Tensor:
        """See `ModelAdapter`."""
        module, kind = self._module(layer.sites[0].path)
        return kind.matrix(module, layer.sites[0].parameter).detach().float()

    def integer_op(self, site: Site, spec: QuantSpec, mode: str) -> str | None:
        """See `ModelAdapter`."""
        module, kind = self._module(site.path)
        return kind.integer_op(module, spec, mode)

    def kernel_name(self, op: str) -> str:
        """See `ModelAdapter`."""
        return kernel_name(op)

    def float_kernel(self, layer: Layer, spec: QuantSpec) -> str:
        """See `ModelAdapter`."""
        stored = StoredWeight("weight", spec, (layer.shape[0], layer.shape[1]))
        native = weight_only_kernel(stored) if layer.type in ("Linear", "Conv1D") else None
        return native or "dequantized at each call, product in float"

    def takes_activation(self, site: Site) -> bool:
        """See `ModelAdapter`."""
        return self._module(site.path)[1].takes_activation

    def input_groups(self, site: Site) -> int:
        """See `ModelAdapter`."""
        return int(getattr(self._module(site.path)[0], "groups", 1))

    def is_depthwise(self, site: Site) -> bool:
        """See `ModelAdapter`."""
        module = self._module(site.path)[0]
        return getattr(module, "groups", 1) > 1 and module.groups == module.in_channels

    def output_channel_dim(self, site: Site) -> int | None:
        """The dimension of the output channels that a bias is added to; None for modules without such a bias.

        A linear layer without a bias is not given one: it would cost more bytes than the correction is worth.
        """
        module, kind = self._module(site.path)
        if kind.name in ("LSTM", "GRU", "Embedding", "Experts") or (kind.channel_dim == -1 and module.bias is None):
            return None
        return kind.channel_dim

    def kernel_elements(self, site: Site) -> int:
        """See `ModelAdapter`."""
        module, kind = self._module(site.path)
        return kind.kernel_elements(module)

    def input_rows(self, path: str, x: Tensor) -> Tensor:
        """The vectors that the weight matrix at `path` multiplies, of its input: [groups, vectors, columns]."""
        return input_rows(self._module(path)[0], x)

    def sees_inside(self, site: Site) -> bool:
        """See `ModelAdapter`."""
        return self._module(site.path)[1].inner is not None

    def inner_inputs(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """The vectors [vectors, columns] that the weights at `path` multiply in one call, by parameter name."""
        module, kind = self._module(path)
        assert kind.inner is not None, path
        return kind.inner(module, args, kwargs)

    def as_parameter(self, module: nn.Module, parameter: str, matrix: Tensor) -> Tensor:
        """A weight matrix in the shape of the module's own parameter; the inverse of `weight`, differentiable."""
        kind = kind_of(module)
        assert kind is not None
        return kind.restore(module, parameter, matrix)

    def channel_dim(self, path: str) -> int:
        """The dimension, from the end, of a module's input that holds the channels."""
        return self._module(path)[1].channel_dim

    def twin(self) -> nn.Module:
        """The working model as it is now, with modules of its own that share the tensors: it stays as it is."""
        return _structural_copy(self.model)

    def _module(self, path: str) -> tuple[nn.Module, LayerKind]:
        module = get_module(self.model, path)
        kind = kind_of(module)
        assert kind is not None, path
        return module, kind

    def observe(self, data: Any, watchers: Mapping[str, Iterable[Watcher]]) -> Observation:
        """See `ModelAdapter`.

        Raises:
            DataError: there is no batch, a batch does not fit the model, or a layer's input is not finite.
        """
        seen = Observation()
        handles = []
        for path in dict.fromkeys(site.path for layer in self.layers() if not layer.reason for site in layer.sites):
            module, kind = self._module(path)
            hook = _Hook(path, kind, list(watchers.get(path, ())), seen)
            handles.append(module.register_forward_pre_hook(hook.before, with_kwargs=True))
            handles.append(module.register_forward_hook(hook.after))
        try:
            with torch.no_grad():
                for batch in iterate(data, self.model):
                    _run(batch, self.model, seen.batches)
                    seen.batches += 1
                    if batch.note and batch.note not in seen.notes:
                        seen.notes.append(batch.note)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def build(self, path: str, weights: Mapping[str, QuantizedTensor], activation: Activation) -> QuantizedModule:
        """See `ModelAdapter`."""
        module, kind = self._module(path)
        return kind.build(module, weights, activation).train(module.training)

    def install(self, path: str, module: nn.Module) -> None:
        """See `ModelAdapter`."""
        replaced = get_module(self.model, path)
        for table in _HOOK_TABLES:  # what watched or prepared the float module does so with the new one
            getattr(module, table).update(getattr(replaced, table))
        self.model = replace_everywhere_(self.model, replaced, module)

    def detach_(self) -> None:
        """Give the working copy tensors of its own: nothing is shared with the caller's model afterwards."""
        if self.model is self.original:
            return
        fresh: dict[int, Tensor] = {}
        shared = {id(t) for t in [*self.original.parameters(), *self.original.buffers()]}
        storages = {t.untyped_storage().data_ptr() for t in [*self.original.parameters(), *self.original.buffers()]}
        for module in self.model.modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is None or tensor.is_meta:
                        continue
                    if id(tensor) not in shared and tensor.untyped_storage().data_ptr() not in storages:
                        continue
                    if id(tensor) not in fresh:
                        copied = tensor.detach().clone()
                        is_parameter = isinstance(tensor, nn.Parameter)
                        fresh[id(tensor)] = nn.Parameter(copied, tensor.requires_grad) if is_parameter else copied
                    table[name] = fresh[id(tensor)]  # type: ignore[assignment]

    def _take_attention_apart_(self) -> None:
        for module in list(self.model.modules()):
            if type(module) is nn.MultiheadAttention:
                self.model = replace_everywhere_(self.model, module, MultiheadAttention.of(module))


class _Hook:
    """Watches one module: its inputs, how often it ran, how many columns it multiplied, one sample."""

    def __init__(self, path: str, kind: LayerKind, watchers: list[Watcher], seen: Observation) -> None:
        self.path, self.kind, self.watchers, self.seen = path, kind, watchers, seen

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen.calls[self.path] = self.seen.calls.get(self.path, 0) + 1
        x = args[0] if args else next(iter(kwargs.values()))
        x = x.data if isinstance(x, nn.utils.rnn.PackedSequence) else x
        if self.kind.name == "Experts" and len(args) > 1:
            experts = int(module.num_experts)  # type: ignore[arg-type]
            counts = torch.bincount(args[1].reshape(-1).cpu(), minlength=experts)[:experts]
            self.seen.experts[self.path] = self.seen.experts.get(self.path, 0) + counts
        kept = self.seen.samples.get(self.path)
        self.seen.samples[self.path] = _extend_sample(kept, args, kwargs, flatten=self.kind.flattens)
        for watcher in self.watchers:
            try:
                watcher(x.detach().movedim(self.kind.channel_dim, -1))
            except DataError as error:  # noqa: PERF203
                raise DataError(f"layer {self.path!r}, batch {self.seen.batches}: {error}") from None

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        y = output[0] if isinstance(output, tuple) else output
        y = y.data if isinstance(y, nn.utils.rnn.PackedSequence) else y
        if self.kind.takes_activation:
            positions = round(y.numel() // max(y.shape[self.kind.channel_dim], 1) * self.kind.share(module, args))
            self.seen.positions[self.path] = self.seen.positions.get(self.path, 0) + positions


def _extend_sample(sample: Sample | None, args: tuple[Any, ...], kwargs: dict[str, Any], *, flatten: bool) -> Sample:
    """A sample with the first rows of this call added while there is room, whatever batches the rows come in.

    Calls with one tensor are cut and joined along their rows (the tokens of a linear layer, the images of a
    convolution); of other calls the first is kept whole.
    """
    single = len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and args[0].dim() > 1
    if not single:
        if sample is not None:
            return sample
        return Sample(tuple(_copied(a) for a in args), {key: _copied(a) for key, a in kwargs.items()})
    rows = args[0].detach().flatten(0, -2) if flatten else args[0].detach()
    kept = None if sample is None else sample.args[0]
    if kept is not None and (kept.shape[1:] != rows.shape[1:] or sample is None):
        return Sample((kept,), {})
    room = max(1, _SAMPLE_ELEMENTS // max(rows[:1].numel(), 1)) - (0 if kept is None else kept.shape[0])
    if room <= 0:
        return Sample((kept,), {})
    part = rows[:room].clone()
    return Sample((part if kept is None else torch.cat([kept, part]),), {})


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _run(batch: Any, model: nn.Module, index: int) -> Any:
    """Run one batch; an error of the model becomes one that names the batch."""
    try:
        return batch.run(model)
    except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"calibration batch {index} does not run through {type(model).__name__}: {type(error).__name__}: {first}; "
            "check the shape, dtype and names of the inputs"
        ) from error


def _find_layers(model: nn.Module) -> list[Layer]:
    """Every weight once, in the model's order, with all the places that use it."""
    sites: dict[int, list[tuple[Site, nn.Module]]] = {}
    tensors: dict[int, Tensor] = {}
    for path, module in model.named_modules():
        kind = kind_of(module)
        owned = kind.shapes(module) if kind is not None else {}
        for name, parameter in module.named_parameters(recurse=False):
            if kind is not None and name not in owned:
                continue  # biases go with their weight
            type_name = kind.name if kind is not None else "Parameter"
            sites.setdefault(id(parameter), []).append((Site(path, name, type_name), module))
            tensors[id(parameter)] = parameter
    vocabularies = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
    return [_layer(tensors[key], uses, vocabularies) for key, uses in sites.items()]


def _layer(tensor: Tensor, uses: list[tuple[Site, nn.Module]], vocabularies: set[int]) -> Layer:
    site, module = uses[0]
    places = tuple(use for use, _ in uses)
    size = tensor.numel() * tensor.element_size()
    kind = kind_of(module)
    reason = next((why_unsupported(m, s.parameter) for s, m in uses if kind_of(m) is None), "")
    types = {use.type for use in places}
    if not reason and len(types) > 1 and types & _OTHER_LAYOUTS:
        reason = f"{' and '.join(sorted(types))} read it in different layouts"
    if reason and len(uses) > 1:
        reason = f"tied to {', '.join(s.path for s in places[1:])}: {reason}"
    if kind is None:
        name = f"{site.path}.{site.parameter}".lstrip(".")
        return Layer(name, "Parameter", tuple(tensor.shape), places, "", reason, size)
    shapes = kind.shapes(module)
    shape = shapes[site.parameter]
    if not reason:
        reason = next((why for s, m in uses if (why := _refusal(m, s.parameter, shape))), "")
    name = (site.path or kind.name) if len(shapes) == 1 else f"{site.path}.{site.parameter}".lstrip(".")
    role = ""
    if any(s.type == "Embedding" for s in places):
        role = "embedding" if all(s.type == "Embedding" for s in places) else "tied"
    elif kind.name in ("Linear", "Conv1D") and shape[0] in vocabularies:
        role = "head"
    return Layer(name, kind.name, shape, places, role, reason, size)


def _refusal(module: nn.Module, parameter: str, shape: tuple[int, int]) -> str:
    kind = kind_of(module)
    assert kind is not None
    if not kind.matrix(module, parameter).is_floating_point():
        return "the weight is not floating point"
    if shape[0] * shape[1] == 0:
        return f"the weight is empty: {shape[0]}x{shape[1]}"
    if kind.shapes(module)[parameter] != shape:
        return "tied weights whose matrices have different shapes"
    return kind.refuse(module)


def _structural_copy(model: nn.Module) -> nn.Module:
    """A copy of all modules that shares all tensors; hooks and other attributes are copied by deepcopy's rules."""
    memo: dict[int, Any] = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError, NotImplementedError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot be copied ({error}); pass inplace=True to quantize the model itself"
        ) from error
