"""Two processes under torchrun train what one process trains with the same global batch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.qat.prepared import prepared

import narrowcast as nc

SCRIPT = Path(__file__).with_name("parallel_run.py")
ROOT = SCRIPT.parents[2]


def run(command: list[str]) -> None:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "ddp cut", "fsdp cut"])
def test_two_processes_give_the_ranges_and_integers_of_one(kind: str, tmp_path: Path) -> None:
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    alone, together = tmp_path / "one.pt", tmp_path / "two.pt"
    run([sys.executable, str(SCRIPT), str(alone), kind])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run([*launcher, str(SCRIPT), str(together), kind])
    one, two = torch.load(alone, weights_only=True), torch.load(together, weights_only=True)
    assert one.keys() == two.keys()
    for name in one:
        if name.endswith("codes"):
            assert torch.equal(one[name], two[name]), name
        else:
            torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-4)


def test_ranges_are_averaged_where_there_are_processes_only() -> None:
    model, _ = prepared("tied", "int4/channel", None)
    with pytest.raises(nc.ModelError, match=r"torch.distributed is not initialized; call init_process_group"):
        nc.qat.sync_ranges(model)
