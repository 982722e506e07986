"""TrainedRecurrent: an LSTM or GRU stack in training, its weights and its input rounded.

torch's own recurrent function runs with the rounded weights. What the layers of the stack hand to each other and the
hidden states are rounded in the quantized module alone: that function does not let anything happen in between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from narrowcast.nn.recurrent import QuantizedRecurrent, RecurrentFace
from narrowcast.nn.trained import AnyRange, TrainedModule
from narrowcast.nn.trained_inputs import rounded
from narrowcast.nn.trained_ranges import InputRange
from narrowcast.nn.training import Training


class TrainedRecurrent(RecurrentFace, TrainedModule):
    """The twin of a QuantizedRecurrent; called exactly like the torch module.

    Args:
        path, quantized, training, ranges, input_range: see `TrainedModule`; ranges of inputs are found at run time.
        weights: every weight, by torch's parameter name.
        biases: [gates * hidden] by torch's parameter name; empty without.
        dropout: between the layers, in training.
    """

    twin_of = QuantizedRecurrent

    def __init__(
        self, path: str, quantized: QuantizedRecurrent, training: Training, ranges: dict[str, AnyRange],
        input_range: InputRange | None, weights: dict[str, nn.Parameter], *, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(path, quantized, training, ranges, input_range)
        self.shape, self.dropout = quantized.shape, dropout
        for name in quantized.weight_names:
            self.register_parameter(name, weights[name])
            if self.shape.bias:
                bias = name.replace("weight", "bias")
                self.register_parameter(bias, nn.Parameter(getattr(quantized, bias).detach().clone()))
        self._rounding = self.rounding(-1)

    def matrix(self, name: str) -> Tensor:
        """See `TrainedModule`."""
        return self.get_parameter(name).float()

    def build(self) -> QuantizedRecurrent:
        """See `TrainedModule`."""
        records = self.records()
        biases = {n: p.detach().float().clone() for n, p in self._parameters.items() if p is not None and "bias" in n}
        specs = {name: record.spec for name, record in records.items()}
        return QuantizedRecurrent(self.shape, specs, self.activation(), records=records, biases=biases)

    def trained_forward(self, x: Tensor | PackedSequence, state: Any = None) -> tuple[Any, Any]:
        """As `nn.LSTM` and `nn.GRU`."""
        shape = self.shape
        packed = isinstance(x, PackedSequence)
        data = self._round_input(x.data if isinstance(x, PackedSequence) else x)
        unbatched = not packed and data.dim() == 2
        batch_dim = 0 if shape.batch_first else 1
        data = data.unsqueeze(batch_dim) if unbatched else data
        size = int(x.batch_sizes[0]) if isinstance(x, PackedSequence) else data.shape[batch_dim]
        states = self._states(data, state, size, unbatched=unbatched)
        if isinstance(x, PackedSequence) and x.sorted_indices is not None and state is not None:
            states = [s.index_select(1, x.sorted_indices) for s in states]
        hidden: Any = states if shape.cell == "LSTM" else states[0]
        common = (self._flat(), shape.bias, shape.num_layers, self.dropout, True, shape.bidirectional)
        function: Any = torch.lstm if shape.cell == "LSTM" else torch.gru
        if isinstance(x, PackedSequence):
            y, *last = function(data, x.batch_sizes, hidden, *common)
            if x.unsorted_indices is not None:
                last = [s.index_select(1, x.unsorted_indices) for s in last]
            out: Any = PackedSequence(y, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
        else:
            out, *last = function(data, hidden, *common, shape.batch_first)
            if unbatched:
                out, last = out.squeeze(batch_dim), [s.squeeze(1) for s in last]
        return out, (last[0], last[1]) if shape.cell == "LSTM" else last[0]

    def _round_input(self, x: Tensor) -> Tensor:
        if self._rounding.mode != "dynamic":
            return x
        with torch.no_grad():
            change = rounded(x, self._rounding, None).to(x.dtype) - x
        return x + change

    def _states(self, data: Tensor, state: Any, batch: int, *, unbatched: bool) -> list[Tensor]:
        count = 2 if self.shape.cell == "LSTM" else 1
        if state is None:
            rows = self.shape.num_layers * self.shape.directions
            return [data.new_zeros(rows, batch, self.shape.hidden_size) for _ in range(count)]
        states = list(state) if isinstance(state, tuple | list) else [state]
        return [s.unsqueeze(1) for s in states] if unbatched else states

    def _flat(self) -> list[Tensor]:
        flat: list[Tensor] = []
        for _, _, suffix in self.shape.suffixes():
            for side in ("ih", "hh"):
                name = f"weight_{side}_{suffix}"
                flat.append(self.weight_range(name).quantized(self.matrix(name)))
            if self.shape.bias:
                flat += [self.get_parameter(f"bias_{side}_{suffix}") for side in ("ih", "hh")]
        return flat
