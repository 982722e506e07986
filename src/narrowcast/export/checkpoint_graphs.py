"""Integer graphs in checkpoints: the flow of every fused module as JSON; networks are built anew from the weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from narrowcast.errors import CheckpointError
from narrowcast.export.checkpoint_tensors import visits
from narrowcast.nn.flow import Flow
from narrowcast.nn.integer_graph import fuse_, graph_of


def describe_graphs(model: nn.Module) -> dict[str, Any]:
    """Path -> flow of every fused module, as JSON values."""
    graphs: dict[str, Any] = {}
    met: set[int] = set()
    for visit in visits(model):
        graph = graph_of(visit.module)
        if graph is not None and id(graph) not in met:
            met.add(id(graph))
            graphs[visit.path] = graph.flow.to_json()
    return graphs


def read_flows(description: dict[str, Any]) -> dict[str, Flow]:
    """The flows of a checkpoint, checked.

    Args:
        description: validated.

    Raises:
        CheckpointError: one is malformed or calls what flows may not call.
    """
    return {path: Flow.from_json(values) for path, values in description["graphs"].items()}


def restore_graphs_(model: nn.Module, flows: dict[str, Flow]) -> None:
    """Fuse the modules of a loaded model again.

    Args:
        model: with all modules and tensors of the checkpoint.
        flows: path -> flow.

    Raises:
        CheckpointError: a flow calls modules that the model does not have.
    """
    for path, flow in flows.items():
        _restore_(model, path, flow)


def _restore_(model: nn.Module, path: str, flow: Flow) -> None:
    try:
        module = model.get_submodule(path)
        for node in flow.nodes:
            if node.kind == "module":
                module.get_submodule(node.target)
        fuse_(module, flow)
    except (AttributeError, KeyError, IndexError, ValueError) as error:
        where = repr(path)[:200] if path else "the model"
        raise CheckpointError(f"the flow of {where} does not fit the model ({error!s:.200})") from error
