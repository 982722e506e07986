from __future__ import annotations

import json

import numpy as np
import pytest


def test_plan_tells_every_layer(cli, project):
    answer = cli("plan", f"{project}:build", "--recipe", "dynamic-int8")
    assert answer.code == 0
    assert "conv" in answer.out and "int8/channel" in answer.out
    planned = cli("plan", f"{project}:build", "-r", "W8A8", "--json").json
    assert {layer["layer"]: layer["outcome"] for layer in planned["layers"]}["head"] == "quantize"
    assert planned["bytes_after"] < planned["bytes_before"]


def test_plan_examines_data(cli, project, images):
    answer = cli("plan", f"{project}:build", "-r", "static-int8", "-d", images)  # of random pixels
    assert answer.code == 0, answer.err
    assert "warning    data: input 'x': neighbouring pixels are unrelated" in answer.out
    found = cli("plan", f"{project}:build", "-r", "static-int8", "-d", images, "--json").json["findings"]
    assert [row["topic"] for row in found] == ["noise"]


def test_quantize_prints_what_the_doctor_says_and_strict_refuses(cli, project, here):
    np.savez(here / "blank.npz", images=np.zeros((48, 8, 8, 3), np.uint8))
    common = ("quantize", f"{project}:build", "-r", "weight-int8", "-d", "blank.npz", "-o", "out")
    assert "severe     data: calibration data: 47 of 48 rows repeat an earlier one" in cli(*common).out
    answer = cli(*common, "--strict")
    assert answer.code == 2
    assert "the calibration data cannot be trusted" in " ".join(answer.err.split())


def test_quantize_then_inspect_compare_and_bench(cli, project, images):
    answer = cli("quantize", f"{project}:build", "-r", "static-int8", "-d", images, "-o", "out", "--report", "r.json")
    assert answer.code == 0, answer.err
    assert "saved to out" in answer.out
    assert json.loads((images.parent / "r.json").read_text())["totals"]["coverage"] == 1.0

    found = cli("inspect", "out", "--json").json
    assert {layer["layer"]: layer["spec"] for layer in found["layers"]}["head.weight"] == "int8/channel"
    assert cli("inspect", "out").out.count("int8/channel") == 2

    common = ("--seconds", "0.05", "--processes", "0", "--json")
    compared = cli("compare", f"{project}:build", "out", "-d", images, "-m", "top1", *common).json
    assert compared["score"]["samples"] == 48
    assert compared["outputs"]["sqnr_db"] > 20

    measured = cli("bench", f"{project}:build", "out", "-i", "2x3x8x8", *common).json
    assert [row["model"] for row in measured["models"]] == [f"{project}:build", "out"]
    assert measured["models"][1]["speedup"]["value"] > 0
    shown = cli("bench", f"{project}:build", "-d", images, *common[:4])
    assert shown.code == 0 and "samples/s" in shown.out


def test_quantize_writes_finished_blocks_and_errors_per_layer(cli, project, images, here):
    (here / "blocks.toml").write_text('sequential = true\n[[rule]]\nweight = "int8/channel"\n')
    arguments = (
        "quantize",
        f"{project}:build",
        "-r",
        "blocks.toml",
        "-d",
        images,
        "--work",
        "work",
        "--report",
        "r.json",
    )
    assert cli(*arguments, "-o", "out").code == 0
    written = sorted(path.name for path in (here / "work").iterdir())
    assert written == ["block-0000.safetensors", "block-0001.safetensors"]
    rows = [row for row in json.loads((here / "r.json").read_text())["layers"] if row["spec"]]
    assert all([error["step"] for error in row["errors"]] == ["rtn absmax", "rtn"] for row in rows)
    assert cli(*arguments, "-o", "again").code == 0
    same = [(here / place / "model.safetensors").read_bytes() for place in ("out", "again")]
    assert same[0] == same[1]
    refused = cli("quantize", f"{project}:build", "-r", "weight-int8", "-d", images, "--work", "work", "-o", "third")
    assert refused.code == 2 and "sequential" in refused.err


def test_quiet_quantize_prints_nothing(cli, project):
    answer = cli("quantize", f"{project}:build", "-r", "weight-int8", "-o", "out", "--quiet")
    assert (answer.code, answer.out, answer.err) == (0, "", "")


def test_json_leaves_only_json_on_standard_output(cli, project):
    answer = cli("quantize", f"{project}:build", "-r", "weight-int8", "-o", "out", "--json")
    assert answer.json["report"]["totals"]["quantized_parameters"] > 0


def test_a_contract_that_is_not_met_ends_with_one_and_leaves_nothing(cli, project, here):
    (here / "half.toml").write_text('[[rule]]\nlayers = "head"\nkeep = "by wish"\n[[rule]]\nweight = "int8/channel"\n')
    answer = cli("quantize", f"{project}:build", "-r", "half.toml", "-o", "out", "--min-coverage", "0.999")
    assert answer.code == 1, answer
    assert "error:" in answer.err and "coverage" in answer.err
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("{p}:build", "-r", "int9", "-o", "out"), "neither a preset"),
        (("{p}:build", "-r", "none.toml", "-o", "out"), "none.toml"),
        (("{p}:build", "-r", "static-int8", "-o", "out"), "calibration"),
        (("{p}:build", "-r", "static-int8", "-d", "{p}:nan_samples", "-o", "out"), "nan"),
        (("{p}:build", "-r", "static-int8", "-d", "{p}:misshapen", "-o", "out"), "channels"),
        (("{p}:build", "-r", "static-int8", "-d", "{p}:nothing", "-o", "out"), "nothing"),
        (("{p}:build", "-r", "static-int8", "-d", "none.npz", "-o", "out"), "none.npz"),
        (("{p}:poisoned", "-r", "dynamic-int8", "-o", "out"), "head"),
        (("{p}:failing", "-r", "dynamic-int8", "-o", "out"), "no disk"),
        (("{p}:samples", "-r", "dynamic-int8", "-o", "out"), "samples"),
        (("{p}:number", "-r", "dynamic-int8", "-o", "out"), "number"),
        (("{p}:absent", "-r", "dynamic-int8", "-o", "out"), "absent"),
        (("no_such_module:build", "-r", "dynamic-int8", "-o", "out"), "no_such_module"),
        (("nowhere", "-r", "dynamic-int8", "-o", "out"), "nowhere"),
        (("{p}:build", "-r", "dynamic-int8", "-o", "{p}.py"), "is a file"),
        (("{p}:build", "-r", "dynamic-int8", "-o", "."), "not empty"),
        (("{p}:build", "-r", "dynamic-int8", "-o", "out", "--report", "no/such/folder/r.json"), "--report"),
        (("{p}:build", "-r", "static-int8", "-d", "{p}:samples", "--limit", "3", "-o", "out"), "--limit"),
    ],
)
def test_bad_input_to_quantize_is_one_message(refused, project, here, arguments, words):
    message = refused("quantize", *(argument.format(p=project) for argument in arguments))
    assert words in message
    assert not (here / "out").exists()


def test_compare_refuses_unknown_metrics_and_models(refused, project, images):
    assert "bleu" in refused("compare", f"{project}:build", f"{project}:build", "-d", images, "-m", "bleu")
    assert "nowhere" in refused("compare", f"{project}:build", "nowhere", "-d", images)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--input"),
        (("-i", "1x3x8x8", "-d", "images.npz"), "--input"),
        (("-i", "1x3x"), "SHAPE"),
        (("-i", "1x3x8x8:float99"), "float99"),
        (("-i", "0x3x8x8"), "values"),
        (("-i", "1x5x8x8"), "cannot answer"),
        (("-i", "99999x99999x99999"), "values"),
    ],
)
def test_bench_refuses_inputs_that_are_none(refused, project, images, arguments, words):
    assert words in refused("bench", f"{project}:build", *arguments, "--processes", "0")


def test_a_checkpoint_without_architecture_asks_for_one(cli, refused, project):
    cli("quantize", f"{project}:build", "-r", "weight-int8", "-o", "out", "-q")
    assert "float model before it" in refused("bench", "out", "-i", "1x3x8x8", "--processes", "0")


def test_a_damaged_checkpoint_is_refused(cli, refused, project, here):
    cli("quantize", f"{project}:build", "-r", "weight-int8", "-o", "out", "-q")
    weights = here / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    refused("inspect", "out")
    refused("bench", f"{project}:build", "out", "-i", "1x3x8x8", "--processes", "0")


def test_a_quantized_model_is_not_quantized_again(cli, refused, project, images, here):
    (here / "second.py").write_text(
        f"import narrowcast as nc, {project}\ndef load():\n    return nc.load('out', into={project}.build())\n"
    )
    cli("quantize", f"{project}:build", "-r", "weight-int8", "-o", "out", "-q")
    assert "quantized already" in refused("plan", "second:load", "-r", "weight-int8")


def test_a_metric_of_ones_own_is_imported(cli, project, images, here):
    (here / "mine.py").write_text("def spread(model):\n    return float(model.head.bias.detach().float().std())\n")
    result = cli(
        "compare", f"{project}:build", f"{project}:build", "-d", images, "-m", "mine:spread", "--seconds", "0.02",
        "--processes", "0", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert result.json["score"]["name"] == "spread"


def test_size_of_a_factory_counts_its_tensors(cli, project):
    answer = cli("size", f"{project}:build", "--json").json
    assert answer["parameters"] == 8 * 27 + 8 + 4 * 8 + 8 * 4 + 4  # running statistics included
    assert np.isclose(answer["formats"][0]["total"], answer["parameters"] * 4 + 8)
