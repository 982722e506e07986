"""An interrupted run goes on where it stopped, with the same result; what does not belong to it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline import block_methods
from tests.pipeline.block_methods import NOTEBOOK
from tests.pipeline.models import example
from tests.pipeline.test_sequential import assert_same_model, build, recipe

import narrowcast as nc
from narrowcast.errors import CheckpointError, RecipeError
from narrowcast.methods import METHODS


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, method in block_methods.METHODS.items():
        monkeypatch.setitem(METHODS, name, method)
    NOTEBOOK.__init__()  # type: ignore[misc]


def solved_so_far() -> int:
    return len(NOTEBOOK.weights) + len(NOTEBOOK.blocks)


def described(result: nc.Quantized) -> list[Any]:
    """All of the report that is not time."""
    return [(r.layer, r.outcome, r.reason, r.method, r.input, r.errors, r.notes) for r in result.report.layers]


@pytest.mark.parametrize("method", ["sees_only_hessian", "sees_block"])
@pytest.mark.parametrize("given", ["", "uint8/channel static:minmax"])
@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, method: str, given: str, stop: int) -> None:
    options = {"weight": "int8/channel"} | ({"input": given} if given else {})
    for model, data in (build(), example("cnn")):
        NOTEBOOK.__init__()  # type: ignore[misc]
        whole = nc.quantize(model, recipe(method, **options), data, progress=False)
        needed, place = solved_so_far(), tmp_path / type(model).__name__
        NOTEBOOK.__init__(fail_at=stop)  # type: ignore[misc]
        with pytest.raises(KeyboardInterrupt):
            nc.quantize(model, recipe(method, **options), data, progress=False, resume=place)
        finished = len(list(place.iterdir()))
        assert finished >= (1 if method == "sees_block" else 0)
        NOTEBOOK.__init__()  # type: ignore[misc]
        resumed = nc.quantize(model, recipe(method, **options), data, progress=False, resume=place)
        assert solved_so_far() <= needed and (solved_so_far() < needed) == (finished > 0)
        assert_same_model(whole.model, resumed.model)
        assert described(whole) == described(resumed)


def test_a_finished_run_is_only_read_again(tmp_path: Path) -> None:
    model, data = build()
    first = nc.quantize(model, recipe("sees_hessian"), data, progress=False, resume=tmp_path)
    NOTEBOOK.__init__(fail_at=0)  # type: ignore[misc]
    again = nc.quantize(model, recipe("sees_hessian"), data, progress=False, resume=tmp_path)
    assert_same_model(first.model, again.model)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"block-000{i}.safetensors" for i in range(1, 5)]


@pytest.mark.parametrize("other", ["recipe", "model", "data"])
def test_blocks_of_another_run_are_refused_by_what_differs(tmp_path: Path, other: str) -> None:
    model, data = build()
    nc.quantize(model, recipe("sees_hessian"), data, progress=False, resume=tmp_path)
    rules = recipe("sees_hessian", "int3/channel" if other == "recipe" else "int4/channel")
    if other == "model":
        with torch.no_grad():
            model.layers[2].down.weight[0, 0] += 1
    if other == "data":
        data = data[:-1]
    with pytest.raises(CheckpointError, match=f"written for another {other};.*give another directory") as caught:
        nc.quantize(model, rules, data, progress=False, resume=tmp_path)
    assert "block-0001" in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    model, data = build()
    nc.quantize(model, recipe("sees_hessian"), data, progress=False, resume=tmp_path)
    path = tmp_path / "block-0002.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "text": b"hello" * 50}[damage])
    with pytest.raises(CheckpointError, match=r"block-0002.safetensors.*damaged.*delete it"):
        nc.quantize(model, recipe("sees_hessian"), data, progress=False, resume=tmp_path)
    path.unlink()
    nc.quantize(model, recipe("sees_hessian"), data, progress=False, resume=tmp_path)


def test_a_file_in_the_way_of_the_directory_is_refused(tmp_path: Path) -> None:
    model, data = build()
    (tmp_path / "taken").write_text("x")
    with pytest.raises(CheckpointError, match="taken"):
        nc.quantize(model, recipe("sees_hessian"), data, progress=False, resume=tmp_path / "taken")


def test_a_recipe_without_blocks_has_nothing_to_resume() -> None:
    model, data = build()
    with pytest.raises(RecipeError, match="sequential = true"):
        nc.quantize(model, "weight-int8", data, progress=False, resume="anywhere")
    assert not Path("anywhere").exists()
