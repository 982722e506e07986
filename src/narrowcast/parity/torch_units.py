"""The layers of a torch module: which of its modules are compared as one, and how each of them computes."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from narrowcast.models.modules import get_module
from narrowcast.nn import FoldedBatchNorm, FusedActivation, QuantizedModule
from narrowcast.nn.integer_graph import graph_of
from narrowcast.nn.trained import TrainedModule
from narrowcast.parity.bounds import Arithmetic
from narrowcast.parity.runtime import Unit

_PASS_ON = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
# Ops whose result is the same whatever body runs: sums of integers, and rows read from a table.
_EXACT_OPS = (
    "linear_int8_dynamic", "linear_int8_static", "linear_lowbit_dynamic", "conv2d_int8", "lstm_int8", "gru_int8",
    "embedding_rows", "torch row lookup",
)  # fmt: skip


def find_units(model: nn.Module) -> dict[str, Unit]:
    """The layers of a model by name, in its order; modules that pass their input on are left out."""
    inside = _inside_networks(model)
    ends = ends_of(model)
    units: dict[str, Unit] = {}
    parts: set[str] = set()
    for path, module in model.named_modules():
        if path.rpartition(".")[0] in parts:
            parts.add(path)
        elif graph_of(module) is not None:
            units[path] = torch_unit(model, path, "", inside)
        elif is_whole(module):
            parts.add(path)
            if not isinstance(module, (*_PASS_ON, FoldedBatchNorm, FusedActivation)):
                units[path] = torch_unit(model, path, ends.get(path, ""), inside)
    return units


def is_whole(module: nn.Module) -> bool:
    """Whether a module is one layer, whatever lies inside it."""
    opaque = (TrainedModule, QuantizedModule, nn.MultiheadAttention)
    return isinstance(module, opaque) or not any(True for _ in module.children())


def ends_of(model: nn.Module) -> dict[str, str]:
    """Name of a layer -> name of the module behind it that has become part of it."""
    ends = {}
    for path, module in model.named_modules():
        if isinstance(module, FoldedBatchNorm):
            ends[module.convolution] = path
        elif isinstance(module, FusedActivation):
            ends[module.linear] = path
    return ends


def _inside_networks(model: nn.Module) -> dict[str, str]:
    """Name of a convolution -> name of the module whose network runs it."""
    found = {}
    for path, module in model.named_modules():
        graph = graph_of(module)
        for member in graph.fused if graph else ():
            found[f"{path}.{member}" if path else member] = path
    return found


def torch_unit(model: nn.Module, path: str, end: str, inside: dict[str, str] | None = None) -> Unit:
    """One module as a layer, with the modules behind it up to `end`."""
    module = get_module(model, path)
    networks = _inside_networks(model) if inside is None else inside
    network = networks.get(path) if isinstance(module, QuantizedModule) else None
    return Unit(path, type(module).__name__, _arithmetic(module, folded=bool(end)), end, network)


def _arithmetic(module: nn.Module, *, folded: bool) -> Arithmetic:
    if graph_of(module) is not None or not is_whole(module):
        held = [_as_quantized(part) for part in module.modules()]
        formats = sorted({_formats(part) for part in held if isinstance(part, QuantizedModule)})
        return Arithmetic("network" if graph_of(module) is not None else "parts", ", ".join(formats) or "float32")
    quantized = _as_quantized(module)
    if isinstance(quantized, QuantizedModule):
        kind = "integer" if quantized.kernel.startswith(_EXACT_OPS) else "weights"
        return Arithmetic(kind, _formats(quantized), getattr(quantized, "fused", "none"), folded)
    return Arithmetic("float", _float_format(module), folded=folded)


def _as_quantized(module: nn.Module) -> nn.Module:
    return module.built() if isinstance(module, TrainedModule) else module


def _formats(module: QuantizedModule) -> str:
    weights = sorted({str(module.stored(name).spec) for name in module.weight_names})
    given = module.input_ranges().spec if hasattr(module, "activation") else None
    return ", ".join(weights) + (f" x {given}" if given is not None else "")


def _float_format(module: nn.Module) -> str:
    dtypes = {str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.is_floating_point()}
    return ", ".join(sorted(dtypes)) or "float32"


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What a layer holds: of quantized ones codes, scales, zero points and levels, of others their state."""
    quantized = _as_quantized(module)
    if not isinstance(quantized, QuantizedModule):
        return {name: tensor.detach() for name, tensor in quantized.state_dict().items() if isinstance(tensor, Tensor)}
    found: dict[str, Any] = {}
    for name, record in quantized.quantized_weights().items():
        parts = {"codes": record.codes, "scale": record.scale, "zero point": record.zero_point, "levels": record.levels}
        found |= {f"{name} {part}": tensor for part, tensor in parts.items()}
    known = tuple(f"{name}_" for name in quantized.weight_names)
    rest = {n.replace("_", " "): t for n, t in quantized.state_dict().items() if not n.startswith(known)}
    return {name: tensor for name, tensor in (found | rest).items() if isinstance(tensor, Tensor)}
