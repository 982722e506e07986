"""Every form of data becomes batches that run the model, or an error that says what is wrong and where."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from narrowcast.data import Pairs, Texts, describe, iterate, repeatable
from narrowcast.errors import DataError


class Two(nn.Module):
    """A model that requires two inputs."""

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return (x + y) * scale


class Encoder(nn.Module):
    """A model with the parameters of a Hugging Face encoder."""

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        assert input_ids is not None
        return nn.functional.one_hot(input_ids, 300).float()


class Letters:
    """A `tokenizers.Tokenizer` in little: one token per letter."""

    class Encoding:
        def __init__(self, ids: list[int]) -> None:
            self.ids, self.attention_mask = ids, [1] * len(ids)

    def encode_batch(self, strings: list[str]) -> list[Encoding]:
        return [self.Encoding([ord(letter) for letter in string]) for string in strings]


LINEAR = nn.Linear(4, 2)


def only(data: Any, model: nn.Module = LINEAR) -> Any:
    batches = list(iterate(data, model))
    assert len(batches) == 1
    return batches[0]


def test_one_tensor_is_split_into_batches_of_32() -> None:
    values = torch.randn(70, 4)
    batches = list(iterate(values, LINEAR))
    assert [batch.samples for batch in batches] == [32, 32, 6]
    assert torch.equal(torch.cat([batch.args[0] for batch in batches]), values)
    assert torch.equal(torch.cat([batch.run(LINEAR) for batch in batches]), LINEAR(values))


def test_a_numpy_array_becomes_the_models_kind_of_float() -> None:
    values = np.random.default_rng(0).normal(size=(6, 4))
    assert only(values).args[0].dtype == torch.float32
    assert only(values, nn.Linear(4, 2).double()).args[0].dtype == torch.float64
    backwards = values[::-1]  # torch.from_numpy refuses negative strides
    backwards.flags.writeable = False
    np.testing.assert_allclose(only(backwards).args[0].numpy(), backwards, rtol=1e-6)


def test_a_dataloader_yields_inputs_and_targets() -> None:
    loader = DataLoader(TensorDataset(torch.randn(10, 4), torch.arange(10)), batch_size=4)
    batches = list(iterate(loader, LINEAR))
    assert [batch.samples for batch in batches] == [4, 4, 2]
    assert torch.equal(torch.cat([batch.targets for batch in batches]), torch.arange(10))
    assert describe(loader, LINEAR) == ["element 2 of each batch was taken as the target"]


def test_a_dataset_is_collated() -> None:
    batches = list(iterate(TensorDataset(torch.randn(40, 4), torch.arange(40)), LINEAR))
    assert [batch.samples for batch in batches] == [32, 8]


def test_a_tuple_of_arrays_is_inputs_and_targets() -> None:
    batches = list(iterate((np.ones((40, 4), np.float32), np.arange(40)), LINEAR))
    assert [batch.samples for batch in batches] == [32, 8]
    assert batches[1].targets.tolist() == list(range(32, 40))


def test_as_many_elements_are_inputs_as_forward_requires() -> None:
    batch = only([(torch.ones(3, 4), torch.ones(3, 4), torch.zeros(3), torch.ones(3))], Two())
    assert len(batch.args) == 2
    assert len(batch.targets) == 2
    assert batch.note == "elements 3 to 4 of each batch were taken as the targets"
    assert only([(torch.ones(3, 4), torch.ones(3, 4))], Two()).targets is None


def test_too_few_elements_name_what_forward_requires() -> None:
    with pytest.raises(DataError, match=r"batch 0 has 1 element.*Two.forward requires x, y"):
        list(iterate([torch.ones(3, 4)], Two()))


def test_a_dictionary_is_split_by_what_forward_takes() -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    batch = only([{"input_ids": ids, "attention_mask": ids, "labels": torch.tensor([1, 0])}], Encoder())
    assert set(batch.kwargs) == {"input_ids", "attention_mask"}
    assert batch.targets.tolist() == [1, 0]
    assert "'labels' of each batch was taken as the target" in batch.note
    assert batch.run(Encoder()).shape == (2, 5, 300)


def test_a_dictionary_followed_by_targets() -> None:
    batch = only([({"input_ids": torch.ones(2, 5, dtype=torch.long)}, torch.tensor([3, 4]))], Encoder())
    assert batch.targets.tolist() == [3, 4]


def test_a_dictionary_of_all_samples_is_split_into_rows() -> None:
    ids = torch.ones(40, 5, dtype=torch.long)
    assert [batch.samples for batch in iterate({"input_ids": ids, "label": ids[:, 0]}, Encoder())] == [32, 8]


def test_an_unknown_key_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"key 'pixels', which Encoder.forward does not take; it takes input_ids, "):
        list(iterate([{"pixels": torch.ones(2, 4)}], Encoder()))


def test_a_missing_key_is_an_error() -> None:
    with pytest.raises(DataError, match="batch 0 lacks the key 'y'"):
        list(iterate([{"x": torch.ones(2, 4)}], Two()))


def test_nested_inputs_are_kept_nested() -> None:
    class Stateful(nn.Module):
        def forward(self, x: Tensor, state: Any) -> Tensor:
            return x + state[0]

    batch = only([(torch.ones(2, 3), (np.ones((2, 3), np.float32), torch.ones(2, 3)))], Stateful())
    assert torch.equal(batch.run(Stateful()), torch.full((2, 3), 2.0))


def test_a_packed_sequence_is_one_input() -> None:
    packed = nn.utils.rnn.pack_sequence([torch.randn(5, 4), torch.randn(3, 4)])
    batch = only([packed], nn.LSTM(4, 6))
    assert batch.samples == 2
    assert batch.run(nn.LSTM(4, 6))[0].data.shape == (8, 6)


def test_a_callable_runs_the_model_itself() -> None:
    batch = only(lambda model: model(torch.ones(7, 4)))
    assert batch.run(LINEAR).shape == (7, 2)
    assert describe(lambda model: None, LINEAR) == ["the data is a callable: it ran the model itself"]


def test_strings_with_a_tokenizer_are_padded_and_masked() -> None:
    batch = only(Texts(["ab", "abcd"], Letters()), Encoder())
    assert batch.kwargs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch.kwargs["input_ids"][1].tolist() == [97, 98, 99, 100]
    assert only(Texts(["abcd"], Letters(), max_length=3), Encoder()).kwargs["input_ids"].shape == (1, 3)


def test_strings_are_not_padded_for_a_model_without_a_mask() -> None:
    embedding = nn.Embedding(300, 4)
    batches = list(iterate(Texts(["ab", "abcd"], Letters()), embedding))
    assert [batch.args[0].shape for batch in batches] == [(1, 2), (1, 4)]


def test_strings_without_a_known_tokenizer_name_the_remedy() -> None:
    with pytest.raises(DataError, match=r"no tokenizer is known for Linear.*Texts\(strings, tokenizer\)"):
        list(iterate(["a sentence"], LINEAR))


def test_a_string_without_tokens_is_named() -> None:
    with pytest.raises(DataError, match=r"string 1 \(''\) has no tokens"):
        list(iterate(Texts(["a", ""], Letters(), batch_size=1), Encoder()))


def test_pairs_yield_the_first_samples_then_the_second() -> None:
    pairs = Pairs(torch.zeros(3, 4), torch.ones(3, 4), [1.0, 2.0, 3.0])
    first, second = iterate(pairs, LINEAR)
    assert not first.args[0].any()
    assert second.args[0].all()
    assert repeatable(pairs)


@pytest.mark.parametrize("data", [[], iter([]), torch.empty(0, 4), (), np.empty((0, 4))])
def test_empty_data_is_an_error(data: Any) -> None:
    with pytest.raises(DataError, match=r"holds no batch|no tensor"):
        list(iterate(data, LINEAR))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "data is None"),
        (7, "data is an int"),
        ("a sentence", "data is a str"),
        (torch.tensor(1.0), "without dimensions"),
        ([torch.ones(2, 4), torch.empty(0, 4)], r"batch 1, element 1 has the shape \[0, 4\]"),
        ([torch.ones(2, 4), object()], "batch 1, element 1 is an object, not a tensor"),
        ([["a", "b"]], r"batch 0, element 1 is a str, not a tensor; wrap strings as Texts"),
        ([np.array(["a"], object)], "batch 0, element 1 is an array of object"),
        ([[]], "batch 0 has 0 element"),
        ([{}], "batch 0 lacks the key 'input'"),
        ([3.0], "batch 0 holds no tensor"),
        ((torch.ones(2, 4), torch.ones(3)), "parts have 2, 3 rows"),
    ],
)
def test_unusable_data_is_named_with_its_place(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(iterate(data, LINEAR))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_named_with_its_position(value: float) -> None:
    values = torch.ones(3, 4)
    values[1, 2] = value
    with pytest.raises(DataError, match=rf"batch 1, element 1 holds {value} at position \[1, 2\]"):
        list(iterate([torch.ones(3, 4), values], LINEAR))


def test_minus_infinity_is_allowed_in_a_mask_only() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return x + attention_mask

    mask = torch.full((2, 4), -torch.inf)
    assert only([(torch.ones(2, 4), mask)], Masked()).samples == 2
    with pytest.raises(DataError, match="holds nan"):
        list(iterate([(torch.ones(2, 4), mask * 0)], Masked()))


def test_a_generator_is_read_once_and_says_so() -> None:
    spent = (torch.ones(2, 4) for _ in range(2))
    assert not repeatable(spent)
    assert describe(spent, LINEAR) == ["the data is a generator and was read once"]
    assert len(list(iterate(spent, LINEAR))) == 2
    with pytest.raises(DataError, match="a generator can be read only once"):
        list(iterate(spent, LINEAR))
    assert repeatable([torch.ones(2, 4)])


def test_only_one_batch_is_in_memory() -> None:
    asked = []

    def batches() -> Any:
        for index in range(3):
            asked.append(index)
            yield torch.ones(2, 4)

    iterator = iterate(batches(), LINEAR)
    next(iterator)
    assert asked == [0]
