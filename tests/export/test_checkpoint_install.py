"""Models that a checkpoint does not fit: named, and left as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from narrowcast.errors import CheckpointError
from narrowcast.export import load, save

Quantizer = Callable[..., Any]


def test_the_checkpoint_of_a_shared_module_does_not_fit_separate_ones_of_another_shape(
    tmp_path: Path, quantized: Quantizer
) -> None:
    linear = nn.Linear(8, 8)
    save(quantized(nn.Sequential(linear, linear)), tmp_path / "out")
    with pytest.raises(CheckpointError, match="1: Linear of"):
        load(tmp_path / "out", nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 9)))


def test_a_model_that_shares_what_was_saved_apart_is_refused(tmp_path: Path, quantized: Quantizer) -> None:
    save(quantized(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8))), tmp_path / "out")
    norm = nn.LayerNorm(8)
    with pytest.raises(CheckpointError, match="shares this tensor"):
        load(tmp_path / "out", nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), norm, norm))
    block = nn.Sequential(nn.Linear(8, 8))
    save(quantized(nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8)))), tmp_path / "two")
    with pytest.raises(CheckpointError, match="shares this module"):
        load(tmp_path / "two", nn.Sequential(block, block))


def test_a_convolution_of_another_geometry_is_refused(tmp_path: Path, quantized: Quantizer) -> None:
    save(quantized(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))), tmp_path / "out")
    with pytest.raises(CheckpointError, match="0: Conv2d of"):
        load(tmp_path / "out", nn.Sequential(nn.Conv2d(4, 4, 3, padding=0)))


def test_a_meta_tensor_that_the_checkpoint_cannot_fill_is_named(
    tmp_path: Path, quantized: Quantizer, small: Any
) -> None:
    save(quantized(small()), tmp_path / "out")
    with torch.device("meta"):
        into = small()
        into.extra = torch.zeros(3)
    with pytest.raises(CheckpointError, match="extra: the model has this tensor"):
        load(tmp_path / "out", into)


@pytest.mark.parametrize("change, message", [
    (lambda model: setattr(model, "norm", nn.LayerNorm(13)), r"norm\.weight: shape \[13\] in the model, \[12\]"),
    (lambda model: setattr(model, "norm", nn.Identity()), r"norm\.weight: the checkpoint has this tensor"),
    (lambda model: setattr(model, "body", nn.Identity()), r"body\.0: nothing in the model, Linear in the checkpoint"),
    (lambda model: model.body.append(nn.PReLU()), r"body\.3\.weight: the model has this tensor"),
    (lambda model: model.body.__setitem__(0, nn.ReLU()), r"body\.0: ReLU in the model, Linear in the checkpoint"),
    (lambda model: model.body.__setitem__(0, nn.Linear(12, 25)), r"body\.0: Linear of \[25, 12\] in the model"),
    (lambda model: setattr(model, "table", nn.Linear(12, 20)), r"table: .*Linear.* in the model"),
    (lambda model: setattr(model, "shift", torch.zeros(12, dtype=torch.int64)), r"shift: dtype torch\.int64"),
])  # fmt: skip
def test_another_architecture_is_named_and_left_untouched(
    change: Callable[[Any], Any], message: str, tmp_path: Path, quantized: Quantizer, small: Any
) -> None:
    save(quantized(small()), tmp_path / "out")
    into = small()
    change(into)
    before = {name: (id(tensor), tensor.clone()) for name, tensor in into.state_dict(keep_vars=True).items()}
    types = [type(module) for module in into.modules()]
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "out", into.train())
    assert [type(module) for module in into.modules()] == types and into.training
    for name, tensor in into.state_dict(keep_vars=True).items():
        assert id(tensor) == before[name][0] and torch.equal(tensor, before[name][1])


def test_a_long_list_of_differences_is_cut(tmp_path: Path, quantized: Quantizer) -> None:
    save(quantized(nn.Sequential(*[nn.Linear(3, 3) for _ in range(20)])), tmp_path / "out")
    with pytest.raises(CheckpointError, match="and 14 more"):
        load(tmp_path / "out", nn.Sequential(*[nn.ReLU() for _ in range(20)]))


def test_without_an_architecture_the_error_says_what_to_pass(tmp_path: Path, quantized: Quantizer, small: Any) -> None:
    save(quantized(small()), tmp_path / "out")
    with pytest.raises(CheckpointError, match="pass the model's architecture as into="):
        load(tmp_path / "out")
