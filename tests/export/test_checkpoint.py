from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from narrowcast.errors import CheckpointError
from narrowcast.export import load, read_description, save, source_hash
from narrowcast.nn import MODULES, FoldedBatchNorm, InstalledModule, QuantizedConv, QuantizedEmbedding, QuantizedLinear

Quantizer = Callable[..., Any]


def outputs_of(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    with torch.no_grad():
        result = model(*inputs)
    flat: list[Tensor] = []
    pending = [result]
    while pending:
        value = pending.pop(0)
        if isinstance(value, Tensor):
            flat.append(value)
        elif value is not None:
            pending += list(value.values() if hasattr(value, "values") else value)
    return flat


def assert_same_model(a: nn.Module, b: nn.Module, *inputs: Tensor) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype and torch.equal(tensor, second[name]), name
    assert [type(m) for m in a.modules()] == [type(m) for m in b.modules()]
    for x, y in zip(outputs_of(a, *inputs), outputs_of(b, *inputs), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("spec, activation", [
    ("int8/channel", "int8/token"), ("int4/group32", "int8/token"), ("int4/group32/asym", None), ("int8/channel", None),
    ("fp16", "fp16"), ("bf16", "bf16"), ("nf4/group32", None), ("fp8_e4m3/channel", None), ("int3/group16", None),
])  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_round_trip_is_bit_exact(
    spec: str, activation: str | None, device: str, tmp_path: Path, quantized: Quantizer, small: Any, indices: Tensor
) -> None:
    saved = quantized(small(), spec, activation)
    save(saved, tmp_path / "out")
    with torch.device(device):
        into = small()
    loaded = load(tmp_path / "out", into, verify=True)
    assert loaded is into and not loaded.training
    assert_same_model(saved.model, loaded, indices)


def test_what_is_not_persistent_is_restored_too(
    tmp_path: Path, quantized: Quantizer, small: Any, indices: Tensor
) -> None:
    model = small()
    model.positions, model.gain = model.positions + 3, model.gain * 2
    saved = quantized(model)
    save(saved, tmp_path / "out")
    loaded = load(tmp_path / "out", small())
    assert torch.equal(loaded.positions, model.positions) and torch.equal(loaded.gain, model.gain)
    assert "positions" not in loaded.state_dict()
    assert_same_model(saved.model, loaded, indices)


def test_derived_tensors_are_not_on_disk(tmp_path: Path, quantized: Quantizer, small: Any) -> None:
    save(quantized(small()), tmp_path / "out")
    names = load_file(tmp_path / "out/model.safetensors").keys()
    assert not [name for name in names if "kernel" in name]
    assert {"table.weight_codes", "body.0.bias", "norm.weight", "positions", "shift", "gain"} <= names


def test_tied_weights_lie_on_disk_once_and_stay_tied(tmp_path: Path, quantized: Quantizer) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 50, bias=False))
        model[1].weight = model[0].weight
        return model

    saved = quantized(build())
    save(saved, tmp_path / "out")
    assert read_description(tmp_path / "out")["aliases"]["1.weight_codes"] == "0.weight_codes"
    loaded = load(tmp_path / "out", build())
    assert isinstance(loaded[0], QuantizedEmbedding) and isinstance(loaded[1], QuantizedLinear)
    assert loaded[0].weight_codes is loaded[1].weight_codes
    assert_same_model(saved.model, loaded, torch.tensor([[1, 2, 49]]))


def test_tied_parameters_that_are_kept_stay_one_parameter(tmp_path: Path, quantized: Quantizer) -> None:
    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4))
        model[2].weight = model[1].weight
        return model

    save(quantized(build()), tmp_path / "out")
    loaded = load(tmp_path / "out", nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.LayerNorm(4)))
    assert loaded[1].weight is loaded[2].weight


def test_a_shared_module_stays_shared(tmp_path: Path, quantized: Quantizer) -> None:
    def build() -> nn.Module:
        block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
        linear = nn.Linear(8, 8)
        return nn.Sequential(block, linear, block, linear)

    saved = quantized(build())
    save(saved, tmp_path / "out")
    assert read_description(tmp_path / "out")["modules"]["3"] == {"same_as": "1"}
    loaded = load(tmp_path / "out", build())
    assert loaded[1] is loaded[3] and loaded[0] is loaded[2]
    assert_same_model(saved.model, loaded, torch.randn(3, 8))


RECURRENT_WEIGHTS = tuple(f"recurrent.weight_{s}_l{n}{d}" for s in ("ih", "hh") for n in "01" for d in ("", "_reverse"))


class Tagger(nn.Module):
    def __init__(self, cell: str = "LSTM") -> None:
        super().__init__()
        self.recurrent = getattr(nn, cell)(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0])


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
@pytest.mark.parametrize("keep", [(), RECURRENT_WEIGHTS])
def test_recurrent_stacks_round_trip(cell: str, keep: tuple[str, ...], tmp_path: Path, quantized: Quantizer) -> None:
    saved = quantized(Tagger(cell), keep=keep)
    save(saved, tmp_path / "out")
    with torch.device("meta"):
        into = Tagger(cell)
    loaded = load(tmp_path / "out", into)
    assert_same_model(saved.model, loaded, torch.randn(2, 7, 6))
    with pytest.raises(CheckpointError, match="recurrent"):
        load(tmp_path / "out", Tagger("GRU" if cell == "LSTM" else "LSTM"))


@pytest.mark.parametrize("keep", [(), ("0.self_attn.q_proj", "0.linear1")])
def test_attention_round_trips_whether_its_projections_are_quantized_or_kept(
    keep: tuple[str, ...], tmp_path: Path, quantized: Quantizer
) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True))

    saved = quantized(build(), keep=keep)
    save(saved, tmp_path / "out")
    modules = read_description(tmp_path / "out")["modules"]
    assert modules["0.self_attn"]["kind"] == "MultiheadAttention"
    assert ("0.self_attn.q_proj" in modules) == (not keep)
    x = torch.randn(2, 5, 16)
    assert_same_model(saved.model, load(tmp_path / "out", build()), x)
    with torch.device("meta"):
        into = build()
    assert_same_model(saved.model, load(tmp_path / "out", into), x)


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8, padding="same")
        self.kept = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 4, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.kept(self.depthwise(self.norm(self.conv(x)).relu())).relu())


def test_convolutions_and_folded_batchnorm_round_trip(tmp_path: Path, quantized: Quantizer) -> None:
    saved = quantized(ConvNet())
    saved.model.norm = FoldedBatchNorm("conv")
    save(saved, tmp_path / "out")
    loaded = load(tmp_path / "out", ConvNet())
    assert isinstance(loaded.conv, QuantizedConv) and isinstance(loaded.norm, FoldedBatchNorm)
    assert loaded.conv.weight_codes is None, "the execution layout takes the place of the stored codes"
    assert_same_model(saved.model, loaded, torch.randn(2, 3, 9, 9))


def test_a_model_that_is_one_layer_needs_no_architecture(tmp_path: Path, quantized: Quantizer) -> None:
    saved = quantized(nn.Linear(16, 3))
    save(saved, tmp_path / "out")
    assert_same_model(saved.model, load(tmp_path / "out"), torch.randn(2, 16))
    assert isinstance(load(tmp_path / "out", nn.Linear(16, 3)), QuantizedLinear)


class Doubler(InstalledModule):
    """A kind that only this test knows, with a child, a stored and a derived tensor."""

    kind = "Doubler"

    def __init__(self, width: int, values: Tensor | None = None) -> None:
        super().__init__()
        self.width = width
        self.inner = nn.Linear(width, width, device="meta" if values is None else None)
        self.register_buffer("values", torch.empty(width, device="meta") if values is None else values)
        if values is not None:
            self.prepare_()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Doubler:
        return cls(config["width"])

    def config(self) -> dict[str, Any]:
        return {"width": self.width}

    def prepare_(self) -> None:
        self.register_buffer("twice", 2 * self.values, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * self.twice


def test_any_installed_module_in_the_table_round_trips(
    tmp_path: Path, quantized: Quantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = quantized(nn.Sequential(nn.Linear(4, 4), nn.Identity()))
    saved.model[1] = Doubler(4, torch.randn(4))
    with pytest.raises(CheckpointError, match=r"'1': kind 'Doubler' is not in narrowcast\.nn\.MODULES"):
        save(saved, tmp_path / "out")
    monkeypatch.setitem(MODULES, "Doubler", Doubler)
    save(saved, tmp_path / "out")
    loaded = load(tmp_path / "out", nn.Sequential(nn.Linear(4, 4), nn.Identity()))
    assert_same_model(saved.model, loaded, torch.randn(2, 4))


def test_a_model_saved_in_bfloat16_loads_into_a_float32_one_unchanged(tmp_path: Path, quantized: Quantizer) -> None:
    saved = quantized(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
    saved.model[1].to(torch.bfloat16)
    save(saved, tmp_path / "out")
    loaded = load(tmp_path / "out", nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)))
    assert loaded[1].weight.dtype == torch.bfloat16


def test_the_description_says_what_is_in_the_file(
    tmp_path: Path, quantized: Quantizer, small: Any, indices: Tensor
) -> None:
    model = small()
    saved = quantized(model, "int4/group32", None)
    saved.source_sha256 = source_hash(model)
    save(saved, tmp_path / "out")
    description = read_description(tmp_path / "out")
    assert description["specs"]["body.0.weight"] == "int4/group32"
    assert description["recipe"] == {"rules": [{"weight": "int4/group32"}]}
    assert description["report"] == {"layers": [], "sqnr_db": None}, "an infinite ratio is null in JSON"
    assert description["versions"]["torch"] == torch.__version__
    assert description["source_sha256"] == source_hash(model)
    assert description["files"]["model.safetensors"]["bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    stored = load_file(tmp_path / "out/model.safetensors")
    assert {name: list(tensor.shape) for name, tensor in stored.items()} == {
        name: entry["shape"] for name, entry in description["tensors"].items()
    }


def test_large_tensors_begin_at_a_cache_line(tmp_path: Path, quantized: Quantizer) -> None:
    save(quantized(nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 3))), tmp_path / "out")
    loaded = load(tmp_path / "out", nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.Linear(32, 3)))
    assert loaded[0].weight_codes.data_ptr() % 64 == 0
    assert loaded[1].weight.data_ptr() % 64 == 0
    assert loaded[2].weight_scale.data_ptr() % 4 == 0


def test_source_hash_depends_on_names_and_values_only(small: Any) -> None:
    model = small()
    before = source_hash(model)
    other = small()
    other.load_state_dict(model.state_dict())
    assert source_hash(other) == before
    with torch.no_grad():
        other.norm.weight[3] += 1e-6
    assert source_hash(other) != before
    assert source_hash(nn.Sequential(nn.Linear(2, 2))) != source_hash(nn.Linear(2, 2))


def test_weights_are_mapped_and_changing_them_leaves_the_file_alone(tmp_path: Path, quantized: Quantizer) -> None:
    save(quantized(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))), tmp_path / "out")
    into = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64))
    loaded = load(tmp_path / "out", into)
    with torch.no_grad():
        loaded[1].weight.fill_(7.0)
    again = load(tmp_path / "out", nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)), verify=True)
    assert again[1].weight[0] == 1.0
    distance = abs(loaded[0].weight_codes.data_ptr() - loaded[1].weight.data_ptr())
    assert distance < (tmp_path / "out/model.safetensors").stat().st_size, "both lie in one mapping of the file"


_RESIDENT = """
import sys, torch
from torch import nn
from narrowcast.export import load

def anonymous():
    with open("/proc/self/smaps_rollup") as file:
        return {line.split()[0]: int(line.split()[1]) * 1024 for line in file if line[0] in "RA"}

with torch.device("meta"):
    into = nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 4096))
load(sys.argv[2], nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))(torch.zeros(1, 64))
before = anonymous()["Anonymous:"]
model = load(sys.argv[1], into)
y = model(torch.zeros(1, 4096))
print(anonymous()["Anonymous:"] - before)
"""


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of memory")
def test_loading_makes_no_second_copy_of_the_weights(tmp_path: Path, quantized: Quantizer) -> None:
    save(quantized(nn.Sequential(nn.Linear(4096, 4096), nn.Linear(4096, 4096))), tmp_path / "large")
    save(quantized(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))), tmp_path / "little")
    command = [sys.executable, "-W", "ignore", "-c", _RESIDENT, str(tmp_path / "large"), str(tmp_path / "little")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert grown < 8 << 20, f"32 MiB of codes were loaded, memory of its own grew by {grown:,} bytes"


def test_a_parameter_without_values_cannot_be_saved(tmp_path: Path, quantized: Quantizer) -> None:
    saved = quantized(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    saved.model[1].to("meta")
    with pytest.raises(CheckpointError, match=r"'1\.weight' is on the meta device"):
        save(saved, tmp_path / "out")
    saved.model[1] = nn.LazyLinear(3)
    with pytest.raises(CheckpointError, match=r"'1\.weight' is not initialised"):
        save(saved, tmp_path / "out")
    saved.model[1] = nn.Module()
    saved.model[1].register_buffer("odd", torch.eye(3).to_sparse())
    with pytest.raises(CheckpointError, match="only plain dense tensors"):
        save(saved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class WithExtraState(nn.Identity):
    def get_extra_state(self) -> Any:
        return {"anything": object()}


def test_extra_state_and_foreign_objects_are_refused(tmp_path: Path, quantized: Quantizer) -> None:
    saved = quantized(nn.Sequential(nn.Linear(4, 4), WithExtraState()))
    with pytest.raises(CheckpointError, match=r"'1' .*extra state"):
        save(saved, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"nc\.quantize returned, got Linear"):
        save(nn.Linear(2, 2), tmp_path / "out")


def test_a_loaded_model_loads_into_an_already_quantized_one(
    tmp_path: Path, quantized: Quantizer, small: Any, indices: Tensor
) -> None:
    first, second = quantized(small()), quantized(small())
    save(first, tmp_path / "out")
    assert_same_model(first.model, load(tmp_path / "out", second.model), indices)


def test_the_files_hold_no_code(tmp_path: Path, quantized: Quantizer, small: Any) -> None:
    save(quantized(small()), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model.safetensors", "narrowcast.json"]
    json.loads((tmp_path / "out/narrowcast.json").read_text())
    assert (tmp_path / "out/model.safetensors").stat().st_mode & 0o444 == 0o444
