"""Other numbers in a float graph: what a transform made of the modules of a twin, written back to the nodes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
from torch import Tensor, nn

from narrowcast.models.modules import get_module
from narrowcast.models.onnx_layers import Use, reads_input_first
from narrowcast.models.onnx_scribe import Scribe
from narrowcast.models.onnx_twin_layers import Made, is_turned

if TYPE_CHECKING:
    from narrowcast.models.onnx_model import OnnxModel
    from narrowcast.models.onnx_twin import Twin


def with_constant(scribe: Scribe, use: Use, array: Any) -> Use:
    """A use whose node reads another array.

    Args:
        scribe: writes.
        use: of the constant.
        array: in the layout of the constant.

    Returns:
        The same use where nothing else reads the constant, which has the numbers then; else one of a new constant.
    """
    value: ir.Value = use.weight
    direct = use.node.inputs[use.index] is value
    if direct and len(list(value.uses())) == 1 and not value.is_graph_input() and not value.is_graph_output():
        value.const_value = ir.tensor(np.ascontiguousarray(array), name=value.name)
        return use
    if use.op in ("Gemm", "MatMul") and is_turned(use) != reads_input_first(use):
        array = array.T
    made = scribe.constant(array, f"{value.name}_of_{use.node.name}")
    use.node.replace_input_with(use.index, made)
    return Use(use.node, made, use.index, False, use.inside)


def write_back(adapter: OnnxModel, twin: Twin, changed: nn.Module) -> list[str]:
    """Write the parameters that differ from the twin's into the graph.

    Args:
        adapter: of the graph.
        twin: of it, as it was made.
        changed: the twin's module, or a copy, some of whose parameters are others.

    Returns:
        Names of the nodes that have other numbers now.
    """
    scribe = Scribe(adapter.graph)
    nodes = []
    for path, made in twin.made.items():
        old: Any = made.module
        new: Any = get_module(changed, path)
        weight = None if new.weight is old.weight else _array(new.weight)
        had, has = getattr(old, "bias", None), getattr(new, "bias", None)
        bias = None if has is had or has is None else _array(has)
        if weight is None and bias is None:
            continue
        nodes.append(str(made.consumed[0].name))
        if made.use is None:
            _write_norm(scribe, made, weight, bias)
            continue
        if weight is not None and is_turned(made.use):
            weight = weight.T
        adapter.rewrite(str(made.use.node.name), weight, bias)
    return nodes


def _array(tensor: Tensor) -> Any:
    return tensor.detach().float().numpy()


def _write_norm(scribe: Scribe, made: Made, weight: Any, bias: Any) -> None:
    """New scales and shifts of a normalization: constants of their own, since several may share theirs."""
    first, last = made.consumed[0], made.consumed[-1]
    whole = first.op_type != "Mul"
    if weight is not None:
        index = 1 if whole else next(i for i in (0, 1) if first.inputs[i] is not made.input)
        first.replace_input_with(index, scribe.constant(weight, f"{first.name}_scale"))
    if bias is not None:
        index = 2 if whole else next(i for i in (0, 1) if last.inputs[i] is not first.outputs[0])
        last.replace_input_with(index, scribe.constant(bias, f"{first.name}_shift"))
