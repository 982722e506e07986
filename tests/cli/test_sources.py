from __future__ import annotations

import io
import json
import pickle
import zipfile

import pytest
import torch
from torch import nn

from narrowcast.cli.exported import check_exported
from narrowcast.cli.sources import open_model
from narrowcast.errors import ModelError


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "pytorch_model.bin", "model.ckpt"])
@pytest.mark.parametrize("command", ["plan", "size"])
def test_pickled_models_are_refused(refused, tmp_path, name, command):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    extra = ("-r", "weight-int8") if command == "plan" else ()
    assert "pickle" in refused(command, tmp_path / name, *extra)


def test_a_directory_with_pickled_weights_only_is_refused(refused, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert "pickle" in refused("plan", tmp_path, "-r", "weight-int8")


def test_bare_weights_say_what_to_give_instead(refused, tmp_path, weights):
    assert "without a model" in refused("plan", weights, "-r", "weight-int8")


def test_a_hugging_face_directory_is_planned_without_its_weights(cli, tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**shape, vocab_size=50, architectures=["BertModel"])
    config.save_pretrained(tmp_path)
    planned = cli("plan", tmp_path, "-r", "dynamic-int8", "--json")
    assert planned.code == 0, planned.err
    assert any(layer["shape"] == [32, 16] for layer in planned.json["layers"])
    assert cli("size", tmp_path, "--json").json["parameters"] > 50 * 16


def test_a_broken_configuration_is_one_message(refused, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "no-such-model"}')
    assert "no-such-model" in refused("plan", tmp_path, "-r", "weight-int8")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    torch.export.save(torch.export.export(model, (torch.ones(3, 4),), dynamic_shapes=dynamic), path)
    return path


def test_quantizing_an_exported_program_says_that_it_has_no_modules(refused, exported, tmp_path):
    message = refused("quantize", exported, "-r", "weight-int8", "-o", tmp_path / "out")
    assert "no modules" in message
    assert not (tmp_path / "out").exists()


def changed(exported, tmp_path, member, content):
    """A copy of the archive with one member replaced or added."""
    path = tmp_path / "model.pt2"
    with zipfile.ZipFile(exported) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if not name.endswith(member):
                new.writestr(name, old.read(name))
        new.writestr(f"model/{member}", content)
    return path


class Evil:
    def __reduce__(self):
        return print, ("the pickle ran",)


def test_an_exported_program_opens(exported):
    assert open_model(str(exported)).model(torch.ones(2, 4)).shape == (2, 3)


@pytest.mark.parametrize(
    "member",
    ["data/sample_inputs/model.pt", "data/weights/model.pt", "data/constants/model.pt", "data/aotinductor/model/x.so"],
)
def test_pickles_and_machine_code_in_an_archive_never_run(exported, tmp_path, capsys, member):
    path = changed(exported, tmp_path, member, pickle.dumps(Evil()))
    with pytest.raises(ModelError, match=r"pickle|compiled"):
        open_model(str(path))
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["weights", "constants"])
@pytest.mark.parametrize(
    "entry",
    [
        {"path_name": "weight_0", "use_pickle": True},
        {"path_name": "opaque_obj_0", "use_pickle": False},
        {"path_name": "custom_obj_0", "use_pickle": False},
        {"path_name": "weight_0"},
        "weight_0",
    ],
)
def test_payloads_that_torch_would_unpickle_are_refused(exported, tmp_path, kind, entry):
    config = json.dumps({"config": {"x": entry}})
    path = changed(exported, tmp_path, f"data/{kind}/model_{kind}_config.json", config)
    with pytest.raises(ModelError, match="pickle"):
        check_exported(path)


@pytest.mark.parametrize(
    "document",
    [
        {"target": "torch.os.system"},
        {"target": "torch.ops.load_library"},
        {"target": "torch.ops.load_library.__func__.__call__"},
        {"target": "torch.load"},
        {"target": "_operator.methodcaller"},
        {"expr_str": "__import__('os').system('true')"},
        {"expr_str": "open(a)"},
        {"expr_str": "a.b.c"},
        {"expr_str": "(lambda: 1)()"},
        {"guards_code": ["L['x'].__class__.__mro__ == 1"]},
        {"guards_code": ["exec(L['x'])"]},
    ],
)
def test_graphs_that_do_more_than_operators_are_refused(exported, tmp_path, document):
    path = changed(exported, tmp_path, "models/model.json", json.dumps({"graph": [document]}))
    with pytest.raises(ModelError, match=r"no operator|arithmetic|compare sizes"):
        check_exported(path)


def test_what_is_no_archive_is_refused(refused, tmp_path, exported):
    (tmp_path / "a.pt2").write_bytes(b"no zip")
    assert "torch.export" in refused("plan", tmp_path / "a.pt2", "-r", "weight-int8")
    (tmp_path / "b.pt2").write_bytes(exported.read_bytes()[:900])
    refused("plan", tmp_path / "b.pt2", "-r", "weight-int8")
    buffer = io.BytesIO()
    torch.save({"x": 1}, buffer)
    (tmp_path / "c.pt2").write_bytes(buffer.getvalue())
    refused("plan", tmp_path / "c.pt2", "-r", "weight-int8")
