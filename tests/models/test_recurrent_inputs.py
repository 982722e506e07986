"""What multiplies the weights of a recurrent stack is what torch's own cells make its outputs of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from narrowcast.models.recurrent_inputs import inner_inputs

INPUT, HIDDEN = 5, 7


def stack(kind: type[nn.LSTM | nn.GRU], **options: object) -> nn.LSTM | nn.GRU:
    """A small stack of random weights."""
    torch.manual_seed(3)
    return kind(INPUT, HIDDEN, **options).eval()


def cell_of(module: nn.LSTM | nn.GRU, suffix: str) -> nn.GRUCell | nn.LSTMCell:
    """torch's cell with the weights of one layer in one direction."""
    columns = getattr(module, f"weight_ih_{suffix}").shape[1]
    cell = (nn.GRUCell if isinstance(module, nn.GRU) else nn.LSTMCell)(columns, HIDDEN, bias=module.bias)
    for name, parameter in cell.named_parameters():
        parameter.data = getattr(module, f"{name}_{suffix}").data
    return cell


def values(x: Tensor | PackedSequence) -> Tensor:
    return x.data if isinstance(x, PackedSequence) else x


def packed() -> PackedSequence:
    torch.manual_seed(4)
    return pack_sequence([torch.randn(length, INPUT) for length in (3, 6, 1, 6)], enforce_sorted=False)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("form", ["steps first", "packed"])
def test_a_gru_cell_makes_the_output_of_what_is_found(form: str, layers: int, bidirectional: bool) -> None:
    module = stack(nn.GRU, num_layers=layers, bidirectional=bidirectional)
    x = packed() if form == "packed" else torch.randn(6, 4, INPUT)
    start = torch.randn(layers * (1 + bidirectional), 4, HIDDEN)
    with torch.no_grad():
        wanted = values(module(x, start)[0]).reshape(-1, HIDDEN * (1 + bidirectional))
        found = inner_inputs(module, (x,), {"hx": start})
        last = [suffix for suffix in (f"l{layers - 1}", f"l{layers - 1}_reverse") if f"weight_ih_{suffix}" in found]
        got = [cell_of(module, s)(found[f"weight_ih_{s}"], found[f"weight_hh_{s}"]) for s in last]
    torch.testing.assert_close(torch.cat(got, -1), wanted, atol=1e-6, rtol=1e-5)


def test_every_weight_of_a_stack_has_its_vectors() -> None:
    module = stack(nn.LSTM, num_layers=2, bidirectional=True, bias=False)
    found = inner_inputs(module, (torch.randn(6, 4, INPUT),), {})
    assert {name: tuple(rows.shape) for name, rows in found.items()} == {
        name: (24, parameter.shape[1]) for name, parameter in module.named_parameters()
    }


@pytest.mark.parametrize("batch_first", [False, True])
def test_an_lstm_s_hidden_states_are_those_of_its_cell_step_by_step(batch_first: bool) -> None:
    module = stack(nn.LSTM, batch_first=batch_first)
    x, h, c = torch.randn(6, 4, INPUT), torch.randn(1, 4, HIDDEN), torch.randn(1, 4, HIDDEN)
    given = x.transpose(0, 1) if batch_first else x
    with torch.no_grad():
        found = inner_inputs(module, (given, (h, c)), {})
        cell, state, entered = cell_of(module, "l0"), (h[0], c[0]), []
        for step in x:
            entered.append(state[0])
            state = cell(step, state)
    torch.testing.assert_close(found["weight_hh_l0"], torch.cat(entered), atol=1e-6, rtol=1e-5)


def test_one_sequence_without_a_batch_is_a_batch_of_one() -> None:
    module, x = stack(nn.LSTM), torch.randn(6, INPUT)
    with torch.no_grad():
        alone, batched = inner_inputs(module, (x,), {}), inner_inputs(module, (x[:, None],), {})
    assert all(torch.equal(alone[name], batched[name]) for name in batched)
