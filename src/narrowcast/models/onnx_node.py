"""One node of a graph as a function of tensors, computed by ONNX Runtime: for operators that have no row in `OPS`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import helper
from torch import Tensor

from narrowcast.errors import ModelError


class NodeSession:
    """A node and the subgraphs in it. No gradient passes it, and no channel is followed through it.

    Args:
        node: of the graph.
        model: the graph's model, for its opsets.
    """

    def __init__(self, node: ir.Node, model: ir.Model) -> None:
        self.label = f"{node.name} ({node.op_type})"
        self._node = ir.to_proto(node)
        self._names = values_read(node)
        self._opsets = dict(model.opset_imports)
        self._version = int(model.ir_version)
        self._session: Any = None
        self._kinds: tuple[Any, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> NodeSession:
        return self

    def __call__(self, *inputs: Tensor | None) -> Any:
        """The node's outputs: a tensor, or a tuple of several, None for one that is left out.

        Raises:
            ModelError: ONNX Runtime cannot compute the node by itself.
        """
        with torch._C.DisableTorchFunction(), torch.no_grad():
            feeds = {
                name: value.detach().contiguous().numpy()
                for name, value in zip(self._names, inputs, strict=True) if value is not None
            }  # fmt: skip
            try:
                got = self._opened(feeds).run(None, feeds)
            except Exception as error:  # ONNX Runtime has a class of error for each status
                raise ModelError(f"node {self.label} cannot be computed by itself: {error!s:.300}") from None
        given = iter(got)  # an output without a name is left out
        tensors = tuple(torch.from_numpy(next(given)) if name else None for name in self._node.output)
        return tensors[0] if len(tensors) == 1 else tensors

    def _opened(self, feeds: dict[str, Any]) -> Any:
        kinds = tuple((name, array.dtype, array.ndim) for name, array in feeds.items())
        if self._session is None or kinds != self._kinds:
            inputs = [
                helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), [None] * rank)
                for name, dtype, rank in kinds
            ]
            outputs = [onnx.ValueInfoProto(name=name) for name in self._node.output if name]
            graph = helper.make_graph([self._node], "node", inputs, outputs)
            opsets = [helper.make_opsetid(domain, version) for domain, version in self._opsets.items()]
            proto = helper.make_model(graph, opset_imports=opsets, ir_version=self._version)
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            options.intra_op_num_threads = torch.get_num_threads()
            self._session = onnxruntime.InferenceSession(
                proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            self._kinds = kinds
        return self._session


def values_read(node: ir.Node) -> list[str]:
    """Names of all values that a node reads, those that its subgraphs take from outside included, each once."""
    return [str(value.name) for value in read_by(node)]


def read_by(node: ir.Node) -> Sequence[ir.Value]:
    """All values that a node reads, those that its subgraphs take from outside included, each once."""
    found: dict[int, ir.Value] = {id(value): value for value in node.inputs if value is not None}
    for attribute in node.attributes.values():
        graphs = [attribute.value] if attribute.type == ir.AttributeType.GRAPH else (
            list(attribute.value) if attribute.type == ir.AttributeType.GRAPHS else []
        )  # fmt: skip
        for graph in graphs:
            own = {id(v) for v in [*graph.inputs, *graph.initializers.values()]}
            own |= {id(v) for inner in graph.all_nodes() for v in inner.outputs}
            read = [v for inner in graph.all_nodes() for v in inner.inputs if v is not None]
            for value in [*read, *graph.outputs]:
                if id(value) not in own and not _belongs_inside(value, graph):
                    found.setdefault(id(value), value)
    return list(found.values())


def _belongs_inside(value: ir.Value, graph: ir.Graph) -> bool:
    """Whether a value is an input or constant of a graph further inside."""
    inner = [
        part
        for node in graph.all_nodes()
        for attribute in node.attributes.values()
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        for part in (attribute.value if isinstance(attribute.value, list | tuple) else [attribute.value])
    ]
    return any(value is own for part in inner for own in [*part.inputs, *part.initializers.values()])
