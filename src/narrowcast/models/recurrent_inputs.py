"""What multiplies each weight of an LSTM or GRU: the inputs of every layer, and the hidden states of the step before.

From outside only the first layer's input can be seen. A layer's hidden states are its outputs, shifted by one step and
beginning with the initial state, so the stack is run again layer by layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from narrowcast.nn import RecurrentShape


def inner_inputs(module: nn.LSTM | nn.GRU, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The vectors that the weights of a recurrent module are multiplied with in one call.

    Args:
        module: a float stack without projection; dropout between its layers is left out.
        args: what it is called with: input, and initial states.
        kwargs: the same by name.

    Returns:
        [vectors, columns] by the parameter's name, "weight_hh_l0" for example; one vector per step and row.
    """
    shape = RecurrentShape.of(module)
    given = dict(zip(("input", "hx"), args, strict=False)) | dict(kwargs)
    data, sizes, order = _steps(given["input"], shape)
    states = _initial(given.get("hx"), shape, data, sizes[0], order)
    found: dict[str, Tensor] = {}
    for layer in range(shape.num_layers):
        suffixes = [suffix for index, _, suffix in shape.suffixes() if index == layer]
        rows = slice(layer * shape.directions, (layer + 1) * shape.directions)
        y = _run_layer(module, shape, suffixes, data, sizes, [state[rows] for state in states])
        for direction, (suffix, own) in enumerate(zip(suffixes, y.split(shape.hidden_size, -1), strict=True)):
            found[f"weight_ih_{suffix}"] = data
            found[f"weight_hh_{suffix}"] = _earlier(own, states[0][rows][direction], sizes, backward=direction == 1)
        data = y
    return found


def _steps(x: Tensor | PackedSequence, shape: RecurrentShape) -> tuple[Tensor, list[int], Tensor | None]:
    """[vectors, columns] step by step, the rows of every step, and the order of the rows where they were sorted."""
    if isinstance(x, PackedSequence):
        return x.data, x.batch_sizes.tolist(), x.sorted_indices
    if x.dim() == 2:
        x = x.unsqueeze(1)
    elif shape.batch_first:
        x = x.transpose(0, 1)
    return x.reshape(-1, x.shape[-1]), [x.shape[1]] * x.shape[0], None


def _initial(hx: Any, shape: RecurrentShape, data: Tensor, batch: int, order: Tensor | None) -> list[Tensor]:
    """[h] or [h, c], each [layers * directions, batch, hidden], in the order of the steps' rows."""
    count = 2 if shape.cell == "LSTM" else 1
    if hx is None:
        return [data.new_zeros(shape.num_layers * shape.directions, batch, shape.hidden_size)] * count
    states = list(hx) if isinstance(hx, tuple | list) else [hx]
    states = [state.unsqueeze(1) if state.dim() == 2 else state for state in states]
    return [state if order is None else state.index_select(1, order) for state in states]


def _run_layer(
    module: nn.Module, shape: RecurrentShape, suffixes: list[str], data: Tensor, sizes: list[int], states: list[Tensor]
) -> Tensor:
    """[vectors, directions * hidden]: what one layer says at every step."""
    parts = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if shape.bias else ()))
    flat = [getattr(module, f"{part}_{suffix}") for suffix in suffixes for part in parts]
    function: Any = torch.lstm if shape.cell == "LSTM" else torch.gru
    hidden: Any = [state.contiguous() for state in states] if shape.cell == "LSTM" else states[0].contiguous()
    y: Tensor = function(data, torch.tensor(sizes), hidden, flat, shape.bias, 1, 0.0, False, shape.bidirectional)[0]
    return y


def _earlier(own: Tensor, start: Tensor, sizes: list[int], *, backward: bool) -> Tensor:
    """[vectors, hidden]: the state that every row enters a step with; sequences that join begin with their own."""
    steps: list[Tensor] = list(own.split(sizes))
    if not backward:
        return torch.cat([start[: sizes[0]], *(step[:size] for step, size in zip(steps, sizes[1:], strict=False))])
    following = [*steps[1:], own[:0]]
    joined = (torch.cat([step, start[step.shape[0] : size]]) for step, size in zip(following, sizes, strict=True))
    return torch.cat(list(joined))
