"""QuantizedRecurrent: LSTM and GRU stacks with quantized input and recurrent weights.

With integer activations one op call runs one layer in one direction over the whole sequence: inputs and hidden
states are quantized per token, both products are integer, gates and states stay in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from narrowcast.core import QuantizedTensor, QuantSpec
from narrowcast.errors import ModelError
from narrowcast.kernels import kernel_name
from narrowcast.nn.activation import FLOAT, Activation
from narrowcast.nn.base import QuantizedModule, row_sums
from narrowcast.nn.linear import is_int8_per_channel

State = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True)
class RecurrentShape:
    """The geometry of an LSTM or GRU stack; fields as in torch."""

    cell: str
    input_size: int
    hidden_size: int
    num_layers: int
    bidirectional: bool
    batch_first: bool
    bias: bool

    @classmethod
    def of(cls, module: nn.LSTM | nn.GRU) -> RecurrentShape:
        """The geometry of a torch module."""
        return cls(
            module.mode, module.input_size, module.hidden_size, module.num_layers, module.bidirectional,
            module.batch_first, module.bias,
        )  # fmt: skip

    @property
    def gates(self) -> int:
        """Rows of a weight per hidden unit."""
        return 4 if self.cell == "LSTM" else 3

    @property
    def directions(self) -> int:
        """1, or 2 when bidirectional."""
        return 2 if self.bidirectional else 1

    def suffixes(self) -> Iterator[tuple[int, bool, str]]:
        """(layer, reversed, torch's parameter suffix) of every layer and direction, in torch's order."""
        for layer in range(self.num_layers):
            for direction in range(self.directions):
                yield layer, direction == 1, f"l{layer}" + ("_reverse" if direction else "")

    def weights(self) -> dict[str, tuple[int, int]]:
        """Shape of every weight matrix, by torch's parameter name."""
        shapes = {}
        for layer, _, suffix in self.suffixes():
            width = self.input_size if layer == 0 else self.hidden_size * self.directions
            shapes[f"weight_ih_{suffix}"] = (self.gates * self.hidden_size, width)
            shapes[f"weight_hh_{suffix}"] = (self.gates * self.hidden_size, self.hidden_size)
        return shapes


class RecurrentFace:
    """What models read off a recurrent module of torch."""

    shape: RecurrentShape

    @property
    def batch_first(self) -> bool:
        """As in torch."""
        return self.shape.batch_first

    @property
    def hidden_size(self) -> int:
        """As in torch."""
        return self.shape.hidden_size

    @property
    def num_layers(self) -> int:
        """As in torch."""
        return self.shape.num_layers

    @property
    def bidirectional(self) -> bool:
        """As in torch."""
        return self.shape.bidirectional

    def flatten_parameters(self) -> None:
        """Does nothing; torch's module has it, and models call it."""


class QuantizedRecurrent(RecurrentFace, QuantizedModule):
    """An LSTM or GRU stack with quantized weights; called exactly like the torch module it stands for.

    Args:
        shape: geometry of the stack.
        specs: format of every weight, by torch's parameter name.
        activation: "dynamic" runs the integer op, anything else torch's float function on dequantized weights.
        records: the weights; None leaves empty buffers on the meta device, for loading.
        biases: [gates * hidden] float32 by torch's parameter name; needed with `records` when the stack has biases.
    """

    kind = "Recurrent"

    def __init__(
        self,
        shape: RecurrentShape,
        specs: dict[str, QuantSpec],
        activation: Activation = FLOAT,
        *,
        records: dict[str, QuantizedTensor] | None = None,
        biases: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.shape = shape
        self.add_input_ranges(activation)
        self.weight_names = tuple(shape.weights())
        for name, matrix in shape.weights().items():
            self.add_weight(name, specs[name], matrix, None if records is None else records[name])
            if shape.bias:
                bias_name = name.replace("weight", "bias")
                empty = torch.empty(matrix[0], device="meta")
                self.register_buffer(bias_name, empty if biases is None else biases[bias_name].detach().clone())
        self._integer = activation.mode == "dynamic" and all(is_int8_per_channel(spec) for spec in specs.values())
        if records is not None:
            self.prepare_()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizedRecurrent:
        """See `InstalledModule`."""
        specs = {name: QuantSpec.parse(text) for name, text in config["specs"].items()}
        return cls(RecurrentShape(**config["shape"]), specs, Activation.from_dict(config["activation"]))

    def config(self) -> dict[str, Any]:
        """See `InstalledModule`."""
        return {
            "shape": dict(vars(self.shape)),
            "specs": {name: str(self.stored(name).spec) for name in self.weight_names},
            "activation": self.input_ranges().to_dict(),
        }

    def prepare_(self) -> None:
        """Row sums, flat scales and, for the LSTM, the sum of its two biases."""
        if not self._integer:
            return
        for name in self.weight_names:
            record = self.stored(name).to_record(self)
            assert record.scale is not None
            derived = {
                f"kernel_{name}": record.codes,
                f"kernel_scale_{name}": record.scale.expand(record.shape[0], 1).reshape(-1).contiguous(),
                f"kernel_sum_{name}": row_sums(record.codes),
            }
            for key, tensor in derived.items():
                self.register_buffer(key, tensor, persistent=False)
        if self.shape.cell == "LSTM" and self.shape.bias:
            for _, _, suffix in self.shape.suffixes():
                total = getattr(self, f"bias_ih_{suffix}") + getattr(self, f"bias_hh_{suffix}")
                self.register_buffer(f"kernel_bias_{suffix}", total, persistent=False)

    @property
    def kernel(self) -> str:
        """See `QuantizedModule`."""
        if self._integer:
            return kernel_name("lstm_int8" if self.shape.cell == "LSTM" else "gru_int8")
        return f"torch {self.shape.cell.lower()}, weights dequantized at each call"

    def forward(self, x: Tensor | PackedSequence, state: State | None = None) -> tuple[Tensor | PackedSequence, State]:
        """As `nn.LSTM` and `nn.GRU`: (output, h_n) or (output, (h_n, c_n))."""
        if isinstance(x, PackedSequence):
            return self._packed_forward(x, state)
        unbatched = x.dim() == 2
        batch_dim = 1 if unbatched or not self.shape.batch_first else 0
        sequence = x.unsqueeze(1) if unbatched else (x.transpose(0, 1) if batch_dim == 0 else x)
        states = self._initial(sequence.shape[1], x, state, None, unbatched=unbatched)
        y, states = self._run(sequence, states, None)
        if unbatched:
            return y.squeeze(1), self._as_output([s.squeeze(1) for s in states])
        return (y.transpose(0, 1) if batch_dim == 0 else y), self._as_output(states)

    def _packed_forward(self, packed: PackedSequence, state: State | None) -> tuple[PackedSequence, State]:
        sizes = packed.batch_sizes.tolist()
        states = self._initial(sizes[0], packed.data, state, packed.sorted_indices, unbatched=False)
        y, states = self._run(packed.data, states, sizes)
        if packed.unsorted_indices is not None:
            states = [s.index_select(1, packed.unsorted_indices) for s in states]
        output = PackedSequence(y, packed.batch_sizes, packed.sorted_indices, packed.unsorted_indices)
        return output, self._as_output(states)

    def _initial(
        self, batch: int, x: Tensor, state: State | None, order: Tensor | None, *, unbatched: bool
    ) -> list[Tensor]:
        """[h] or [h, c], each [layers * directions, batch, hidden] float32, sorted as the packed input is."""
        count = 2 if self.shape.cell == "LSTM" else 1
        rows = self.shape.num_layers * self.shape.directions
        if state is None:
            return [x.new_zeros(rows, batch, self.shape.hidden_size, dtype=torch.float32) for _ in range(count)]
        states = list(state) if isinstance(state, tuple | list) else [state]
        states = [s.unsqueeze(1) if unbatched else s for s in states]
        expected = (rows, batch, self.shape.hidden_size)
        if len(states) != count or any(tuple(s.shape) != expected for s in states):
            raise ModelError(
                f"{self.shape.cell} wants {count} initial state(s) of shape {expected}, got "
                f"{[tuple(s.shape) for s in states]}; pass none to start from zeros"
            )
        return [s if order is None else s.index_select(1, order) for s in states]

    def _run(self, sequence: Tensor, states: list[Tensor], sizes: list[int] | None) -> tuple[Tensor, list[Tensor]]:
        if not self._integer:
            return self._float_run(sequence, states, sizes)
        finals: list[list[Tensor]] = [[] for _ in states]
        outputs: list[Tensor] = []
        current = sequence
        for index, (_, reverse, suffix) in enumerate(self.shape.suffixes()):
            y, last = self._direction(current, [s[index] for s in states], suffix, reverse, sizes)
            outputs.append(y)
            for collected, tensor in zip(finals, last, strict=True):
                collected.append(tensor)
            if len(outputs) == self.shape.directions:
                current = torch.cat(outputs, -1) if self.shape.bidirectional else outputs[0]
                outputs = []
        return current, [torch.stack(collected) for collected in finals]

    def _direction(
        self, x: Tensor, start: list[Tensor], suffix: str, reverse: bool, sizes: list[int] | None
    ) -> tuple[Tensor, list[Tensor]]:
        """One layer in one direction; a packed sequence runs in stretches of steps that share a batch size."""
        if sizes is None:
            y, *last = self._cell(x, start, suffix, reverse)
            return y, last
        stretches = list(_stretches(sizes))
        pieces: list[Tensor] = []
        states = [s[:0] if reverse else s for s in start]
        finished: list[list[Tensor]] = [[] for _ in start]
        for offset, steps, batch in reversed(stretches) if reverse else stretches:
            for i, s in enumerate(states):
                if reverse:  # shorter sequences join: they start here, from their own initial state
                    states[i] = torch.cat([s, start[i][s.shape[0] : batch]])
                else:  # shorter sequences end: their state is final
                    finished[i].insert(0, s[batch:])
                    states[i] = s[:batch]
            chunk = x[offset : offset + steps * batch].view(steps, batch, -1)
            y, *states = self._cell(chunk, states, suffix, reverse)
            pieces.append(y.reshape(steps * batch, -1))
        if reverse:
            return torch.cat(pieces[::-1]), states
        return torch.cat(pieces), [torch.cat([s, *rest]) for s, rest in zip(states, finished, strict=True)]

    def _cell(self, x: Tensor, start: list[Tensor], suffix: str, reverse: bool) -> tuple[Tensor, ...]:
        weights = [
            getattr(self, f"kernel_{part}weight_{side}_{suffix}")
            for side in ("ih", "hh")
            for part in ("", "scale_", "sum_")
        ]
        start = [s.contiguous() for s in start]
        if self.shape.cell == "LSTM":
            bias = getattr(self, f"kernel_bias_{suffix}", None)
            return torch.ops.narrowcast.lstm_int8(x, *start, *weights, bias, reverse)  # type: ignore[no-any-return]
        biases = [getattr(self, f"bias_{side}_{suffix}", None) for side in ("ih", "hh")]
        return torch.ops.narrowcast.gru_int8(x, *start, *weights, *biases, reverse)  # type: ignore[no-any-return]

    def _float_run(
        self, sequence: Tensor, states: list[Tensor], sizes: list[int] | None
    ) -> tuple[Tensor, list[Tensor]]:
        flat: list[Tensor] = []
        for _, _, suffix in self.shape.suffixes():
            flat += [self.stored(f"weight_{side}_{suffix}").dequantize(self) for side in ("ih", "hh")]
            if self.shape.bias:
                flat += [getattr(self, f"bias_{side}_{suffix}") for side in ("ih", "hh")]
        function = torch.lstm if self.shape.cell == "LSTM" else torch.gru
        hidden: Any = states if self.shape.cell == "LSTM" else states[0]
        common = (flat, self.shape.bias, self.shape.num_layers, 0.0, False, self.shape.bidirectional)
        x, hidden = sequence.float(), [s.float() for s in hidden] if isinstance(hidden, list) else hidden.float()
        if sizes is not None:
            y, *last = function(x, torch.tensor(sizes), hidden, *common)
        else:
            y, *last = function(x, hidden, *common, False)
        return y.to(sequence.dtype), [s.to(sequence.dtype) for s in last]

    def _as_output(self, states: list[Tensor]) -> State:
        return (states[0], states[1]) if self.shape.cell == "LSTM" else states[0]

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        s = self.shape
        spec = self.stored(self.weight_names[0]).spec
        sizes = f"{s.cell}, {s.input_size}, {s.hidden_size}, layers={s.num_layers}"
        return f"{sizes}, weight={spec}, input={self.activation.mode}"


def _stretches(sizes: list[int]) -> Iterator[tuple[int, int, int]]:
    """(offset in rows, steps, batch) of every run of equal batch sizes of a packed sequence."""
    offset = start = 0
    for step in range(1, len(sizes) + 1):
        if step == len(sizes) or sizes[step] != sizes[start]:
            yield offset, step - start, sizes[start]
            offset += (step - start) * sizes[start]
            start = step
