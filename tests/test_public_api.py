"""The public face: exactly the names of the design, and an import that costs little."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import pytest

import narrowcast as nc

NAMES = {
    "plan", "quantize", "compare", "verify", "save", "load", "export", "kernels", "qat",
    "Plan", "Quantized", "Comparison", "Parity", "Report", "Recipe", "Rule",
    "NarrowcastError", "FormatError", "RecipeError", "ModelError", "DataError", "CheckpointError", "KernelError",
    "ContractError", "__version__",
}  # fmt: skip


def test_the_public_names_are_these() -> None:
    assert set(nc.__all__) == NAMES
    assert all(hasattr(nc, name) for name in NAMES)


def test_signatures_are_those_of_the_design() -> None:
    def names(function: object) -> list[str]:
        return [
            f"*{name}" if parameter.kind is parameter.KEYWORD_ONLY else name
            for name, parameter in inspect.signature(function).parameters.items()  # type: ignore[arg-type]
        ]

    assert names(nc.plan) == ["model", "recipe"]
    quantize = ["model", "recipe", "data", "*strict", "*min_coverage", "*inplace", "*progress", "*resume"]
    assert names(nc.quantize) == quantize
    assert names(nc.compare)[:4] == ["reference", "candidate", "data", "metric"]
    assert names(nc.verify) == ["reference", "artefact", "data", "*tolerance", "*kernels", "*into"]
    assert names(nc.save) == ["quantized", "directory", "*form"]
    assert names(nc.load)[:2] == ["directory", "into"]
    defaults = {name: p.default for name, p in inspect.signature(nc.quantize).parameters.items()}
    del defaults["model"], defaults["recipe"]
    plain = {"data": None, "strict": False, "min_coverage": 0.0, "inplace": False, "progress": True, "resume": None}
    assert defaults == plain


@pytest.mark.parametrize("name", sorted(name for name in NAMES if name[0] != "_" and name not in ("kernels", "qat")))
def test_every_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(nc, name))


def test_every_error_is_of_one_family() -> None:
    errors = [getattr(nc, name) for name in NAMES if name.endswith("Error")]
    assert all(issubclass(error, nc.NarrowcastError) for error in errors)


def test_kernels_say_what_runs() -> None:
    capability = nc.kernels.capability()
    assert capability.isa and str(capability)


def test_importing_is_light_and_quiet() -> None:
    program = (
        "import sys, narrowcast; "
        "heavy = {'transformers', 'tokenizers', 'onnx', 'onnxruntime', 'sklearn', 'scipy.optimize', 'torch._dynamo'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    path = os.pathsep.join(part for part in sys.path if part)
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning", "-c", program], capture_output=True, text=True, check=True,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
    if "reference" not in nc.kernels.kernel_name("linear_int8_dynamic"):  # else it warns, as it should
        assert done.stderr == ""
