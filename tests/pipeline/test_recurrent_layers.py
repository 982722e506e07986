"""Recurrent layers are solved by what multiplies each of their weights, hidden states included."""

from __future__ import annotations

import pytest
import torch
from tests.pipeline import block_methods
from tests.pipeline.block_methods import NOTEBOOK
from tests.pipeline.models import example

import narrowcast as nc
from narrowcast.methods import METHODS
from narrowcast.models.recurrent_inputs import inner_inputs


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "sees_only_hessian", block_methods.METHODS["sees_only_hessian"])
    NOTEBOOK.__init__()  # type: ignore[misc]


def test_the_weights_of_a_recurrent_stack_are_solved_by_what_multiplies_them() -> None:
    model, x = example("lstm")
    with torch.no_grad():
        found = inner_inputs(model.memory, (model.table(x),), {})
    rule = [{"layers": "table", "keep": "float inputs"}, {"weight": "int8/channel", "method": "sees_only_hessian"}]
    result = nc.quantize(model, {"name": "test", "rule": rule}, x, progress=False)
    rows = {row.layer: row for row in result.report.layers}
    assert len(found) == 4
    for name, seen in zip(found, NOTEBOOK.seen, strict=False):
        vectors = found[name].double()
        assert seen is not None and seen.hessian is not None
        torch.testing.assert_close(seen.hessian.double(), vectors.t() @ vectors / len(vectors), rtol=1e-4, atol=1e-6)
        assert rows[f"memory.{name}"].method == "sees_only_hessian, error weighted by input magnitude"
        assert rows[f"memory.{name}"].errors[1].output_error is not None


@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_solving_leaves_less_error_than_rounding_at_every_weight_of_a_stack(method: str) -> None:
    model, x = example("lstm")
    rule = [{"layers": "table", "keep": "float inputs"}, {"weight": "int3/channel", "method": method}]
    report = nc.quantize(model, {"name": "test", "rule": rule}, x, progress=False).report
    rows = [row for row in report.layers if row.layer.startswith("memory.")]
    assert len(rows) == 4 and not any(row.outcome == "fell back" for row in rows)
    if method == "gptq":
        for row in rows:
            rounded, solved = (error.output_error for error in row.errors)
            assert rounded is not None and solved is not None and solved < rounded, row.layer
