from __future__ import annotations

import json

import pytest

FAULTY = """
import copy
import torch
from torch import nn

torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()


def build():
    return copy.deepcopy(NET)


def other():
    model = build()
    with torch.no_grad():
        model[2].weight[1, 1] += 1
    return model


def stranger():
    return nn.ModuleDict({"body": nn.Linear(6, 4)}).eval()


def samples():
    return [torch.randn(8, 6) for _ in range(2)]
"""


@pytest.fixture
def faulty(here):
    (here / "faulty_project.py").write_text(FAULTY)
    return "faulty_project"


def test_models_that_are_equal_end_with_zero(cli, faulty):
    answer = cli("verify", f"{faulty}:build", f"{faulty}:build", "-d", f"{faulty}:samples")
    assert answer.code == 0, answer.err
    assert "parity holds: 3 layers and the output are equal bit for bit" in " ".join(answer.out.split())


def test_a_faulty_layer_is_named_and_ends_with_one(cli, faulty):
    answer = cli("verify", f"{faulty}:build", f"{faulty}:other", "-d", f"{faulty}:samples")
    assert answer.code == 1
    told = " ".join(answer.out.split())
    assert "parity does not hold" in told and "stored differently: 1 of 32 in weight" in told
    assert "Traceback" not in answer.err and "error:" not in answer.err
    answer = cli("verify", f"{faulty}:build", f"{faulty}:other", "-d", f"{faulty}:samples", "--json")
    assert answer.code == 1 and answer.json["first_difference"] == "2" and answer.json["ok"] is False


def test_a_float_and_a_quantized_model_hold_under_a_tolerance(cli, project, images):
    made = cli("quantize", f"{project}:build", "-r", "static-int8", "-d", images, "-o", "out")
    assert made.code == 0, made.err
    bare = cli("verify", f"{project}:build", "out", "-d", images)
    assert bare.code == 1 and "say what they may differ by" in " ".join(bare.out.split())
    assert cli("verify", f"{project}:build", "out", "-d", images, "--tolerance", "20dB", "--quiet").code == 0
    assert cli("verify", f"{project}:build", "out", "-d", images, "--tolerance", "80dB").code == 1
    values = json.loads(cli("verify", f"{project}:build", "out", "-d", images, "--json").out)
    assert {layer["layer"] for layer in values["layers"]} >= {"conv", "head"}
    assert values["samples"] == 48


def test_the_reference_kernels_can_be_asked_for(cli, faulty):
    arguments = ("verify", f"{faulty}:build", f"{faulty}:build", "-d", f"{faulty}:samples", "--kernels")
    assert cli(*arguments, "reference").code == 0
    answer = cli(*arguments, "fastest")
    assert answer.code == 2 and "choose from reference" in " ".join(answer.err.split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{p}:build", "nowhere", "-d", "{p}:samples"), "nowhere"),
        (("{p}:build", "{p}:build", "-d", "none.npz"), "none.npz"),
        (("{p}:build", "{p}:build", "-d", "{p}:samples", "--tolerance", "much"), "tolerance 'much' is not known"),
        (("{p}:build", "{p}:stranger", "-d", "{p}:samples"), "have no layer of the same name"),
    ],
)
def test_what_cannot_be_verified_ends_with_two_and_one_message(refused, faulty, arguments, words):
    assert words in refused("verify", *(part.format(p=faulty) for part in arguments))


def test_a_float_onnx_file_is_verified_against_the_quantized_one(cli, here):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnx_ir", reason="onnx-ir is not installed")
    import numpy as np
    from tests.onnx_files.graphs import residual_network

    onnx.save(residual_network(), here / "float.onnx")
    np.savez(here / "data.npz", x=np.random.default_rng(0).normal(size=(16, 3, 12, 12)).astype(np.float32))
    made = cli("quantize", "float.onnx", "-r", "static-int8", "-d", "data.npz", "-o", "small.onnx")
    assert made.code == 0, made.err
    answer = cli("verify", "float.onnx", "small.onnx", "-d", "data.npz", "--tolerance", "20dB")
    assert answer.code == 0, answer.err + answer.out
    answer = cli("verify", "float.onnx", "small.onnx", "-d", "data.npz", "--tolerance", "70dB", "--json")
    assert answer.code == 1 and answer.json["first_beyond"] == "stem"
