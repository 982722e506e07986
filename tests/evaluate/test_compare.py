"""compare puts everything into one record that prints, survives JSON, and says what it left out."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluate.models import classifier
from torch import nn

from narrowcast.errors import DataError, ModelError
from narrowcast.evaluate import Comparison, compare
from narrowcast.evaluate.process import ProcessMeasure

FACTORY = "tests.evaluate.models:classifier"


@dataclass
class QuantizedLike:
    """What nc.quantize returns, as far as compare looks."""

    model: nn.Module


@pytest.fixture(scope="module")
def data() -> Any:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, 16, generator=generator), torch.randint(0, 5, (64,), generator=generator)


@pytest.fixture(scope="module")
def comparison(data: Any) -> Comparison:
    candidate = copy.deepcopy(classifier())
    candidate[0].weight.data[0] += 0.5
    return compare(FACTORY, QuantizedLike(candidate), data, seconds=0.05, processes=1)


def test_all_parts_are_there(comparison: Comparison) -> None:
    assert comparison.score is not None
    assert comparison.outputs is not None
    assert comparison.reference.name == FACTORY
    assert comparison.candidate.name == "Sequential, quantized"
    assert comparison.reference.bytes_on_disk == comparison.candidate.bytes_on_disk > 4 * 1413
    assert comparison.reference.process.peak_bytes > comparison.reference.process.baseline_bytes > 0
    assert len(comparison.reference.latency.rounds) == len(comparison.candidate.latency.rounds)
    assert comparison.batch_samples == 32
    assert set(comparison.machine) == {"processor", "threads", "torch", "python"}


def test_what_was_left_out_is_said(comparison: Comparison) -> None:
    notes = "\n".join(comparison.notes)
    assert "load time and peak memory of the candidate: the model exists only in this process; pass a path" in notes
    assert "the reference was in training mode" not in notes  # a factory's model is put in eval mode
    assert "the candidate was in training mode and was compared in eval mode" in notes
    assert bool(comparison.energy_reason) == (comparison.reference.joules is None)


def test_json_gives_the_same_comparison(comparison: Comparison, tmp_path: Path) -> None:
    comparison.save_json(tmp_path / "comparison.json")
    assert Comparison.from_json((tmp_path / "comparison.json").read_text(encoding="utf-8")) == comparison
    assert comparison.outputs is not None
    endless = replace(comparison, outputs=replace(comparison.outputs, sqnr_db=float("inf")))
    assert json.loads(endless.to_json())["outputs"]["sqnr_db"] == "inf"
    assert Comparison.from_json(endless.to_json()) == endless


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"score": 3}'])
def test_foreign_json_is_an_error(text: str) -> None:
    with pytest.raises(DataError, match="comparison"):
        Comparison.from_json(text)


def test_the_table_shows_every_figure(comparison: Comparison) -> None:
    text = str(comparison)
    for part in ("top1 of 64 samples", "latency, batch of 32", "x as fast", "bytes on disk", "peak memory", "SQNR"):
        assert part in text
    assert "\x1b" not in text
    fast = replace(comparison.candidate, joules=0.5, process=ProcessMeasure(0.1, 0.2, 10**8, 10**7, 3))
    complete = replace(comparison, reference=replace(comparison.reference, joules=1.0), candidate=fast)
    assert "energy per call" in str(complete)
    assert "50.0 % of the reference" in str(complete)
    assert "top1" not in str(replace(comparison, score=None, outputs=None))


def test_the_models_are_left_as_they_were(data: Any) -> None:
    model = nn.Sequential(nn.Linear(16, 5), nn.Dropout(0.5))
    model[1].eval()
    before = copy.deepcopy(model.state_dict())
    compare(model, model, data, seconds=0.01)
    assert model.training
    assert model[0].training
    assert not model[1].training
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_what_is_no_model_is_refused(data: Any) -> None:
    with pytest.raises(ModelError, match=r"the reference is int; pass an nn\.Module"):
        compare(3, classifier(), data)


def test_a_checkpoint_of_an_own_architecture_is_loaded_into_a_copy_of_the_reference(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import narrowcast.export as export
    from narrowcast.errors import CheckpointError

    (tmp_path / "narrowcast.json").write_text("{}")
    loaded_into: list[Any] = []

    def load(directory: Any, into: nn.Module | None = None) -> nn.Module:
        loaded_into.append(into)
        if into is None:
            raise CheckpointError("pass the model's architecture as into=")
        return into

    monkeypatch.setattr(export, "load", load)
    reference = classifier()
    result = compare(reference, tmp_path, data, seconds=0.01, processes=0)
    assert len(loaded_into) == 2
    assert loaded_into[1] is not reference
    assert result.outputs is not None
    assert result.outputs.max_absolute == 0.0
    assert "load time and peak memory of the candidate: not asked for" in result.notes
    assert any("was loaded into a copy of the reference" in note for note in result.notes)
