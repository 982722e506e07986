"""The built-in loop: it trains, it can be killed at any moment, and it says what is wrong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.qat import fit_run
from tests.qat.fit_run import Noisy, accuracy, prepared, settings
from torch import Tensor, nn

import narrowcast as nc
from narrowcast.qat.early import Best
from narrowcast.qat.saved import FILE, Folder

RUN = str(Path(fit_run.__file__))


class StopError(Exception):
    """An interruption that a test makes."""


def run(work: Path | None = None, *, stop_after: int = 0, resume: bool = False, train: str = "lsq", **more: Any) -> Any:
    """(the trained model, what fit returned); None where it was stopped on the way."""
    evaluate, made_from = more.pop("evaluate", None), more.pop("made_from", None)
    teacher, model = prepared(train)

    def tell(now: nc.qat.Progress) -> None:
        if stop_after and now.step == stop_after:
            raise StopError

    try:
        fitted = nc.qat.fit(
            model, Noisy(), settings(**more), teacher=teacher, evaluate=evaluate, work=work, resume=resume, tell=tell,
            made_from=made_from,
        )  # fmt: skip
    except StopError:
        return None
    return model, fitted


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("train", ["lsq", "ste", "lsq+", "pact"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_that_was_interrupted_twice_ends_with_the_same_bits(tmp_path, train, optimizer):
    given = {"train": train, "optimizer": optimizer, "checkpoint_every": 2}
    whole, fitted = run(**given)
    assert run(tmp_path, stop_after=5, **given) is None
    assert run(tmp_path, stop_after=11, resume=True, **given) is None
    pieces, resumed = run(tmp_path, resume=True, **given)
    assert resumed.resumed == 10 and fitted.resumed is None
    assert same(whole.state_dict(), pieces.state_dict())
    assert resumed.health == fitted.health
    before = prepared(train)[1].state_dict()
    assert not torch.equal(before["0.weight"], whole.state_dict()["0.weight"])


def test_evaluation_and_writing_change_nothing_in_training():
    plain, _ = run()
    seen: list[float] = []

    def draws_numbers(model: nn.Module) -> float:
        seen.append(float(torch.rand(())) + random.random() + float(np.random.rand()))  # noqa: NPY002
        return len(seen)  # ever better: the last state is the best

    watched, _ = run(evaluate=draws_numbers, evaluate_every=1)
    assert len(seen) == 13
    assert same(plain.state_dict(), watched.state_dict())


def test_kill_9_and_resume_gives_the_same_weights(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    command = [sys.executable, RUN, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "4":  # in the middle of the second epoch; the next state may be half written
                process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pieces, fitted = run(tmp_path, resume=True, evaluate=accuracy, checkpoint_every=1)
        whole, plain = run(evaluate=accuracy)
    finally:
        torch.set_num_threads(threads)
    assert 4 <= fitted.resumed < 12
    assert fitted.scores == plain.scores
    assert same(whole.state_dict(), pieces.state_dict())
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_state_that_was_being_written_when_the_process_died_is_passed_over(tmp_path):
    assert run(tmp_path, stop_after=5, checkpoint_every=2) is None
    (tmp_path / f".{FILE}.12345").write_bytes((tmp_path / FILE).read_bytes()[:1000])
    _, fitted = run(tmp_path, resume=True, checkpoint_every=2)
    assert fitted.resumed == 4
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_failing_disk_leaves_the_old_state(tmp_path, monkeypatch):
    assert run(tmp_path, stop_after=3, checkpoint_every=2) is None
    before = (tmp_path / FILE).read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("narrowcast.qat.saved.save_file", full)
    with pytest.raises(nc.CheckpointError, match=r"cannot be written.*No space left"):
        run(tmp_path, resume=True, checkpoint_every=2)
    assert (tmp_path / FILE).read_bytes() == before


def test_an_unfinished_state_is_not_overwritten(tmp_path):
    assert run(tmp_path, stop_after=3, checkpoint_every=2) is None
    with pytest.raises(nc.CheckpointError, match="interrupted at step 2; go on from it with resume, or delete it"):
        run(tmp_path)
    assert run(tmp_path, resume=True)[1].resumed == 2
    assert run(tmp_path)[1].resumed is None  # that of a finished run is


@pytest.mark.parametrize(("name", "other"), [("model", "b"), ("recipe", "b"), ("training data", "b")])
def test_resuming_with_another_model_recipe_or_data_is_refused(tmp_path, name, other):
    made_from = {"model": "a", "recipe": "a", "training data": "a"}
    assert run(tmp_path, stop_after=3, checkpoint_every=2, made_from=made_from) is None
    with pytest.raises(nc.CheckpointError, match=f"trained with another {name}; go on with the same"):
        run(tmp_path, resume=True, made_from=made_from | {name: other})


def test_resuming_with_another_order_of_data_is_refused_and_another_rate_is_told(tmp_path):
    assert run(tmp_path, stop_after=3, checkpoint_every=2) is None
    with pytest.raises(nc.CheckpointError, match="was trained with seed 0, not 1"):
        run(tmp_path, resume=True, checkpoint_every=2, seed=1)
    _, fitted = run(tmp_path, resume=True, checkpoint_every=2, lr=0.001)
    assert "lr was 0.03 up to step 2 and is 0.001 from there" in fitted.notes


def test_a_finished_run_goes_on_with_more_epochs(tmp_path):
    run(tmp_path)
    _, fitted = run(tmp_path, resume=True, epochs=6)
    assert (fitted.resumed, fitted.steps) == (12, 18)


@pytest.mark.parametrize("content", [b"", b"no state", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_damaged_state_is_a_clear_error(tmp_path, content):
    (tmp_path / FILE).write_bytes(content)
    with pytest.raises(nc.CheckpointError, match="is no state of training or damaged"):
        run(tmp_path, resume=True)


def test_training_ends_in_its_best_state_and_stops_when_patience_ends():
    scores = iter([0.5, 0.7, 0.6, 0.6, 0.9])
    states: list[dict[str, Tensor]] = []

    def score(model: nn.Module) -> float:
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return next(scores)

    model, fitted = run(evaluate=score, patience=2)
    assert fitted.best == (0.7, 3) and fitted.stopped_early
    assert (fitted.steps, fitted.planned) == (9, 12)
    assert [step for step, _ in fitted.scores] == [0, 3, 6, 9]
    trained = [name for name in states[1] if not name.endswith("steps")]
    assert all(torch.equal(model.state_dict()[name], states[1][name]) for name in trained)


def test_early_stopping_is_resumed_where_it_was(tmp_path):
    whole, fitted = run(evaluate=accuracy, patience=1, checkpoint_every=1)
    for stop in (2, 4):
        run(tmp_path, stop_after=stop, resume=True, evaluate=accuracy, patience=1, checkpoint_every=1)
    pieces, resumed = run(tmp_path, resume=True, evaluate=accuracy, patience=1, checkpoint_every=1)
    assert (resumed.best, resumed.scores, resumed.steps) == (fitted.best, fitted.scores, fitted.steps)
    assert same(whole.state_dict(), pieces.state_dict())


def test_the_start_is_kept_and_can_be_converted_where_training_makes_it_worse():
    scores = iter([0.9, 0.1, 0.1, 0.1, 0.1])
    model, fitted = run(evaluate=lambda _: next(scores))
    assert fitted.best == (0.9, 0)
    quantized, x = nc.qat.convert(model), Noisy().images
    assert torch.equal(quantized.model(x), nc.quantize(fit_run.build(), RECIPE, [x], progress=False).model(x))


RECIPE = {"rule": [fit_run.RULE]}


def test_a_lower_score_can_be_the_better_one_and_nan_is_never():
    best, model = Best(higher=False, patience=None), nn.Linear(1, 1)
    for step, score in enumerate([2.0, 1.0, 3.0, float("nan")]):
        best.see(model, score, step)
    assert (best.score, best.step, best.since) == (1.0, 1, 2)


def test_a_loss_that_is_no_number_names_the_step_and_the_last_good_state(tmp_path):
    with pytest.raises(nc.ModelError) as caught:
        run(tmp_path, lr=1e30, optimizer="sgd", checkpoint_every=1)
    message = str(caught.value)
    assert "training has diverged" in message and "Lower the learning rate (1e+30)" in message
    kept = Folder(tmp_path, {}, settings())
    state = kept.read() if kept.path.exists() else None
    if state is not None:
        assert f"the last good state is of step {state.said['step']}, in {tmp_path}" in message
        assert all(torch.isfinite(value).all() for value in state.part("model").values() if value.is_floating_point())
    else:
        assert "no state was written before" in message


def test_ranges_have_a_learning_rate_of_their_own():
    def factors(**more: Any) -> list[Tensor]:
        return [p for name, p in run(**more)[0].named_parameters() if name.endswith("factor")]

    still, moved = factors(range_lr=1e-12), factors(range_lr=0.02)
    assert all(bool(((p - 1).abs() < 1e-6).all()) for p in still)
    assert any(bool(((p - 1).abs() > 1e-3).any()) for p in moved)
    with pytest.raises(nc.RecipeError, match="range_lr is a number above 0, got 0"):
        nc.qat.FitSettings(range_lr=0.0)
