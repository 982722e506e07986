"""An ONNX graph as a torch module with a module for every weight: what works on torch modules works on it.

The nodes with weights, and normalizations, become modules (`onnx_twin_layers.py`), every other node a function of torch
(`onnx_ops.py`) or, where there is none, a call of ONNX Runtime. The nodes are cut into parts wherever one value alone
goes on: these are the blocks of the network. What depends on no module (masks, positions) is computed first and given
to every part. The graph stays as it is; the twin's parameters share its memory until they are replaced.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from narrowcast.models.onnx_cut import cut
from narrowcast.models.onnx_layers import Use
from narrowcast.models.onnx_node import NodeSession, read_by
from narrowcast.models.onnx_ops import DTYPES, OPS
from narrowcast.models.onnx_twin_layers import Made, Parameters, layer_of, norm_of, shared_tensor


@dataclass(frozen=True, eq=False)
class Step:
    """One call.

    Args:
        call: the function; None calls the module of this name in the part.
        name: of the node.
        inputs: names of values; "" for one that is left out.
        outputs: names of values.
        constants: values that are constants, by name.
        last: names of values that nothing reads after this step.
    """

    call: Callable[..., Any] | None
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, Tensor]
    last: frozenset[str] = frozenset()

    def __deepcopy__(self, memo: dict[int, Any]) -> Step:
        return self

    def run(self, values: dict[str, Any], owner: nn.Module | None) -> None:
        """Compute the outputs into `values`, and drop what nobody needs any more."""
        call: Any = self.call if self.call is not None else owner._modules[self.name]  # type: ignore[union-attr]
        given = [None if not n else self.constants[n] if n in self.constants else values[n] for n in self.inputs]
        got = call(*given)
        values |= zip(self.outputs, got if isinstance(got, tuple | list) else (got,), strict=False)
        for name in self.last:
            values.pop(name, None)


class Part(nn.Module):
    """Steps that run one after another.

    Args:
        steps: in order.
        modules: by name, what the steps call.
        inputs: names of the values that it is given.
        outputs: names of the values that it gives.
    """

    def __init__(
        self, steps: Sequence[Step], modules: dict[str, nn.Module], inputs: Sequence[str], outputs: Sequence[str]
    ) -> None:
        super().__init__()
        self.steps, self.inputs, self.outputs = tuple(steps), tuple(inputs), tuple(outputs)
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *values: Any) -> Any:
        """The values `inputs` -> the value `outputs`, or a tuple of several."""
        known = dict(zip(self.inputs, values, strict=True))
        for step in self.steps:
            step.run(known, self)
        found = tuple(known[name] for name in self.outputs)
        return found[0] if len(found) == 1 else found


class OnnxTwin(nn.ModuleList):
    """The twin; its members are the parts. Made by `make_twin`.

    Args:
        inputs: names of the graph's inputs, with their dtypes.
        outputs: names of the graph's outputs.
        first: what depends on no module.
    """

    def __init__(self, inputs: dict[str, torch.dtype], outputs: Sequence[str], first: Sequence[Step]) -> None:
        super().__init__()
        self.given, self.outputs, self.first = inputs, tuple(outputs), tuple(first)

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        """What the graph gives for these inputs: a tensor, or a tuple of several."""
        known: dict[str, Any] = {}
        for name, value in (dict(zip(self.given, args, strict=False)) | kwargs).items():
            known[name] = torch.as_tensor(value).to(self.given[name])
        for step in self.first:
            step.run(known, None)
        parts: list[Any] = list(self)
        for index, part in enumerate(parts):
            got = part(*(known[name] for name in part.inputs))
            known |= zip(part.outputs, got if isinstance(got, tuple) else (got,), strict=True)
            wanted = {*self.outputs, *(name for later in parts[index + 1 :] for name in later.inputs)}
            known = {name: value for name, value in known.items() if name in wanted}
        found = tuple(known[name] for name in self.outputs)
        return found[0] if len(found) == 1 else found


@dataclass(frozen=True)
class Twin:
    """A twin and how it belongs to the graph.

    Args:
        module: the twin.
        made: by path in the twin, what each of its modules stands for.
        paths: by name of a node, the path of its module.
        opaque: by path of a part, the nodes in it that ONNX Runtime computes.
    """

    module: OnnxTwin
    made: dict[str, Made]
    paths: dict[str, str]
    opaque: dict[str, tuple[str, ...]]

    def readable(self, text: str) -> str:
        """A message with the names of nodes in place of paths."""
        paths = "|".join(map(re.escape, sorted(self.made, key=len, reverse=True)))
        whole = re.compile(rf"(?<![\w.:/])(?:{paths})(?![\w:/])") if paths else None
        return text if whole is None else whole.sub(lambda found: str(self.made[found[0]].consumed[0].name), text)


def make_twin(model: ir.Model, uses: Sequence[Use]) -> Twin:
    """The twin of a prepared graph. Changes nothing.

    Args:
        model: the graph.
        uses: its weights and the nodes that read them.

    Raises:
        ModelError: when it runs, at a node that ONNX Runtime cannot compute by itself.
    """
    return _Builder(model, uses).build()


class _Builder:
    def __init__(self, model: ir.Model, uses: Sequence[Use]) -> None:
        self.model, self.graph = model, model.graph
        parameters = Parameters()
        self.modules: dict[int, Made] = {}  # by the last node that a module stands for
        taken: set[int] = set()
        candidates = [layer_of(use, parameters) for use in uses]
        candidates += [norm_of(node) for node in self.graph]
        for made in candidates:
            if made is not None and not any(id(node) in taken for node in made.consumed):
                taken |= {id(node) for node in made.consumed}
                self.modules[id(made.consumed[-1])] = made
        self.inner = taken - set(self.modules)
        self.names = self._module_names()
        self.outputs = [str(value.name) for value in self.graph.outputs]

    def build(self) -> Twin:
        """The twin."""
        nodes = [node for node in self.graph if id(node) not in self.inner]
        body = self._dependent(nodes)
        fixed = {str(key) for key in self.graph.initializers}
        inputs = {
            str(v.name): DTYPES.get(int(v.dtype or 1), torch.float32) for v in self.graph.inputs if v.name not in fixed
        }
        first = [node for node in nodes if id(node) not in body]
        opaque: dict[str, tuple[str, ...]] = {}
        twin = _with_signature(inputs)(inputs, self.outputs, [self._step(node)[0] for node in first])
        cuts = self._cuts([node for node in nodes if id(node) in body])
        context = self._context(first, inputs, cuts)
        made: dict[str, Made] = {}
        for index, part in enumerate(cuts):
            twin.append(self._part(part, cuts[index + 1 :], context))
            for node in part:
                if id(node) in self.modules:
                    made[f"{index}.{self.names[id(node)]}"] = self.modules[id(node)]
            calls = [step.call for node in part for step in self._step(node)]
            opaque[str(index)] = tuple(call.label for call in calls if isinstance(call, NodeSession))
        paths = {str(node.name): path for path, entry in made.items() for node in entry.consumed}
        return Twin(twin.eval(), made, paths, opaque)

    def _module_names(self) -> dict[int, str]:
        """The nodes' names as torch allows them for modules, by the last node that a module stands for."""
        found: dict[int, str] = {}
        taken = set(dir(Part((), {}, (), ())))
        for node in self.graph:
            if id(node) in self.modules:
                name = str(node.name).replace(".", ":")
                while name in taken:
                    name += "_"
                taken.add(name)
                found[id(node)] = name
        return found

    def _reads(self, node: ir.Node) -> list[ir.Value]:
        """What a step reads, constants included."""
        return [self.modules[id(node)].input] if id(node) in self.modules else list(read_by(node))

    def _dependent(self, nodes: list[ir.Node]) -> set[int]:
        """The steps that are modules, or read what one gives."""
        found: set[int] = set()
        values: set[int] = set()
        for node in nodes:
            if id(node) in self.modules or any(id(value) in values for value in self._reads(node)):
                found.add(id(node))
                values |= {id(value) for value in node.outputs}
        return found

    def _cuts(self, nodes: list[ir.Node]) -> list[list[ir.Node]]:
        return cut(nodes, self._reads, lambda node: node.outputs, self._is_layer, self._kind)

    def _is_layer(self, node: ir.Node) -> bool:
        return id(node) in self.modules and self.modules[id(node)].use is not None

    def _kind(self, node: ir.Node) -> tuple[Any, ...]:
        """Operator, and of convolutions the kernel and whether every channel has its own."""
        if not self._is_layer(node):
            return (str(node.op_type),)
        module: Any = self.modules[id(node)].module
        return type(module).__name__, tuple(module.weight.shape[2:]), getattr(module, "groups", 1) > 1

    def _context(self, first: list[ir.Node], inputs: dict[str, Any], parts: list[list[ir.Node]]) -> list[str]:
        """What the parts read of that which depends on no module."""
        known = {*inputs, *(str(value.name) for node in first for value in node.outputs)}
        read = [str(v.name) for part in parts for node in part for v in self._reads(node)]
        return list(dict.fromkeys(name for name in read if name in known))

    def _part(self, nodes: list[ir.Node], later: list[list[ir.Node]], context: list[str]) -> Part:
        made = {str(value.name) for node in nodes for value in node.outputs}
        wanted = {str(v.name) for part in later for node in part for v in self._reads(node)} | set(self.outputs)
        outputs = [name for name in dict.fromkeys(str(v.name) for n in nodes for v in n.outputs) if name in wanted]
        steps, modules = [], {}
        for node in nodes:
            steps += self._step(node)
            if id(node) in self.modules:
                modules[self.names[id(node)]] = self.modules[id(node)].module
        read = [n for step in steps for n in step.inputs if n and n not in step.constants and n not in made]
        inner = {name for step in steps for name in step.outputs}
        inputs = [name for name in dict.fromkeys(read) if name not in inner]
        inputs = [*(name for name in inputs if name not in context), *context]
        return Part(_dropping(steps, {*outputs}), modules, inputs, outputs)

    def _step(self, node: ir.Node) -> list[Step]:
        """The call of a node; with a preparation of its input where the module needs one."""
        made = self.modules.get(id(node))
        if made is None:
            values = list(read_by(node))
            if node.op_type in OPS and node.domain == "":
                values = list(node.inputs)
            call = self._function(node)
            return [Step(call, str(node.name), _names(values), _names(node.outputs), _constants(values))]
        source, output = str(made.input.name), str(made.output.name)
        constants = _constants([made.input])
        if made.before is None:
            return [Step(None, self.names[id(node)], (source,), (output,), constants)]
        between = f"{source} of {node.name}"
        return [Step(made.before, str(node.name), (source,), (between,), constants),
                Step(None, self.names[id(node)], (between,), (output,), {})]  # fmt: skip

    def _function(self, node: ir.Node) -> Callable[..., Any]:
        row = OPS.get(node.op_type) if node.domain == "" else None
        attributes = {str(key): a.value for key, a in node.attributes.items() if not a.is_ref()}
        if node.op_type == "Split":
            attributes.setdefault("num_outputs", len(node.outputs))
        function = None if row is None else row(attributes)
        return NodeSession(node, self.model) if function is None else function


def _dropping(steps: list[Step], kept: set[str]) -> list[Step]:
    """The steps, each with what may be forgotten after it."""
    seen: set[str] = set(kept)
    found = []
    for step in reversed(steps):
        fresh = {name for name in (*step.inputs, *step.outputs) if name and name not in seen}
        seen |= fresh
        found.append(Step(step.call, step.name, step.inputs, step.outputs, step.constants, frozenset(fresh)))
    return found[::-1]


def _names(values: Sequence[Any]) -> tuple[str, ...]:
    return tuple("" if value is None else str(value.name) for value in values)


def _constants(values: Sequence[Any]) -> dict[str, Tensor]:
    known = [value for value in values if value is not None and value.const_value is not None]
    return {str(value.name): shared_tensor(value.const_value.numpy()) for value in known}


def _with_signature(inputs: dict[str, torch.dtype]) -> type[OnnxTwin]:
    """A class whose `forward` has the names of the inputs: what reads data looks at them."""

    def forward(self: OnnxTwin, *args: Any, **kwargs: Any) -> Any:
        return self.answer(*args, **kwargs)

    if all(name.isidentifier() for name in inputs):
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters = [inspect.Parameter(name, kind) for name in ("self", *inputs)]
        forward.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return type("OnnxTwin", (OnnxTwin,), {"forward": forward})
