"""Which instruction set runs, how it is forced, and what happens without the native library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from narrowcast import kernels
from narrowcast.errors import KernelError
from narrowcast.kernels.op import lower_tiers

PROGRAM = "from narrowcast import kernels; print(kernels.kernel_name('linear_int8_dynamic'))"


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    source = Path(kernels.__file__).parents[2]
    path = os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_capability_names_every_tier_and_reads_well() -> None:
    capability = kernels.capability()
    assert tuple(capability.available) == kernels.TIERS
    assert capability.available["scalar"] == ""
    assert capability.available[capability.isa] == ""
    assert capability.isa in str(capability) and "threads" in str(capability)


def test_kernel_name_follows_the_tier(tier: str) -> None:
    assert kernels.capability().isa == tier
    for name, row in kernels.OPS.items():
        expected = next(lower for lower in lower_tiers(tier) if lower in row.tiers)
        assert kernels.kernel_name(name) in (f"{name}[{expected}]", f"{name}[reference: no native body]")


def test_a_tier_of_another_processor_family_says_so() -> None:
    available = kernels.capability().available
    foreign = [tier for tier in kernels.TIERS if "processor" in available[tier]]
    assert foreign in (["neondot", "neoni8mm"], ["avx2", "avxvnni", "avx512vnni"])
    with pytest.raises(KernelError, match="cannot run here: it is for"):
        kernels.set_isa(foreign[0])


def test_a_better_tier_that_is_not_used_is_explained() -> None:
    made = kernels.Capability(
        isa="avx2",
        available={"scalar": "", "avx2": "", "avxvnni": "the CPU has no AVX-VNNI", "avx512vnni": ""},
        forced="avx2",
        library="lib.so",
        threads=1,
        notes={"avx512vnni": "slowly"},
    )
    assert made.states == {
        "scalar": "available",
        "avx2": "in use",
        "avxvnni": "the CPU has no AVX-VNNI",
        "avx512vnni": "available (slowly), not used: NARROWCAST_ISA=avx2",
    }


def test_lower_tiers_stay_in_their_processor_family() -> None:
    assert lower_tiers("neoni8mm") == ("neoni8mm", "neondot", "scalar")
    assert lower_tiers("avx512vnni") == ("avx512vnni", "avxvnni", "avx2", "scalar")
    assert lower_tiers("scalar") == ("scalar",)


def test_an_unknown_tier_is_an_error() -> None:
    with pytest.raises(KernelError, match="no instruction-set tier 'sse9'"):
        kernels.set_isa("sse9")


def test_the_environment_forces_a_tier() -> None:
    done = run(PROGRAM, NARROWCAST_ISA="scalar")
    assert done.returncode == 0 and done.stdout.strip() == "linear_int8_dynamic[scalar]", done.stderr


def test_an_unknown_tier_in_the_environment_is_an_error() -> None:
    done = run(PROGRAM, NARROWCAST_ISA="sse9")
    assert done.returncode != 0 and "KernelError: no instruction-set tier 'sse9'" in done.stderr


def test_without_the_library_the_reference_runs_and_says_so_once() -> None:
    program = (
        "import warnings; from narrowcast.kernels import capability as _; import sys\n"
        "import narrowcast.kernels as k; print(k.kernel_name('linear_int8_dynamic'), k.capability().isa)"
    )
    hide = "import pathlib; pathlib.Path.is_file = lambda self: False\n"
    done = run(hide + program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "linear_int8_dynamic[reference: no native library] reference"
    assert done.stderr.count("RuntimeWarning: narrowcast runs on its slow reference kernels") == 1
