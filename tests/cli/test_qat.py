"""`narrowcast qat`: the whole command on small models, and every message that a user may meet."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import narrowcast as nc

RECIPE = """
[[rule]]
weight = "int4/channel"
input = "uint8/tensor static:minmax"
method = "rtn"
"""
DECODER = """
import torch
from torch import nn

torch.manual_seed(0)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(16, 32)
        self.mix = nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, 16)

    def forward(self, ids):
        return self.head(self.mix(self.table(ids))[0])


def build():
    torch.manual_seed(0)
    return Decoder().eval()


def right(outputs, targets):
    return (outputs.argmax(-1) == targets).float()


def squared(outputs, targets):
    return (outputs.softmax(-1) - nn.functional.one_hot(targets, outputs.shape[-1])).square().mean()


def no_tensor(outputs, targets):
    return 1.0


def pairs_twice():
    return (row for row in [torch.zeros(2, 3, dtype=torch.long)])
"""


@pytest.fixture
def recipe(here: Path) -> str:
    (here / "w4.toml").write_text(RECIPE)
    return "w4.toml"


@pytest.fixture
def decoder(here: Path, request: pytest.FixtureRequest) -> str:
    """Name of a module with a language model of 16 tokens, and a file of sequences of different lengths."""
    name = f"decoder_{abs(hash(request.node.nodeid))}"
    (here / f"{name}.py").write_text(DECODER)
    request.addfinalizer(lambda: sys.modules.pop(name, None))
    rows = [{"ids": [(start + step) % 16 for step in range(4 + start % 3)]} for start in range(24)]
    (here / "ids.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return name


@pytest.fixture
def train(cli, project, recipe, images):
    """Run the command on the small convolutional net, with what is common to all tests."""

    def run(*more, data=images, out="out"):
        return cli("qat", f"{project}:build", "-r", recipe, "-d", data, "-o", out, "--batch-size", 8, *more)

    return run


def test_a_classifier_is_trained_saved_and_loaded(train, cli, project, images):
    answer = train("--eval-data", images, "--epochs", 3, "--lr", 0.01)
    assert answer.code == 0, answer.err
    assert "trained     18 steps" in answer.out and "saved to out" in answer.out
    assert "top1 of 48 samples" in answer.out and "post-training quantization" in answer.out
    assert "before training: top1" in answer.err and "step 18 of 18, mean loss" in answer.err
    assert "the state of training is in out.training" in answer.err
    compared = cli(
        "compare", f"{project}:build", "out", "-d", images, "-m", "top1", "--seconds", 0.05, "--processes", 0, "--json"
    ).json
    assert f"after      {100 * compared['score']['candidate']:.2f} %" in answer.out
    notes = json.loads(Path("out/narrowcast.json").read_text())["report"]["notes"]
    assert any("trained     18 steps" in note for note in notes)


def test_json_tells_machines_everything_and_nothing_else_is_printed(train, images):
    found = train("--eval-data", images, "--steps", 4, "--eval-every", 2, "--json").json
    assert [step for step, _ in found["scores"]] == [0, 2, 4]
    assert found["metric"]["name"] == "top1" and found["metric"]["samples"] == 48
    assert (found["steps"], found["planned"], found["resumed_from"]) == (4, 4, None)
    assert {row["layer"] for row in found["health"]} == {"conv", "head"}
    assert any("trained     4 steps" in note for note in found["report"]["notes"])


def test_quiet_prints_nothing_but_warnings(train):
    answer = train("--steps", 2, "--quiet")
    assert (answer.code, answer.out) == (0, "")
    assert all(line.startswith("warning:") for line in answer.err.splitlines())


def test_a_killed_command_is_resumed_with_the_same_weights(train, project, recipe, images, here):
    arguments = ["qat", f"{project}:build", "-r", recipe, "-d", str(images), "-o", "out", "--batch-size", "8"]
    more = ["--epochs", "8", "--lr", "0.01", "--checkpoint-every", "1", "--eval-data", str(images)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(part for part in sys.path if part),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # the same bits need as many threads
    }
    command = [sys.executable, "-m", "narrowcast.cli", *arguments, *more]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=here) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("step 12 "):
                process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert not (here / "out").exists()
    assert "interrupted at step" in train(*more).err
    resumed = train(*more, "--resume")
    assert resumed.code == 0 and "going on from step" in resumed.err
    assert train(*more, out="whole").code == 0
    same = [(here / place / "model.safetensors").read_bytes() for place in ("out", "whole")]
    assert same[0] == same[1]


def test_resuming_where_there_is_no_state_begins_and_says_so(train):
    answer = train("--steps", 2, "--resume")
    assert answer.code == 0 and "there is no state in out.training yet" in answer.err


def test_resuming_something_else_is_refused(train, images, here, recipe):
    assert train("--steps", 2).code == 0
    (here / recipe).write_text(RECIPE.replace("int4", "int3"))
    assert "trained with another recipe" in train("--steps", 2, "--resume").err
    (here / recipe).write_text(RECIPE)
    pixels = np.load(images)
    np.savez(here / "other.npz", images=pixels["images"][::-1], labels=pixels["labels"])
    assert "trained with another training data" in train("--steps", 2, "--resume", data="other.npz").err
    assert "trained with seed 0, not 3" in train("--steps", 2, "--resume", "--seed", 3).err
    more = train("--steps", 4, "--resume", "--lr", 0.001)
    assert more.code == 0
    assert "steps was 2 up to step 2 and is 4 from there" in more.err
    assert "lr was 0.0001 up to step 2 and is 0.001 from there" in more.err


def test_early_stopping_says_what_it_restored(train, images):
    answer = train("--eval-data", images, "--epochs", 9, "--patience", 1, "--lr", 1e-7, "--freeze-after", 0)
    assert answer.code == 0, answer.err
    assert "stopped early of 54" in answer.out
    assert "no evaluated state was better than the start" in answer.out


def test_a_language_model_learns_next_tokens_of_sequences_of_different_lengths(cli, decoder, recipe):
    common = ("-d", "ids.jsonl", "--eval-data", "ids.jsonl", "-o", "out", "--batch-size", 4, "--distill", 0)
    answer = cli("qat", f"{decoder}:build", "-r", "weight-int8", *common, "--epochs", 8, "--lr", 0.01, "--json")
    assert answer.code == 0, answer.err
    metric = answer.json["metric"]
    assert metric["name"] == "perplexity" and not metric["higher_is_better"]
    assert metric["after"] < 0.6 * metric["before"]


def test_token_ids_in_an_npz_are_a_language_models_data(cli, decoder, here):
    ids = (np.arange(12)[:, None] + np.arange(6)) % 16
    np.savez(here / "ids.npz", inputs=ids)
    answer = cli("qat", f"{decoder}:build", "-r", "weight-int8", "-d", "ids.npz", "-o", "out", "--steps", 2)
    assert answer.code == 0, answer.err


def test_images_without_labels_are_learned_from_the_float_model(train, here, images):
    np.save(here / "plain.npy", np.load(images)["images"])
    answer = train("--steps", 2, data="plain.npy")
    assert answer.code == 0
    assert "the training data has no labels: what is learned is the float model's output alone" in answer.err
    assert "training data has no targets" in train("--steps", 2, "--distill", 0, data="plain.npy", out="two").err


def test_a_folder_of_images_has_its_classes(train, here):
    image = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(0)
    for label in range(4):
        (here / "photos" / f"class{label}").mkdir(parents=True)
        for index in range(4):
            pixels = generator.integers(0, 256, (8, 8, 3), np.uint8)
            image.fromarray(pixels).save(here / "photos" / f"class{label}" / f"{index}.png")
    answer = train("--steps", 2, "--eval-data", "photos", data="photos")
    assert answer.code == 0, answer.err
    assert "top1 of 16 samples" in answer.out


def test_a_metric_and_a_loss_of_ones_own(train, decoder, images):
    own = ("--eval-data", images, "--metric", f"{decoder}:right", "--loss", f"{decoder}:squared", "--steps", 2)
    assert "add --goal higher or --goal lower" in train(*own).err
    answer = train(*own, "--goal", "higher", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["metric"]["name"] == "right"
    wrong = train("--loss", f"{decoder}:no_tensor", "--steps", 2, out="two")
    assert wrong.code == 2 and "return a scalar tensor with a gradient" in wrong.err


def test_a_loss_that_is_no_number_costs_no_file(train, here):
    (here / "out").mkdir()
    answer = train("--steps", 9, "--lr", 1e30, "--optimizer", "sgd", "--checkpoint-every", 1)
    assert answer.code == 2
    assert "training has diverged" in answer.err and "Lower the learning rate (1e+30)" in answer.err
    assert list((here / "out").iterdir()) == []


def test_what_is_saved_answers_as_what_was_trained(train, images, project, here):
    assert train("--steps", 6, "--lr", 0.01).code == 0
    sys.path.insert(0, str(here))
    try:
        module = __import__(project)
    finally:
        sys.path.remove(str(here))
    loaded = nc.load("out", module.build())
    assert any(type(part).__name__.startswith("Quantized") for part in loaded.modules())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--patience", 2), "--patience needs data to evaluate on; add --eval-data"),
        (("--metric", "top1"), "--metric needs data to evaluate on"),
        (("--eval-data", "{images}", "--metric", "top5"), "choose from top1, perplexity"),
        (("--eval-data", "{images}", "--metric", "perplexity"), "perplexity needs token ids"),
        (("--eval-data", "{images}", "--goal", "up"), "choose from higher, lower"),
        (("--eval-data", "none.npz"), "data 'none.npz' does not exist"),
        (("--calibration", "none.npz"), "data 'none.npz' does not exist"),
        (("--optimizer", "adam"), "no optimizer 'adam'; choose from adamw, sgd"),
        (("--lr", 0), "lr is a number above 0, got 0.0"),
        (("--lr", "nan"), "lr is a number above 0, got nan"),
        (("--loss", "nowhere:loss"), "cannot import 'nowhere:loss'"),
    ],
)
def test_bad_options_are_refused_before_the_work(train, images, here, more, words):
    answer = train("--steps", 1, *(str(part).replace("{images}", str(images)) for part in more))
    assert answer.code == 2, answer
    assert words in " ".join(answer.err.split())
    assert "calibrating" not in answer.err
    assert not (here / "out").exists() and not (here / "out.training").exists()


def test_bad_data_is_refused_before_the_work(train, images, project, here, refused, recipe, decoder):
    pixels = np.load(images)["images"]
    np.savez(here / "labels.npz", images=pixels, labels=np.full(48, 9))
    np.savez(here / "real.npz", images=pixels, labels=np.linspace(0, 1, 48))
    assert "targets torch.int64 [8] from 9 to 9, and the output is [8, 4]" in train(data="labels.npz").err
    assert "targets torch.float32 [8] from 0" in train("--distill", 0, data="real.npz").err
    assert "batch 0, element 1 holds nan" in train(data=f"{project}:nan_samples").err
    assert "read once" in train(data=f"{decoder}:pairs_twice").err
    (here / "keep.toml").write_text('[[rule]]\nkeep = "by wish"\n')
    said = refused("qat", f"{project}:build", "-r", "keep.toml", "-d", images, "-o", "out")
    assert "quantizes no layer" in said
    assert not (here / "out").exists()


def test_a_state_directory_that_is_a_file_is_not_touched(train, here):
    (here / "out.training").write_text("mine")
    answer = train("--steps", 1)
    assert answer.code == 2 and "is a file; name a directory" in answer.err
    assert (here / "out.training").read_text() == "mine"


def test_a_quantized_checkpoint_is_no_start(train, refused, images, recipe):
    assert train("--steps", 1).code == 0
    said = refused("qat", "out", "-r", recipe, "-d", images, "-o", "two")
    assert "training starts from the float model that it was made of" in said


def test_an_interruption_says_where_the_state_is(train, monkeypatch):
    def interrupted(self, now):
        if now.step == 2:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr("narrowcast.cli.qat_progress.TrainingProgress._where", interrupted)
    monkeypatch.setattr("narrowcast.cli.qat_progress._BETWEEN_LINES", -1.0)
    monkeypatch.setattr("narrowcast.cli.qat_progress.TrainingProgress._heard", lambda self, now: "")
    answer = train("--steps", 6, "--checkpoint-every", 1)
    assert answer.code == 130
    assert "the state of step 2 is in out.training: the same command with --resume goes on from there" in answer.err


def test_an_out_directory_with_other_files_is_not_touched(train, here):
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("mine")
    answer = train("--steps", 1)
    assert answer.code == 2 and "is not empty and no narrowcast checkpoint" in answer.err
    assert (here / "out" / "thesis.tex").read_text() == "mine"
