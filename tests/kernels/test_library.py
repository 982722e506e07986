"""The native library as a file: one for all torch >= 2.10 and all Python, and safe on processors without vectors."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from narrowcast import kernels

BUILD = Path(__file__).parents[2] / "build" / "native" / "CMakeFiles" / "narrowcast_kernels.dir" / "csrc"
TIER_SUFFIX = re.compile(rf"_({'|'.join(kernels.TIERS[1:])}|avxvnni_evex)\.cpp\.o$")

pytestmark = pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm of binutils")


def symbols(path: Path, *options: str) -> list[tuple[str, str]]:
    """(letter, demangled name) of every symbol."""
    text = subprocess.run(["nm", "-C", *options, str(path)], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^(?:[0-9a-f]+)?\s+([A-Za-z]) (.+)$", text, re.MULTILINE)


def test_the_library_uses_only_torchs_stable_c_functions_and_no_python() -> None:
    library = kernels.capability().library
    if library is None:
        pytest.skip("no native library")
    wanted = [name for _, name in symbols(Path(library), "-D", "--undefined-only")]
    assert any(name.startswith("aoti_torch_") for name in wanted)
    assert not [name for name in wanted if re.search(r"\b(at|c10|torch|caffe2)::|^_?Py", name)]


def test_no_tier_object_offers_inline_functions_to_the_rest() -> None:
    # The linker may take any copy of an inline function: one compiled for a newer processor would crash older ones.
    objects = [path for path in BUILD.glob("*.o") if TIER_SUFFIX.search(path.name)]
    if not objects:
        pytest.skip("no build tree: the library was not built by `make native`")
    shared = {
        path.name: [name for letter, name in symbols(path, "--defined-only") if letter in "WVu"] for path in objects
    }
    assert not {name: found for name, found in shared.items() if found}
