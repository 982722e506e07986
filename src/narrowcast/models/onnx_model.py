"""The ONNX adapter: finds weights in a graph, watches values through ONNX Runtime, writes quantized forms."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from narrowcast.core import PerGroup, QuantizedTensor, QuantSpec
from narrowcast.data import iterate
from narrowcast.errors import DataError
from narrowcast.models import onnx_patterns as patterns
from narrowcast.models import onnx_targets as targets
from narrowcast.models.base import Layer, ModelAdapter, Observation, Possible, Site, Watcher
from narrowcast.models.onnx_channels import ScalableChannels, scalable_channels
from narrowcast.models.onnx_conv import conv_numbers, conv_positions
from narrowcast.models.onnx_exact import Product, write_products
from narrowcast.models.onnx_faster import add_before_norms
from narrowcast.models.onnx_file import read_onnx
from narrowcast.models.onnx_handover import Codes
from narrowcast.models.onnx_large import released, spool_for
from narrowcast.models.onnx_layers import KINDS, Use, attribute, find_layers, find_uses
from narrowcast.models.onnx_portable import Portable
from narrowcast.models.onnx_prepare import constants_only, prepare
from narrowcast.models.onnx_recurrent import Halves
from narrowcast.models.onnx_rewrite import with_constant
from narrowcast.models.onnx_scribe import BLOCKED_IR, BLOCKED_OPSET, PER_AXIS_OPSET, Scribe, opset_of, with_opset
from narrowcast.models.onnx_session import OnnxModule, feeds_of
from narrowcast.models.onnx_static import Placement, place, put
from narrowcast.models.onnx_tokens import per_token
from narrowcast.models.onnx_watch import Watching
from narrowcast.nn import Activation

# Patches of an image tell much the same: about so many of each are given to watchers of vectors.
_PATCHES = 256


@dataclass(frozen=True)
class Written:
    """A quantized weight that is to be written at one use of it.

    Args:
        record: the weight.
        activation: treatment of the input.
        bias: [out] float32 in place of the node's own; None leaves that.
    """

    record: QuantizedTensor
    activation: Activation
    bias: Any = None


class Progress(Protocol):
    """What goes along with a pass over the data and knows how much of it was seen in an earlier one."""

    def has(self, feeds: Mapping[str, Any], seen: Observation) -> bool:
        """Whether the next batch was seen; the observation is then set to what it was after that."""

    def took(self, seen: Observation) -> None:
        """The batch is done."""


class OnnxModel(ModelAdapter):
    """An ONNX graph as the pipeline sees it.

    Args:
        source: path of an .onnx file, an `onnx.ModelProto` or an `onnx_ir.Model`; it is not changed.
        fold_batchnorm: whether BatchNorm becomes part of the convolution before it.
        blocked: whether 4-bit or blocked formats will be written, which need opset 21.
        portable: whether and how products that saturate on CPUs without VNNI are repaired; None for not.
        token_ranges: whether products with ranges found at run time have one per token, and not one per input.
    """

    def __init__(
        self, source: Any, *, fold_batchnorm: bool = True, blocked: bool = False, portable: Portable | None = None,
        token_ranges: bool = False,
    ) -> None:  # fmt: skip
        self.name = Path(source).name if isinstance(source, str | Path) else getattr(source, "name", "an ONNX model")
        self.original = OnnxModule(read_onnx(source), self.name)
        had, copy = opset_of(self.original.graph), self.original.graph.clone()
        notes = constants_only(copy)
        model, note = with_opset(copy, BLOCKED_OPSET if blocked else PER_AXIS_OPSET)
        self.converted = (had, opset_of(model)) if note else None
        if blocked:
            model.ir_version = max(model.ir_version, BLOCKED_IR)
        self.notes = ([note] if note else []) + notes
        self.notes += prepare(model, fold_batchnorm=fold_batchnorm)
        self.model = OnnxModule(model, self.name)
        self._found = find_uses(model)
        self._layers = list(find_layers(model, self._found))
        self._uses = {use.path: use for uses in self._found.values() for use in uses}
        self._scribe = Scribe(model, spool_for(model))
        self._shared: dict[str, Any] = {}
        self._halves = Halves()
        self.portable = portable or Portable()
        self.token_ranges = token_ranges
        self.codes: dict[str, str] = {}
        self.placement = Placement()

    @property
    def graph(self) -> ir.Model:
        """The working copy as a graph."""
        return self.model.graph

    def layers(self) -> list[Layer]:
        """See `ModelAdapter`."""
        return self._layers

    def use(self, site: Site) -> Use:
        """The node of a site, with its weight."""
        return self._uses[site.path]

    def weight(self, layer: Layer) -> Tensor:
        """See `ModelAdapter`."""
        use = self._uses[layer.sites[0].path]
        matrix = np.array(KINDS[use.op].matrix(use.weight.const_value.numpy(), use), np.float32, order="C")
        released(use.weight.const_value)
        return torch.from_numpy(matrix)

    def possible(self, layer: Layer, weight: QuantSpec, given: QuantSpec | None) -> Possible:
        """See `ModelAdapter`."""
        uses = [self.use(site) for site in layer.sites]
        return targets.possible(layer, uses, weight, given, token_ranges=self.token_ranges)

    def integer_op(self, site: Site, spec: QuantSpec, mode: str) -> str | None:
        """See `ModelAdapter`."""
        return targets.integer_op(self.use(site), spec, mode, token_ranges=self.token_ranges)

    def kernel_name(self, op: str) -> str:
        """See `ModelAdapter`."""
        return op

    def float_kernel(self, layer: Layer, spec: QuantSpec) -> str:
        """See `ModelAdapter`."""
        return targets.float_kernel(layer, spec)

    def takes_activation(self, site: Site) -> bool:
        """See `ModelAdapter`."""
        return site.type not in ("Embedding", "Parameter")

    def input_groups(self, site: Site) -> int:
        """See `ModelAdapter`."""
        use = self.use(site)
        return int(attribute(use.node, "group", 1)) if use.op == "Conv" else 1

    def is_depthwise(self, site: Site) -> bool:
        """See `ModelAdapter`."""
        return self.input_groups(site) > 1 and int(self.use(site).weight.const_value.shape[1]) == 1

    def kernel_elements(self, site: Site) -> int:
        """See `ModelAdapter`."""
        use = self.use(site)
        return int(np.prod(use.weight.const_value.shape[2:])) if use.op.startswith("Conv") else 1

    def shows_rows(self, path: str) -> bool:
        """Whether the vectors that a weight multiplies can be taken from the node's input."""
        use = self._uses[path]
        if use.inside or use.input is None:  # of a recurrent node's hidden states there is no value
            return False
        return use.op in ("Gemm", "MatMul", "LSTM", "GRU") or (use.op == "Conv" and self._axes(use) in (3, 4))

    def _axes(self, use: Use) -> int:
        return len(use.weight.const_value.shape)

    def input_rows(self, path: str, x: Tensor) -> Tensor:
        """The vectors that the weight matrix at `path` multiplies, of its input as the graph has it.

        Returns:
            [groups, vectors, columns]; of an image at most 256 patches, evenly spread.
        """
        use = self._uses[path]
        if use.op != "Conv":
            return x.reshape(1, -1, x.shape[-1])
        one = len(use.weight.const_value.shape) == 3
        x = x.unsqueeze(-2) if one else x
        kernel, stride, dilation, pads = conv_numbers(use, (x.shape[-2], x.shape[-1]))
        top, left, bottom, right = pads
        columns = functional.unfold(functional.pad(x, (left, right, top, bottom)), kernel, dilation, 0, stride)
        step = max(1, -(-columns.shape[-1] // _PATCHES))
        columns = columns[:, :, step // 2 :: step]
        groups = self.input_groups(Site(path, "", ""))
        columns = columns.reshape(x.shape[0], groups, -1, columns.shape[-1])
        return columns.permute(1, 0, 3, 2).reshape(groups, -1, columns.shape[2])

    def bias(self, path: str) -> Tensor | None:
        """The bias of the node at `path`; None where it has none."""
        array = self._uses[path].bias_array
        return None if array is None else torch.from_numpy(np.array(array))

    def place_ranges(self, paths: Iterable[str]) -> list[str]:
        """Decide where static ranges are needed for these nodes; returns the names of the values to observe."""
        self.placement = place(self._uses[path].node for path in paths)
        return self.placement.observed()

    def scalable_channels(self, paths: Mapping[str, str]) -> ScalableChannels:
        """Which channels of the values between these static products may be scaled.

        Args:
            paths: of the products; why the weight there cannot take in the scales of its input, "" where it can.
        """
        return scalable_channels(self.graph.graph, {id(self._uses[path].node): why for path, why in paths.items()})

    def input_value(self, path: str) -> str:
        """Name of the value that a node's weight multiplies."""
        return str(self._uses[path].input.name)

    def output_value(self, path: str) -> str:
        """Name of the value that a node makes."""
        return str(self._uses[path].node.outputs[0].name)

    def observe(
        self, data: Any, watchers: Mapping[str, Iterable[Watcher]],
        values: Mapping[str, Iterable[Callable[[Tensor], None]]] | None = None, progress: Progress | None = None,
    ) -> Observation:  # fmt: skip
        """See `ModelAdapter`; `values` watches further values of the main graph, by name.

        Raises:
            DataError: there is no batch, a batch does not fit the model, or a value is not finite.
        """
        seen = Observation()
        listening: dict[str, list[Callable[[Tensor], None]]] = {n: list(calls) for n, calls in (values or {}).items()}
        for path, use in self._uses.items():
            if use.inside or use.input is None or not self.takes_activation(Site(path, "", KINDS[use.op].type(4))):
                continue
            count = _Counted(path, use, seen, list(watchers.get(path, ())))
            listening.setdefault(self.input_value(path), []).append(count)
        watching: Watching | None = None
        for batch in iterate(data, self.model):
            feeds = feeds_of(self.model.declared, self.model.input_names, batch.args, batch.kwargs)
            if progress is None or not progress.has(feeds, seen):
                watching = watching or Watching(self.graph, list(listening), feeds, batch.samples)
                for piece in watching.pieces(feeds, batch.samples):
                    for name, value in watching.run(piece):
                        _tell(name, value, listening[name], seen.batches)
            seen.batches += 1
            if progress is not None:
                progress.took(seen)
            if batch.note and batch.note not in seen.notes:
                seen.notes.append(batch.note)
        return seen

    def build(self, path: str, weights: Mapping[str, QuantizedTensor], activation: Activation) -> Written:
        """See `ModelAdapter`."""
        (record,) = weights.values()
        return Written(record, activation)

    def uses(self) -> list[Use]:
        """Every weight with a node that reads it, in the order of the nodes."""
        return list(self._uses.values())

    def rewrite(self, path: str, array: Any, bias: Any) -> None:
        """Give a node another float weight and bias.

        Args:
            path: of the node.
            array: in the layout of its constant; None leaves it.
            bias: [out] float32; None leaves it.
        """
        if array is not None:
            self._uses[path] = with_constant(self._scribe, self._uses[path], array)
        if bias is not None:
            patterns.set_bias(self._scribe, self._uses[path], bias)
        self.model = OnnxModule(self.graph, self.name)

    def fitting(self, path: str, record: QuantizedTensor, activation: Activation) -> QuantizedTensor:
        """The record that is to be written at a node: another one where an integer kernel would saturate."""
        use, mode = self._uses[path], activation.mode
        kernel = mode == "static" or (mode in ("dynamic", "asymmetric") and use.op != "Conv")
        return self.portable.look(use, record) if kernel and not self._in_blocks(use, record) else record

    def install(self, path: str, module: Written) -> None:
        """Write a quantized weight at one node; static inputs get their Q and DQ from `put_ranges`."""
        use, record, mode = self._uses[path], module.record, module.activation.mode
        scribe = self._scribe
        bias = use.bias_array if module.bias is None else np.asarray(module.bias, np.float32)
        if module.bias is not None:
            patterns.set_bias(scribe, use, bias)
        if record.spec.format.is_cast:
            self.codes[path] = patterns.cast(scribe, use, record)
        elif use.op == "Gather":
            self.codes[path] = patterns.rows(scribe, use, record)
        elif mode == "static":
            self._install_static(path, use, module, bias)
        elif use.op == "LSTM" and mode in ("dynamic", "asymmetric"):
            self.codes |= self._halves.add(scribe, use, record)
        elif mode in ("dynamic", "asymmetric") and not self._in_blocks(use, record) and self._in_tokens(use):
            self.codes[path] = per_token(scribe, use, record, bias, self._shared, symmetric=mode == "dynamic")
        elif mode in ("dynamic", "asymmetric") and not self._in_blocks(use, record):
            self.codes[path] = patterns.dynamic(scribe, use, record, bias, self._shared)
        elif use.op in ("Gemm", "MatMul") and patterns.block_size(record) is not None:
            level = 1 if mode == "float" else 4
            self.codes[path] = patterns.blocks(scribe, use, record, bias, level=level)
        else:
            self.codes[path] = patterns.stored(scribe, use, record)

    def _in_blocks(self, use: Use, record: QuantizedTensor) -> bool:
        spec = record.spec
        return use.op != "Conv" and (
            spec.format.bits != 8 or isinstance(spec.granularity, PerGroup) or not spec.symmetric
        )

    def _in_tokens(self, use: Use) -> bool:
        return self.token_ranges and use.op in ("Gemm", "MatMul")

    def _install_static(self, path: str, use: Use, module: Written, bias: Any) -> None:
        scale, zero = module.activation.scale, module.activation.zero_point
        assert scale is not None and zero is not None
        given = (float(scale), int(zero))
        self.codes[path], raised = patterns.static(self._scribe, use, module.record, bias, given)
        if raised:
            self.notes.append(f"{path}: {raised} channels have larger scales, so that their bias fits into int32")

    def put_ranges(
        self, paths: Iterable[str], ranges: Mapping[str, tuple[float, int]], needless: Collection[str] = ()
    ) -> None:
        """Write the Q and DQ nodes of what `place_ranges` decided.

        Args:
            paths: of the static products.
            ranges: scale and zero point of every value with a range of its own.
            needless: names of the outputs of those Clips that do no more than rounding to codes does; they go.
        """
        nodes = [self._uses[path].node for path in paths]
        clips = [node for node in self.graph.graph if node.outputs and node.outputs[0].name in needless]
        put(self._scribe, self.graph.graph, self.placement, nodes, ranges)
        for node in clips:
            node.outputs[0].replace_all_uses_with(node.inputs[0])

    def write_products(self, products: Mapping[str, tuple[QuantizedTensor, Activation]]) -> dict[str, int]:
        """Write static products with the very codes of their weights, and the Q and DQ nodes between them.

        Args:
            products: by the node's name, the weight and the ranges of the input, one or one per channel.

        Returns:
            By name, how many channels have other codes, since their bias would not fit into int32.
        """
        found = {path: self._product(path, *given) for path, given in products.items()}
        stored, raised = write_products(self._scribe, self.graph.graph, found)
        self.codes |= stored
        for path, name in stored.items():
            if self.graph.graph.initializers[name].dtype == ir.DataType.INT8:  # ConvInteger has its weights in uint8
                self.portable.look(found[path].use, found[path].record)
        return raised

    def _product(self, path: str, record: QuantizedTensor, activation: Activation) -> Product:
        use = self._uses[path]
        scale, zero = activation.scale, activation.zero_point
        assert scale is not None and zero is not None
        return Product(use, record, Codes.of(scale.numpy(), zero.numpy(), 1 if use.op == "Conv" else -1))

    def finish(self) -> None:
        """Remove what nothing reads any more, and write what is left so that it is fast."""
        from onnx_ir.passes import common

        self.codes |= dict(self._halves.alone(self._scribe))
        self.portable.store_unsigned(self._scribe, self.codes)
        self.notes += self.portable.notes() + add_before_norms(self.graph)
        common.RemoveUnusedNodesPass()(self.graph)
        self.graph.graph.sort()
        self.model = OnnxModule(self.graph, self.name)


class _Counted:
    """Tells the watchers of one node of its inputs, channels last, and counts."""

    def __init__(self, path: str, use: Use, seen: Observation, watchers: list[Watcher]) -> None:
        self.path, self.use, self.seen, self.watchers = path, use, seen, watchers

    def __call__(self, x: Tensor) -> None:
        convolution = self.use.op.startswith("Conv")
        self.seen.calls[self.path] = self.seen.calls.get(self.path, 0) + 1
        x = x.movedim(1, -1) if convolution else x
        positions = x.numel() // max(x.shape[-1], 1)
        if self.use.op == "Conv":
            positions = x.shape[0] * conv_positions(self.use, tuple(x.shape[1:-1]))
        self.seen.positions[self.path] = self.seen.positions.get(self.path, 0) + positions
        for watcher in self.watchers:
            watcher(x)


def _tell(name: str, value: Tensor, listeners: list[Callable[[Tensor], None]], batch: int) -> None:
    for listener in listeners:
        try:
            listener(value)
        except DataError as error:  # noqa: PERF203
            raise DataError(f"value {name!r}, batch {batch}: {error}") from None
