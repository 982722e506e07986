"""A twin of an ONNX graph for the pipeline: checked against ONNX Runtime, with the plan in the names of its modules."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

import torch
from torch import Tensor

from narrowcast.core import sqnr_db
from narrowcast.errors import ModelError, NarrowcastError
from narrowcast.models import Site
from narrowcast.models.channel_flow import tensors_in
from narrowcast.models.onnx_model import OnnxModel
from narrowcast.models.onnx_session import OnnxModule
from narrowcast.models.onnx_twin import Twin, make_twin
from narrowcast.pipeline.solve_weight import needs_of
from narrowcast.pipeline.transform_stage import common_start
from narrowcast.planning import LayerPlan, Plan

SAME_FUNCTION_DB = 60.0
"""Rounding of a float32 network; what changes more has changed the function."""


def checked_twin(adapter: OnnxModel, probe: Any) -> Twin:
    """A twin that answers what ONNX Runtime does.

    Raises:
        ModelError: it does not.
    """
    twin = None
    try:
        twin = make_twin(adapter.graph, adapter.uses())
        same = 0.0 if probe is None else sameness(answers(adapter, probe), _answers_of(twin, probe))
        low = probe is not None and same < SAME_FUNCTION_DB
        why = f"SQNR {same:.1f} dB, expected at least {SAME_FUNCTION_DB:.0f}" if low else ""
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, ModelError) as error:
        text = str(error) if twin is None else twin.readable(str(error))
        why = f"{type(error).__name__}: {text:.200}"
    if why:
        raise ModelError(
            f"the graph of {adapter.name} computed in torch does not give what ONNX Runtime gives ({why}), so neither "
            "transforms nor solving block after block work on it; leave transforms out, and set sequential = false"
        )
    assert twin is not None
    return twin


def _answers_of(twin: Twin, probe: Any) -> list[Tensor]:
    with torch.no_grad():
        return _floats(probe.run(twin.module))


def answers(adapter: OnnxModel, probe: Any) -> list[Tensor]:
    """What ONNX Runtime answers to the first batch with the graph as it is, the floating-point outputs."""
    return _floats(probe.run(OnnxModule(adapter.graph, adapter.name)))


def _floats(answer: Any) -> list[Tensor]:
    return [tensor for tensor in tensors_in(answer) if tensor.is_floating_point() and tensor.numel()]


def sameness(before: list[Tensor], after: list[Tensor]) -> float:
    """SQNR of the output that differs most, in decibel."""
    if [tensor.shape for tensor in before] != [tensor.shape for tensor in after]:
        return -math.inf
    finite = [(a, b) for a, b in zip(before, after, strict=True) if bool(torch.isfinite(a).all())]
    return min((sqnr_db(a, b) for a, b in finite), default=math.inf)


@contextmanager
def readable_errors(twin: Twin) -> Iterator[None]:
    """Errors that name modules of the twin name nodes instead."""
    try:
        yield
    except NarrowcastError as error:
        raise type(error)(twin.readable(str(error))) from None


def plan_on_twin(plan: Plan, twin: Twin) -> Plan:
    """The plan of the weights that the twin has, with the paths of its modules."""
    rows = [_row_on_twin(row, twin) for row in plan.layers if all(site.path in twin.paths for site in row.layer.sites)]
    entries = tuple(_with_paths(entry, plan, twin) for entry in plan.recipe.transforms)
    return replace(plan, layers=rows, recipe=replace(plan.recipe, transforms=entries))


def _row_on_twin(row: LayerPlan, twin: Twin) -> LayerPlan:
    renamed = with_paths(row, twin)
    if not why_no_gradient(renamed, twin):
        return renamed
    return replace(renamed, method={"gptq": {}} if row.chosen else {"rtn": {}})


def with_paths(row: LayerPlan, twin: Twin) -> LayerPlan:
    """The plan of a weight whose uses are named by paths in the twin."""
    sites = tuple(Site(twin.paths[site.path], "weight", site.type) for site in row.layer.sites)
    return replace(row, layer=replace(row.layer, sites=sites))


def why_no_gradient(row: LayerPlan, twin: Twin) -> str:
    """Why a weight of the twin cannot be solved with its block although its solver wants that; "" where it can."""
    opaque = [name for site in row.layer.sites for name in twin.opaque[site.path.partition(".")[0]]]
    if "block" not in needs_of(row) or not opaque:
        return ""
    return f"its block has {opaque[0]}, which only ONNX Runtime computes, so no gradient passes"


def _with_paths(entry: Any, plan: Plan, twin: Twin) -> Any:
    """A transform whose pairs name modules of the twin: patterns are of names of nodes or layers."""
    ((name, options),) = entry.items()
    if not options.get("pairs"):
        return entry
    known = [(row.layer.name, site.path) for row in plan.layers for site in row.layer.sites]
    names = twin.paths | {layer: twin.paths[node] for layer, node in known if node in twin.paths}
    pairs = [pair for first, second in options["pairs"] for pair in _matched(first, second, names)]
    return {name: {**options, "pairs": pairs}}


def _matched(first: str, second: str, names: dict[str, str]) -> list[tuple[str, str]]:
    producers = {path: name for name, path in names.items() if fnmatchcase(name, first)}
    readers = {path: name for name, path in names.items() if fnmatchcase(name, second)}
    if not producers or not readers:
        return [(next(map(escape, producers), first), next(map(escape, readers), second))]
    found = []
    for path, name in producers.items():
        others = [other for other in readers if other != path] or list(readers)
        nearest = max(others, key=lambda other: common_start(readers[other], name))
        found.append((escape(path), escape(nearest)))
    return found
