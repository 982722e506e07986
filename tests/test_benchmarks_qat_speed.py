"""The machinery of `python -m benchmarks.qat speed`: what a step is, what it needs, how it is judged."""

from __future__ import annotations

import pytest
import torch
from benchmarks import qat_speed, qat_step
from benchmarks.peers_qat.formats import FORMATS, Format, exchange_, layers
from torch import nn


def _tool(ratio: float, memory: float) -> dict[str, object]:
    return {"ratio": ratio, "memory_ratio": memory}


def test_every_layer_is_exchanged_and_no_other_module() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Linear(4, 2)))
    assert [name for name, _ in layers(model)] == ["0", "2.0"]
    exchange_(model, lambda name, layer: nn.Identity())
    assert [type(part).__name__ for part in model.modules() if not list(part.children())] == [
        "Identity", "ReLU", "Identity",
    ]  # fmt: skip


def test_the_first_and_last_layer_keep_eight_bits() -> None:
    assert FORMATS["resnet20"]["W4A4 static"].of("conv1") == Format(8, 0, 8)
    assert FORMATS["resnet20"]["W4A4 static"].of("layer1.0.conv1") == Format(4, 0, 4)


def test_a_burst_has_two_steps_at_least_and_both_clocks() -> None:
    times = qat_step.milliseconds(lambda: None, 0.0)
    assert len(times["cpu_ms"]) == len(times["wall_ms"]) == 2


def test_memory_of_a_step_is_the_peak_of_its_tensors() -> None:
    weight = nn.Parameter(torch.zeros(1 << 20))  # 4 MiB
    optimizer = torch.optim.SGD([weight], lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        (weight * torch.ones(1 << 20) * 2.0).sum().backward()
        optimizer.step()

    found = qat_step.memory(step, optimizer)
    assert found["held"] >= 4
    assert 8 <= found["allocated"] <= 40


def test_narrowcast_is_judged_against_the_fastest_tool_that_runs() -> None:
    tools = {
        "narrowcast lsq": _tool(1.2, 1.1), "torch.ao": {"failed": "no ranges"}, "torchao": _tool(1.1, 1.4),
        "Brevitas": _tool(1.6, 2.0),
    }  # fmt: skip
    assert qat_speed._verdict(tools) == ("1.20: met", "1.10: met", "1.09 of torchao's time: missed")
    tools["torchao"] = _tool(1.3, 1.4)
    assert qat_speed._verdict(tools)[2] == "0.92 of torchao's time: met"


def test_a_tool_that_cannot_is_a_row_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert qat_step.main(["torch.ao", "minilm", "no such format"]) == 0
    assert "KeyError" in capsys.readouterr().out
