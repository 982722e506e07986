"""What a model answered to a batch: which tensor of its output counts, and which positions of it are padding.

The rule, in this order: a tensor is itself; of a dictionary, a Hugging Face output or another object with named
fields the first of `logits`, `sentence_embedding`, `last_hidden_state` that is there; otherwise the first tensor met
in order. So an LSTM's `(outputs, (h, c))` counts by its outputs and a classifier's `(loss, logits)` by the name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from narrowcast.data import Batch
from narrowcast.errors import ModelError

PREFERRED = ("logits", "sentence_embedding", "last_hidden_state")


@dataclass(frozen=True)
class Answer:
    """The output of one model for one batch.

    Args:
        batch: what was asked.
        output: the model's output as it came.
        tensor: the tensor that counts, [samples, ...].
        name: the field it was found under; "" where fields have no names.
    """

    batch: Batch
    output: Any
    tensor: Tensor
    name: str

    @property
    def token_ids(self) -> Tensor | None:
        """[B, T] integer token ids among the inputs, or None: `input_ids`, else the first input."""
        found = self.batch.kwargs.get("input_ids")
        if found is None:
            found = next(iter((*self.batch.args, *self.batch.kwargs.values())), None)
        is_ids = isinstance(found, Tensor) and found.ndim == 2 and not found.is_floating_point()
        return found if is_ids else None

    @property
    def token_mask(self) -> Tensor | None:
        """[B, T] bool, False at padding, where the batch has an attention mask that fits the tensor; or None."""
        mask = self.batch.kwargs.get("attention_mask")
        if not isinstance(mask, Tensor) or mask.ndim != 2 or self.tensor.ndim != 3:
            return None
        return mask.bool() if mask.shape == self.tensor.shape[:2] else None

    def values(self) -> Tensor:
        """The tensor without padding: [samples, ...], or [real tokens, features] where tokens are masked."""
        mask = self.token_mask
        return self.tensor if mask is None else self.tensor[mask]

    def embedding(self) -> Tensor:
        """[samples, features]: hidden states [B, T, features] are averaged over their real tokens."""
        if self.tensor.ndim == 2:
            return self.tensor
        if self.tensor.ndim != 3:
            raise ModelError(
                f"an output of shape {list(self.tensor.shape)} is no embedding; expected 2 or 3 dimensions"
            )
        mask = self.token_mask
        if mask is None:
            return self.tensor.mean(1)
        weight = mask.unsqueeze(-1).to(self.tensor.dtype)
        return (self.tensor * weight).sum(1) / weight.sum(1).clamp(min=1)


def pick_tensor(output: Any) -> tuple[Tensor, str]:
    """The tensor of an output that counts, and the name of its field ("" if it has none).

    Raises:
        ModelError: the output holds no tensor.
    """
    if isinstance(output, Tensor):
        return output, ""
    for name in PREFERRED:
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(found, Tensor):
            return found, name
    first = next(_tensors(output, ""), None)
    if first is None:
        raise ModelError(f"the model's output, a {type(output).__name__}, holds no tensor to compare")
    return first


def _tensors(output: Any, name: str) -> Iterator[tuple[Tensor, str]]:
    if isinstance(output, Tensor):
        yield output, name
    elif isinstance(output, PackedSequence):
        yield output.data, name
    elif isinstance(output, Mapping):
        for key, value in output.items():
            yield from _tensors(value, str(key))
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _tensors(value, name)


def answer(batch: Batch, model: torch.nn.Module) -> Answer:
    """Runs a batch and picks the tensor."""
    output = batch.run(model)
    tensor, name = pick_tensor(output)
    return Answer(batch, output, tensor, name)
