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


FACTORY = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def build():
    torch.manual_seed(0)
    return Net().eval()


def poisoned():
    model = build()
    with torch.no_grad():
        model.head.weight[1, 2] = float("nan")
    return model


def failing():
    raise RuntimeError("no disk")


def samples():
    torch.manual_seed(1)
    return [torch.randn(4, 3, 8, 8) for _ in range(2)]


def nan_samples():
    return [torch.full((4, 3, 8, 8), float("nan"))]


def misshapen():
    return [torch.randn(4, 5, 8, 8)]


number = 3
"""


@pytest.fixture
def project(here: Path, request: pytest.FixtureRequest) -> str:
    """Name of a module in the current directory with a model and its data; a fresh name for every test."""
    import sys

    name = f"project_{abs(hash(request.node.nodeid))}"
    (here / f"{name}.py").write_text(FACTORY)
    request.addfinalizer(lambda: sys.modules.pop(name, None))
    return name


@pytest.fixture
def images(here: Path) -> Path:
    """48 8-bit images with labels."""
    import numpy as np

    generator = np.random.default_rng(0)
    path = here / "images.npz"
    np.savez(path, images=generator.integers(0, 256, (48, 8, 8, 3), np.uint8), labels=generator.integers(0, 4, 48))
    return path
