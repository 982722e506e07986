"""Scores, their choice and the output difference equal what is computed by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from tests.evaluate.models import LanguageModel, classifier
from torch import Tensor, nn

from narrowcast.core import cosine, sqnr_db
from narrowcast.data import Pairs
from narrowcast.errors import DataError, ModelError
from narrowcast.evaluate.judge import Judged, judge


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def noisy(model: nn.Module, amount: float = 0.02) -> nn.Module:
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter += amount * torch.randn_like(parameter)
    return copied


def run(reference: nn.Module, candidate: nn.Module, data: Any, metric: Any = None) -> tuple[Any, Any, Judged]:
    judged = judge(reference, candidate, data, metric)
    return judged.score, judged.outputs, judged


def test_top1_agreement_and_distances_equal_those_of_all_outputs_at_once() -> None:
    reference = classifier()
    candidate, inputs, labels = noisy(reference), torch.randn(100, 16), torch.randint(0, 5, (100,))
    score, outputs, judged = run(reference, candidate, (inputs, labels))
    a, b = reference(inputs), candidate(inputs)
    assert score.name == "top1"
    assert score.reference == pytest.approx(float((a.argmax(1) == labels).double().mean()))
    assert score.candidate == pytest.approx(float((b.argmax(1) == labels).double().mean()))
    assert score.difference.low <= score.difference.value <= score.difference.high
    assert outputs.sqnr_db == pytest.approx(sqnr_db(a, b))
    assert outputs.cosine == pytest.approx(cosine(a, b))
    assert outputs.max_absolute == pytest.approx(float((a - b).abs().max()))
    assert outputs.mean_absolute == pytest.approx(float((a - b).abs().mean()))
    assert outputs.agreement.value == pytest.approx(float((a.argmax(1) == b.argmax(1)).double().mean()))
    assert outputs.values == 500
    assert judged.first.samples == 32
    assert "metric: top-1 accuracy, as the targets are class labels" in judged.notes


def test_the_result_does_not_depend_on_the_batches() -> None:
    reference = classifier()
    candidate, inputs, labels = noisy(reference), torch.randn(60, 16), torch.randint(0, 5, (60,))
    parts = [(inputs[i : i + 7], labels[i : i + 7]) for i in range(0, 60, 7)]
    whole, divided = (judge(reference, candidate, data).score for data in ([(inputs, labels)], parts))
    assert whole == divided


def test_a_model_against_itself_is_equal_but_not_certain() -> None:
    reference = classifier()
    score, outputs, judged = run(reference, reference, (torch.randn(100, 16), torch.randint(0, 5, (100,))))
    assert (score.difference.value, outputs.sqnr_db, outputs.max_absolute) == (0.0, math.inf, 0.0)
    assert outputs.agreement.value == 1.0
    assert 0.95 < outputs.agreement.low < 1.0  # Clopper and Pearson: 100 equal answers do not prove all equal
    assert any("up to 3 % may be" in note for note in judged.notes)


def test_perplexity_leaves_out_padding_and_weighs_by_tokens() -> None:
    reference, ids = LanguageModel(), torch.randint(0, 7, (6, 9))
    lengths = torch.tensor([9, 5, 3, 9, 2, 1])
    mask = (torch.arange(9) < lengths[:, None]).long()
    score, outputs, _ = run(reference, noisy(reference, 0.5), [{"input_ids": ids, "attention_mask": mask}])
    losses = [
        F.cross_entropy(reference.embed(row[: n - 1]), row[1:n], reduction="sum")
        for row, n in zip(ids, lengths.tolist(), strict=True)
        if n > 1
    ]
    expected = math.exp(float(sum(losses)) / float((lengths - 1).sum()))
    assert score.name == "perplexity"
    assert score.reference == pytest.approx(expected, rel=1e-6)
    assert score.samples == 5  # a sequence of one token predicts nothing
    assert score.per == "sequence"
    assert score.ratio.value == pytest.approx(score.candidate / score.reference)
    assert outputs.values == int(lengths.sum()) * 7


def test_perplexity_uses_labels_where_they_are_given() -> None:
    model, ids = LanguageModel(), torch.randint(0, 7, (4, 6))
    labels = ids.clone()
    labels[:, :3] = -100
    score, _, _ = run(model, model, [{"input_ids": ids, "labels": labels}])
    loss = F.cross_entropy(model.embed(ids[:, 2:-1]).transpose(1, 2), ids[:, 3:])
    assert score.reference == pytest.approx(math.exp(float(loss)), rel=1e-6)


def test_segmentation_counts_pixels_and_skips_ignored_ones() -> None:
    reference = nn.Conv2d(3, 4, 1)
    inputs, labels = torch.randn(5, 3, 6, 6), torch.randint(0, 4, (5, 6, 6))
    labels[:, 0] = -100
    score, _, _ = run(reference, noisy(reference), [(inputs, labels)])
    right = reference(inputs).argmax(1) == labels
    assert score.reference == pytest.approx(float(right[:, 1:].double().mean()))
    assert score.samples == 5


def test_spearman_of_pairs_equals_scipys() -> None:
    reference = nn.Linear(8, 6)
    candidate, scores = noisy(reference, 0.1), torch.rand(50).tolist()
    first, second = torch.randn(50, 8), torch.randn(50, 8)
    score, outputs, _ = run(reference, candidate, Pairs(first, second, scores))
    for model, value in ((reference, score.reference), (candidate, score.candidate)):
        similarity = F.cosine_similarity(model(first).double(), model(second).double())
        assert value == pytest.approx(spearmanr(similarity.numpy(), scores).statistic)
    assert (score.per, score.samples) == ("pair", 50)
    assert outputs.agreement is None
    both = torch.cat([first, second])
    assert outputs.cosine == pytest.approx(cosine(reference(both), candidate(both)))


def test_without_targets_the_difference_is_the_metric() -> None:
    reference, inputs = classifier(), torch.randn(10, 16)
    candidate = noisy(reference)
    score, _, judged = run(reference, candidate, inputs)
    assert score.name == "difference"
    assert score.reference == 0.0
    assert score.candidate == pytest.approx(float((reference(inputs) - candidate(inputs)).abs().mean()))
    assert any("pass metric= for another" in note for note in judged.notes)


def test_a_function_of_outputs_and_targets_is_resampled() -> None:
    def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean(1)

    reference, inputs, targets = nn.Linear(3, 2), torch.randn(20, 3), torch.randn(20, 2)
    score, _, _ = run(reference, noisy(reference), (inputs, targets), squared_error)
    assert score.name == "squared_error"
    assert score.reference == pytest.approx(float(F.mse_loss(reference(inputs), targets)))
    assert score.difference.low < score.difference.high


def test_one_number_per_batch_is_resampled_by_batch() -> None:
    def mean_output(outputs: Tensor, targets: None) -> float:
        return float(outputs.mean())

    reference = nn.Linear(3, 2)
    score, _, _ = run(reference, noisy(reference), torch.randn(80, 3), mean_output)
    assert (score.per, score.samples) == ("batch", 3)


def test_a_function_of_the_model_has_no_interval() -> None:
    reference = classifier()
    score, _, judged = run(reference, reference, torch.randn(4, 16), lambda model: 7.0)
    assert (score.reference, score.difference.value, score.difference.low) == (7.0, 0.0, None)
    assert any("no interval" in note for note in judged.notes)


def test_a_callable_that_returns_outputs_is_compared_by_them() -> None:
    reference, inputs = classifier(), torch.randn(4, 16)
    _, outputs, _ = run(reference, noisy(reference), lambda model: model(inputs))
    assert outputs.values == 20
    nothing = judge(reference, reference, lambda model: None)
    assert nothing.outputs is None
    with pytest.raises(DataError, match="the data is a callable, so top1 gets no samples"):
        judge(reference, reference, lambda model: None, "top1")


def test_a_generator_is_enough_for_one_comparison() -> None:
    reference = classifier()
    score, _, _ = run(reference, reference, (torch.randn(4, 16) for _ in range(3)))
    assert score.samples == 12


def test_agreement_can_be_the_metric() -> None:
    reference, inputs = classifier(), torch.randn(40, 16)
    score, outputs, _ = run(reference, noisy(reference, 0.2), inputs, "agreement")
    assert score.reference == 1.0
    assert score.candidate == outputs.agreement.value


def test_infinities_of_the_reference_are_no_difference() -> None:
    class Masking(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.masked_fill(torch.tensor([False, True]), -torch.inf)

    assert judge(Masking(), Masking(), torch.randn(4, 2)).outputs.max_absolute == 0.0  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_candidate_that_is_not_finite_is_an_error(value: float) -> None:
    reference = nn.Linear(2, 2)
    candidate = copy.deepcopy(reference)
    candidate.bias.data[1] = value
    with pytest.raises(ModelError, match=r"batch 0: the candidate's output is not finite at \[0, 1\]"):
        judge(reference, candidate, torch.randn(3, 2))


def test_models_that_answer_in_other_shapes_are_an_error() -> None:
    with pytest.raises(ModelError, match=r"shape \[3, 2\], the candidate's \[3, 1\]"):
        judge(nn.Linear(2, 2), nn.Linear(2, 1), torch.randn(3, 2))


@pytest.mark.parametrize(
    ("data", "metric", "message"),
    [
        (torch.randn(3, 16), "accuracy", "there is no metric 'accuracy'; choose from top1, perplexity"),
        (torch.randn(3, 16), "spearman", "spearman needs pairs"),
        (torch.randn(3, 16), "top1", "top1 needs integer class labels"),
        (torch.randn(3, 16), "perplexity", "perplexity needs token ids"),
        (Pairs(torch.randn(3, 16), torch.randn(3, 16), [1, 2]), None, "3 and 3 samples and 2 scores"),
        (Pairs(torch.randn(3, 16), torch.randn(3, 16), [1, 1, 1]), None, "Spearman correlation is undefined"),
        (Pairs(torch.randn(3, 16), torch.randn(3, 16), [1, 2, 3]), "top1", "Pairs are judged by Spearman"),
        ((torch.randn(3, 16), torch.full((3,), -100)), "top1", "every label or token is masked"),
    ],
)
def test_a_metric_that_does_not_fit_the_data_is_an_error(data: Any, metric: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        judge(classifier(), classifier(), data, metric)


def test_kept_statistics_are_plain_numbers() -> None:
    score, outputs, _ = run(classifier(), classifier(), torch.randn(5, 16))
    assert type(score.reference) is float
    assert type(outputs.cosine) is float
    assert not isinstance(score.difference.low, np.floating)
