"""A documented rule picks the tensor of an output, and padding is left out."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from narrowcast.data import Batch
from narrowcast.errors import ModelError
from narrowcast.evaluate.answers import Answer, answer, pick_tensor

A, B = torch.ones(2, 3), torch.zeros(2, 3)


class Named(NamedTuple):
    last_hidden_state: Tensor
    pooler: Tensor


@pytest.mark.parametrize(
    ("output", "expected", "name"),
    [
        (A, A, ""),
        ((A, (B, B)), A, ""),
        ([None, [B]], B, ""),
        ({"loss": B, "logits": A}, A, "logits"),
        ({"pooler_output": B, "last_hidden_state": A}, A, "last_hidden_state"),
        ({"hidden": A, "other": B}, A, "hidden"),
        (Named(A, B), A, "last_hidden_state"),
        ((None, {"x": A}), A, "x"),
    ],
)
def test_the_tensor_that_counts(output: Any, expected: Tensor, name: str) -> None:
    tensor, found = pick_tensor(output)
    assert tensor is expected
    assert found == name


def test_an_output_without_a_tensor_is_an_error() -> None:
    with pytest.raises(ModelError, match="a dict, holds no tensor"):
        pick_tensor({"text": "hello"})


def test_an_lstm_counts_by_its_outputs() -> None:
    lstm = nn.LSTM(3, 4)
    inputs = torch.randn(5, 2, 3)
    assert torch.equal(answer(Batch((inputs,), {}, None, 2), lstm).tensor, lstm(inputs)[0])


def test_masked_tokens_do_not_count() -> None:
    hidden = torch.arange(12.0).reshape(1, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0]])
    ids = torch.ones(1, 4, dtype=torch.long)
    masked = Answer(Batch((), {"input_ids": ids, "attention_mask": mask}, None, 1), None, hidden, "last_hidden_state")
    assert torch.equal(masked.values(), hidden[0, :2])
    assert torch.equal(masked.embedding(), hidden[:, :2].mean(1))
    whole = Answer(Batch((ids,), {}, None, 1), None, hidden, "")
    assert torch.equal(whole.embedding(), hidden.mean(1))
    assert whole.token_ids is ids
