"""Running a command as the console would, without a new process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from typer.testing import CliRunner

from narrowcast.cli.app import app


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    monkeypatch.delenv("NARROWCAST_DEBUG", raising=False)

    def run(*arguments: Any) -> Answer:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
        assert "Traceback" not in result.output
        return Answer(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def refused(cli: Callable[..., Answer]) -> Callable[..., str]:
    """Run a command that must end with exit code 2 and one message, which is returned."""

    def run(*arguments: Any) -> str:
        answer = cli(*arguments)
        assert answer.code == 2, answer
        assert answer.err.count("error:") == 1, answer.err
        return " ".join(answer.err.split())

    return run


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A safetensors file with a matrix, a vector and a counter."""
    import torch

    tensors = {"fc.weight": torch.ones(6, 10), "fc.bias": torch.zeros(6), "steps": torch.tensor([3])}
    path = tmp_path / "tiny.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return path


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory."""
    monkeypatch.chdir(tmp_path)
    assert Path(os.getcwd()) == tmp_path.resolve()  # noqa: PTH109 - what the command sees
    return tmp_path
