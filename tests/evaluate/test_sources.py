"""A model that is named is opened the way its kind is, or refused with what would be accepted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from narrowcast.errors import ModelError
from narrowcast.evaluate.sources import kind, open_into, open_model, prepare

MODELS = "tests.evaluate.models"


def test_a_factory_is_called_and_its_model_is_in_eval_mode() -> None:
    model = open_model(f"{MODELS}:classifier")
    assert isinstance(model, nn.Sequential)
    assert not model.training


def test_an_exported_program_is_opened(tmp_path: Path) -> None:
    inputs = torch.randn(2, 16)
    model = open_model(f"{MODELS}:classifier")
    torch.export.save(torch.export.export(model, (inputs,)), tmp_path / "model.pt2")
    assert kind(tmp_path / "model.pt2") == "exported"
    torch.testing.assert_close(open_model(tmp_path / "model.pt2")(inputs), model(inputs))


def test_a_hugging_face_directory_is_opened_as_float32(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertForMaskedLM(config).bfloat16().save_pretrained(tmp_path)
    assert kind(tmp_path) == "huggingface"
    prepare(tmp_path)
    model = open_into(tmp_path, None)
    assert type(model).__name__ == "BertForMaskedLM"
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ModelError, match="transformers cannot open"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/place", "does not exist: a narrowcast checkpoint, a Hugging Face directory"),
        ("no_such_module:factory", "cannot import 'no_such_module:factory'"),
        (f"{MODELS}:no_such_function", "cannot import"),
        (f"{MODELS}:NOT_A_FUNCTION", "is int, not a function"),
        ("builtins:dict", "returned no nn.Module"),
    ],
)
def test_what_is_no_model_is_refused(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        open_model(source)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="is none of these"):
        kind(tmp_path / "weights.bin")
