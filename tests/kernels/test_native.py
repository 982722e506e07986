"""The torch-free kernel tests: Arm tiers under emulation, this machine's tiers under the sanitizers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "native" / "run.py"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["arm", "sanitize"])
def test_every_tier_equals_the_scalar_tier(kind: str) -> None:
    done = subprocess.run([sys.executable, RUN, kind], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "DIFFERENT" not in done.stdout and "recurrent" in done.stdout


def test_a_missing_tool_is_named_with_its_package() -> None:
    done = subprocess.run(
        [sys.executable, RUN, "arm"], env={"PATH": "/nowhere"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 3
    assert "qemu-aarch64" in done.stderr and "apt install" in done.stderr and "qemu-user" in done.stderr
