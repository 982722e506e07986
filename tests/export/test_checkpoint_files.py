from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from narrowcast.errors import CheckpointError
from narrowcast.export import checkpoint_files, load, read_description, save
from narrowcast.export.checkpoint_files import staged, write_weights
from narrowcast.export.checkpoint_schema import DTYPES

Quantizer = Callable[..., Any]


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_every_dtype_is_written_as_safetensors_reads_it(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        str(dtype): torch.randint(0, 2, (3, 5), generator=generator, dtype=torch.uint8).to(dtype) for dtype in DTYPES
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "strided": torch.arange(12.0).view(3, 4).t()}
    tensors |= {"conjugate": torch.tensor([1 + 2j]).conj(), "large": torch.randn(64, 7, generator=generator)}
    entry = write_weights(tmp_path / "file", tensors)
    read = load_file(tmp_path / "file")
    assert entry["bytes"] == (tmp_path / "file").stat().st_size
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert read[name].to(torch.complex64).equal(tensor.to(torch.complex64)), name


def test_an_earlier_checkpoint_is_replaced(tmp_path: Path, quantized: Quantizer) -> None:
    first, second = quantized(linear()), quantized(linear())
    save(first, tmp_path / "out")
    open_model = load(tmp_path / "out", linear())
    save(second, tmp_path / "out")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["model.safetensors", "narrowcast.json"]
    assert load(tmp_path / "out", linear())[0].weight_codes.equal(second.model[0].weight_codes)
    assert open_model[0].weight_codes.equal(first.model[0].weight_codes), "an open mapping outlives the replacement"


def test_a_damaged_checkpoint_can_be_replaced(tmp_path: Path, quantized: Quantizer) -> None:
    save(quantized(linear()), tmp_path / "out")
    (tmp_path / "out/narrowcast.json").write_text("{")
    save(quantized(linear()), tmp_path / "out")
    read_description(tmp_path / "out")


def test_an_empty_directory_and_missing_parents_are_fine(tmp_path: Path, quantized: Quantizer) -> None:
    (tmp_path / "empty").mkdir()
    save(quantized(linear()), tmp_path / "empty")
    save(quantized(linear()), str(tmp_path / "a/b/c"))
    assert names(tmp_path / "a/b") == ["c"]


def test_a_link_to_a_checkpoint_stays_a_link(tmp_path: Path, quantized: Quantizer) -> None:
    save(quantized(linear()), tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    saved = quantized(linear())
    save(saved, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert load(tmp_path / "real", linear())[0].weight_codes.equal(saved.model[0].weight_codes)


def test_a_directory_with_anything_else_is_never_touched(tmp_path: Path, quantized: Quantizer) -> None:
    saved = quantized(linear())
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="not a narrowcast checkpoint"):
        save(saved, tmp_path / "mine")
    save(saved, tmp_path / "out")
    (tmp_path / "out/notes.txt").write_text("keep me")
    with pytest.raises(CheckpointError, match=r"also holds \['notes\.txt'\]"):
        save(saved, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="there is a file"):
        save(saved, tmp_path / "file")
    assert names(tmp_path) == ["file", "mine", "out"]
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Interrupted()])
@pytest.mark.parametrize("step", ["write_bytes", "rename", "fsync"])
def test_a_failure_leaves_neither_half_a_checkpoint_nor_loses_the_old_one(
    error: BaseException, step: str, tmp_path: Path, quantized: Quantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = quantized(linear())
    save(first, tmp_path / "out")
    calls: list[int] = []

    def fail(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if step == "rename" and len(calls) != 2:  # the second: the old one is already aside
            return original(*arguments, **options)
        raise error

    owner: Any = os if step == "fsync" else Path
    original = getattr(owner, step)
    with monkeypatch.context() as patch:
        patch.setattr(owner, step, fail)
        with pytest.raises(Interrupted if isinstance(error, Interrupted) else CheckpointError):
            save(quantized(linear()), tmp_path / "out")
    assert calls and names(tmp_path) == ["out"]
    assert load(tmp_path / "out", linear(), verify=True)[0].weight_codes.equal(first.model[0].weight_codes)


def test_a_failure_in_the_block_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), staged(tmp_path / "out") as staging:
        (staging / "half").write_text("written")
        raise ZeroDivisionError
    assert names(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write everywhere")
def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path, quantized: Quantizer) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(quantized(linear()), tmp_path / "locked/out")


def test_a_file_as_parent_is_an_error(tmp_path: Path, quantized: Quantizer) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(quantized(linear()), tmp_path / "file/out")


def test_the_digest_of_a_large_file_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 9)
    whole = checkpoint_files.file_sha256(tmp_path / "file")
    monkeypatch.setattr(checkpoint_files, "_HASH_CHUNK", 100)
    assert checkpoint_files.file_sha256(tmp_path / "file") == whole
