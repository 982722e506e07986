"""Running on chosen kernels: the innermost choice counts, and nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.linear_cases import int8_arguments

from narrowcast import kernels
from narrowcast.errors import KernelError
from narrowcast.kernels import forced


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the ops whose reference body was called by choice."""
    names: list[str] = []

    def watched(name: str) -> kernels.Op:
        row = kernels.OPS[name]

        def body(*arguments: object) -> object:
            names.append(name)
            return row.reference(*arguments)

        return kernels.Op(row.name, row.schema, body, row.fake)

    monkeypatch.setattr(forced, "OPS", {name: watched(name) for name in kernels.OPS})
    return names


def test_the_reference_body_runs_where_it_is_chosen_and_nowhere_else(called: list[str]) -> None:
    arguments = int8_arguments(3, 5, 32)
    run = torch.ops.narrowcast.linear_int8_dynamic
    native = run(*arguments, False)
    assert called == []
    with kernels.running_on("reference"):
        chosen = run(*arguments, False)
        assert called == ["linear_int8_dynamic"]
        with kernels.running_on(None):
            run(*arguments, False)
        assert called == ["linear_int8_dynamic"], "the innermost choice counts"
    run(*arguments, False)
    assert called == ["linear_int8_dynamic"]
    assert torch.equal(native, chosen)


def test_a_tier_is_chosen_for_a_stretch_and_put_back_after_an_error() -> None:
    capability = kernels.capability()
    if capability.available["scalar"]:
        pytest.skip(capability.available["scalar"])
    with pytest.raises(ZeroDivisionError), kernels.running_on("scalar"):
        assert kernels.capability().isa == "scalar"
        raise ZeroDivisionError
    assert kernels.capability().isa == capability.isa


def test_unknown_kernels_are_refused_before_anything_runs() -> None:
    with pytest.raises(KernelError, match="choose from reference"), kernels.running_on("abacus"):
        raise AssertionError("must not run")
