"""QuantizedRecurrent: torch's LSTM and GRU on the dequantized weights; the integer ops near them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from tests.nn.oracles import close, noise, record, restored
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from narrowcast.core import QuantSpec, sqnr_db
from narrowcast.errors import ModelError
from narrowcast.nn import FLOAT, Activation, QuantizedRecurrent, RecurrentShape

DYNAMIC = Activation(QuantSpec.parse("int8/token"))
CELLS = {"LSTM": nn.LSTM, "GRU": nn.GRU}
GEOMETRIES: dict[str, dict[str, Any]] = {
    "one layer": {},
    "without bias": {"bias": False},
    "two layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "batch first": {"batch_first": True},
    "everything": {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": True},
}
# Dynamic int8 of inputs, hidden states and weights: what a stack of small cells keeps.
NEAR_DB = 30.0


def stack(cell: str, **options: Any) -> Any:
    module = CELLS[cell](9, 12, **options)
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=index) * 0.4)
    return module.eval().requires_grad_(False)


def converted(module: Any, activation: Activation = FLOAT, spec: str = "int8") -> QuantizedRecurrent:
    shape = RecurrentShape.of(module)
    parameters = dict(module.named_parameters())
    records = {name: record(parameters[name], spec) for name in shape.weights()}
    biases = {name: value for name, value in parameters.items() if name.startswith("bias")}
    specs = {name: QuantSpec.parse(spec) for name in records}
    return QuantizedRecurrent(shape, specs, activation, records=records, biases=biases)


def on_dequantized(module: Any, quantized: QuantizedRecurrent) -> Any:
    """torch's own stack with the weights that the quantized one stands for."""
    reference = copy.deepcopy(module)
    with torch.no_grad():
        for name, weight in quantized.quantized_weights().items():
            getattr(reference, name).copy_(weight.dequantize())
    return reference


def tensors(answer: Any) -> list[Tensor]:
    output, state = answer
    output = output.data if isinstance(output, PackedSequence) else output
    return [output, *(state if isinstance(state, tuple) else (state,))]


def same(got: Any, expected: Any, part: float = 1e-5) -> None:
    assert type(got[1]) is type(expected[1])
    for mine, theirs in zip(tensors(got), tensors(expected), strict=True):
        close(mine, theirs, part)


def near(got: Any, expected: Any) -> None:
    for mine, theirs in zip(tensors(got), tensors(expected), strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        assert sqnr_db(theirs, mine) > NEAR_DB


def initial(module: Any, batch: int | None) -> Any:
    rows = module.num_layers * (2 if module.bidirectional else 1)
    shape = (rows, 12) if batch is None else (rows, batch, 12)
    states = (noise(*shape, seed=7) * 0.5, noise(*shape, seed=8) * 0.5)
    return states if isinstance(module, nn.LSTM) else states[0]


def sequence(module: Any, steps: int = 6, batch: int = 4) -> Tensor:
    return noise(batch, steps, 9) if module.batch_first else noise(steps, batch, 9)


@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("cell", CELLS)
def test_float_inputs_meet_torch_on_the_dequantized_weights(cell: str, geometry: str, given_state: bool) -> None:
    module = stack(cell, **GEOMETRIES[geometry])
    quantized = converted(module)
    x = sequence(module)
    state = initial(module, 4) if given_state else None
    same(quantized(x, state), on_dequantized(module, quantized)(x, state))


@pytest.mark.parametrize("given_state", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("cell", CELLS)
def test_integer_stacks_are_near_torch(cell: str, geometry: str, given_state: bool) -> None:
    module = stack(cell, **GEOMETRIES[geometry])
    quantized = converted(module, DYNAMIC)
    assert quantized.kernel.startswith(f"{cell.lower()}_int8")
    x = sequence(module)
    state = initial(module, 4) if given_state else None
    near(quantized(x, state), module(x, state))


@pytest.mark.parametrize("activation", [FLOAT, DYNAMIC])
@pytest.mark.parametrize("cell", CELLS)
def test_unbatched_sequences_work_as_in_torch(cell: str, activation: Activation) -> None:
    for geometry in ("one layer", "everything"):
        module = stack(cell, **GEOMETRIES[geometry])
        quantized = converted(module, activation)
        x = noise(6, 9)
        for state in (None, initial(module, None)):
            check = same if activation is FLOAT else near
            check(quantized(x, state), on_dequantized(module, quantized)(x, state))


LENGTHS = {"falling": [6, 4, 4, 1], "mixed": [2, 6, 1, 4], "equal": [5, 5, 5, 5], "single steps": [1, 1, 1, 1]}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("activation", [FLOAT, DYNAMIC])
@pytest.mark.parametrize("geometry", ["one layer", "bidirectional", "everything"])
@pytest.mark.parametrize("cell", CELLS)
def test_packed_sequences_in_any_order_work_as_in_torch(
    cell: str, geometry: str, activation: Activation, lengths: str
) -> None:
    module = stack(cell, **GEOMETRIES[geometry])
    quantized = converted(module, activation)
    x = sequence(module, steps=max(LENGTHS[lengths]))
    packed = pack_padded_sequence(
        x, torch.tensor(LENGTHS[lengths]), batch_first=module.batch_first, enforce_sorted=False
    )
    for state in (None, initial(module, 4)):
        got, expected = quantized(packed, state), on_dequantized(module, quantized)(packed, state)
        (same if activation is FLOAT else near)(got, expected)
        assert torch.equal(got[0].batch_sizes, expected[0].batch_sizes)
        padded = [pad_packed_sequence(answer[0], batch_first=module.batch_first) for answer in (got, expected)]
        assert torch.equal(padded[0][1], padded[1][1])
        assert sqnr_db(padded[1][0], padded[0][0]) > NEAR_DB


@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_alone_gives_what_it_gives_in_a_packed_batch(cell: str) -> None:
    module = stack(cell, **GEOMETRIES["everything"])
    quantized = converted(module, DYNAMIC)
    x = sequence(module)
    lengths = [2, 6, 1, 4]
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    together, _ = pad_packed_sequence(quantized(packed)[0], batch_first=True)
    for row, length in enumerate(lengths):
        close(together[row, :length], quantized(x[row : row + 1, :length])[0][0])


@pytest.mark.parametrize("spec", ["fp16", "bf16", "int8/asym", "int4/group32/asym", "nf4/group32"])
@pytest.mark.parametrize("cell", CELLS)
def test_every_format_of_weights_runs_in_float(cell: str, spec: str) -> None:
    module = stack(cell, num_layers=2)
    quantized = converted(module, FLOAT, spec)
    x = sequence(module)
    same(quantized(x), on_dequantized(module, quantized)(x))


@pytest.mark.parametrize("activation", [FLOAT, DYNAMIC])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("cell", CELLS)
def test_settings_and_stored_tensors_rebuild_the_stack_to_the_bit(
    cell: str, geometry: str, activation: Activation
) -> None:
    module = stack(cell, **GEOMETRIES[geometry])
    quantized = converted(module, activation)
    again = restored(quantized)
    x = sequence(module)
    for mine, theirs in zip(tensors(again(x)), tensors(quantized(x)), strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(tensors(copy.deepcopy(quantized)(x)), tensors(quantized(x)), strict=True):
        assert torch.equal(mine, theirs)
    assert set(again.state_dict()) == set(quantized.state_dict())
    assert again.quantized_weights() == quantized.quantized_weights()


@pytest.mark.parametrize("activation", [FLOAT, DYNAMIC])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_inputs_give_half_precision_outputs(
    cell: str, activation: Activation, dtype: torch.dtype
) -> None:
    module = stack(cell)
    quantized = converted(module, activation)
    x = sequence(module).to(dtype)
    y = quantized(x)[0]
    assert y.dtype == dtype
    close(y.float(), quantized(x.float())[0], part=3e-2)


@pytest.mark.parametrize("activation", [FLOAT, DYNAMIC])
@pytest.mark.parametrize("cell", CELLS)
def test_initial_states_of_the_wrong_shape_are_refused(cell: str, activation: Activation) -> None:
    module = stack(cell)
    quantized = converted(module, activation)
    with pytest.raises(ModelError, match=rf"{cell} wants . initial state\(s\) of shape \(1, 4, 12\)"):
        quantized(sequence(module), initial(module, 3))
    with pytest.raises(ModelError, match="initial state"):
        quantized(sequence(module), (torch.zeros(1, 4, 12),) * 3)


def test_what_models_read_from_a_stack_is_there() -> None:
    quantized = converted(stack("LSTM", **GEOMETRIES["everything"]))
    assert (quantized.hidden_size, quantized.num_layers, quantized.bidirectional, quantized.batch_first) == (
        12,
        2,
        True,
        True,
    )
    assert quantized.flatten_parameters() is None


def test_torch_does_not_warn_about_scattered_weights() -> None:
    module = stack("LSTM", num_layers=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        converted(module)(sequence(module))
