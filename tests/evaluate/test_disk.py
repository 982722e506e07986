"""Bytes on disk equal what safetensors really writes, and files are counted once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save, save_file
from torch import nn

from narrowcast.evaluate.disk import file_bytes, safetensors_bytes, state_bytes


def test_the_size_is_that_of_the_real_file() -> None:
    tensors = {
        "b.weight": torch.randn(3, 5),
        "a": torch.ones(2, dtype=torch.int8),
        "scalar": torch.tensor(1.0),
        "empty": torch.ones(0, 3, dtype=torch.bfloat16),
        "größe": torch.ones(7, dtype=torch.int64),
    }
    assert safetensors_bytes(tensors) == len(save(tensors))
    assert safetensors_bytes({}) == len(save({}))


def test_the_state_of_a_model_counts_tied_weights_once() -> None:
    embedding, head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    size, counted = state_bytes(model)
    assert size == len(save({"0.weight": embedding.weight}))
    assert counted == "the state as one safetensors file"


def test_two_layers_that_start_in_one_storage_are_two_tensors() -> None:
    both = torch.randn(4, 3)
    model = nn.Module()
    model.register_buffer("first", both[:2])
    model.register_buffer("second", both[2:])
    assert state_bytes(model)[0] == len(save({"first": both[:2].clone(), "second": both[2:].clone()}))


def test_state_that_is_no_tensor_is_measured_as_torch_saves_it(tmp_path: Path) -> None:
    class Packed(nn.Module):
        def get_extra_state(self) -> dict[str, int]:
            return {"zero_point": 3}

    model = nn.Sequential(nn.Linear(30, 20), Packed())
    size, counted = state_bytes(model)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert size == pytest.approx((tmp_path / "state.pt").stat().st_size, rel=0.2)
    assert "torch.save" in counted


def test_of_several_formats_in_a_directory_one_is_counted(tmp_path: Path) -> None:
    save_file({"w": torch.ones(10)}, tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x" * 5000)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert file_bytes(tmp_path) == (size, "model.safetensors")
    (tmp_path / "narrowcast.json").write_text("{}")
    assert file_bytes(tmp_path) == (size + 2, "model.safetensors, narrowcast.json")
    assert file_bytes(tmp_path / "narrowcast.json") == (2, "the file")
