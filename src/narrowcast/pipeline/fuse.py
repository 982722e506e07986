"""Fusing: layers take in what follows them, where the outcome shows that nothing was lost by it.

Chains of convolutions become networks; linear layers apply the activation function behind them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from narrowcast.core import sqnr_db
from narrowcast.models import TorchModel
from narrowcast.models.activations import find_activations, fuse_activations_
from narrowcast.models.modules import evaluation_mode, get_module
from narrowcast.models.trace import find_flows
from narrowcast.nn.flow import Flow
from narrowcast.nn.integer_graph import fuse_, graph_of, unfuse_
from narrowcast.pipeline.judge import first_tensor
from narrowcast.planning import Plan
from narrowcast.report import LayerOutcome

# Codes between layers round once more where a residual is added: more than this lost means that the flow is wrong.
_TOLERATED_DB = 3.0
# Without a float model to compare with: two quantizations of one model are at least this close to each other.
_ALIKE_DB = 12.0


@dataclass
class Flows:
    """What is known of how the model's parts call each other.

    Args:
        flows: path -> flow of a part with convolutions.
        refused: path -> why there is none.
        activations: path of an activation module -> path of the linear layer before it.
    """

    flows: dict[str, Flow] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    activations: dict[str, str] = field(default_factory=dict)


def planned_convolutions(plan: Plan) -> list[str]:
    """Paths of the convolutions that the plan runs in integers with static ranges."""
    rows = [row for row in plan.layers if row.weight is not None and row.layer.type == "Conv2d"]
    static = [row for row in rows if row.integer and row.input is not None and row.input.observer]
    return [site.path for row in static for site in row.layer.sites]


def trace(adapter: TorchModel, plan: Plan, probe: Any) -> Flows:
    """The flows of the parts that hold at least two planned convolutions, and the activations behind linear layers.

    Args:
        adapter: the float model.
        plan: what will be quantized.
        probe: a batch, or None.
    """
    if not plan.recipe.fuse:
        return Flows()
    linears = {s.path for row in plan.layers if row.weight is not None for s in row.layer.sites if s.type in _LINEAR}
    run = None if probe is None else lambda: probe.run(adapter.model)
    activations = find_activations(adapter.model, run, linears)
    planned = planned_convolutions(plan)
    if len(planned) < 2:
        return Flows(activations=activations)
    wanted = {id(get_module(adapter.model, path)) for path in planned}
    flows, refused = find_flows(adapter.model, lambda module: id(module) in wanted)
    return Flows(flows, refused, activations)


_LINEAR = ("Linear", "Conv1D")


def fuse(
    adapter: TorchModel, flows: Flows, outcomes: list[LayerOutcome], probe: Any
) -> tuple[list[LayerOutcome], list[str]]:
    """Let the traced parts of the model run as networks. Changes the adapter's model.

    Args:
        adapter: with its quantized modules installed.
        flows: of `trace`.
        outcomes: one per weight.
        probe: a batch, to see on that nothing is lost; without one convolutions stay as they are.

    Returns:
        The outcomes with the kernel that runs now, and notes for the report.
    """
    taken = fuse_activations_(adapter.model, flows.activations)
    outcomes = [_with_activation(row, adapter) if row.layer in taken else row for row in outcomes]
    notes = [f"{len(taken)} linear layers apply the activation function behind them"] if taken else []
    if probe is None:
        return outcomes, notes
    notes += [
        f"{path or 'the model'} has no traceable forward ({reason}); convolutions outside traceable parts hand float "
        "activations to each other"
        for path, reason in flows.refused.items()
    ]
    fused: dict[str, str] = {}
    for path, flow in flows.flows.items():
        notes += _fuse_part(adapter, path, flow, probe, fused)
    return [_with_kernel(row, fused) for row in outcomes], notes


def _fuse_part(adapter: TorchModel, path: str, flow: Flow, probe: Any, fused: dict[str, str]) -> list[str]:
    module = get_module(adapter.model, path)
    where = path or "the model"
    before = _output(adapter, probe)
    graph = fuse_(module, flow)
    reasons = [f"{where}: {name} runs on its own: {reason}" for name, reason in graph.left_out.items()]
    if not graph.fused:
        return [f"{where}: no chain of convolutions to run as a network", *reasons]
    after = _output(adapter, probe)
    if problem := _worse(adapter, before, after, probe):
        unfuse_(module)
        return [f"{where}: convolutions hand float activations to each other, because as a network {problem}"]
    fused |= {(f"{path}.{name}" if path else name): graph.kernel for name in graph.fused}
    note = f"{where}: {len(graph.fused)} convolutions run as {graph.networks} network(s), 8-bit codes between them"
    return [note, *reasons]


def _output(adapter: TorchModel, probe: Any) -> Tensor | None:
    with torch.no_grad():
        return first_tensor(probe.run(adapter.model))


def _worse(adapter: TorchModel, before: Tensor | None, after: Tensor | None, probe: Any) -> str:
    """Why the fused model is not as good as the one before; "" when it is."""
    if before is None or after is None:
        return "there is no output to compare"
    if before.shape != after.shape:
        return f"the output has shape {tuple(after.shape)}, expected {tuple(before.shape)}"
    if adapter.model is adapter.original:
        alike = sqnr_db(before, after)
        return "" if alike >= _ALIKE_DB else f"the output differs by more than rounding (SQNR {alike:.1f} dB)"
    with torch.no_grad(), evaluation_mode(adapter.original):
        expected = first_tensor(probe.run(adapter.original))
    if expected is None:
        return "there is no output to compare"
    had, got = sqnr_db(expected, before), sqnr_db(expected, after)
    return "" if got >= had - _TOLERATED_DB else f"the output's SQNR falls from {had:.1f} to {got:.1f} dB"


def _with_activation(row: LayerOutcome, adapter: TorchModel) -> LayerOutcome:
    return replace(row, kernel=getattr(get_module(adapter.model, row.layer), "kernel", row.kernel))


def _with_kernel(row: LayerOutcome, fused: Mapping[str, str]) -> LayerOutcome:
    return replace(row, kernel=fused[row.layer]) if row.layer in fused else row


__all__ = ["Flows", "fuse", "graph_of", "planned_convolutions", "trace"]
