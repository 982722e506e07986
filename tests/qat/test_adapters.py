"""Adapters over frozen integers compute what dense LoRA does, train alone, and merge by what the report says."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.pipeline.models import example
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import narrowcast as nc

STATIC = "uint8/tensor static:minmax"
EXACT = (
    ("zero_points", "int4/group16/asym", None), ("zero_points", "int2/group16/asym/scale:k6", None),
    ("zero_points", "int4/group16/asym", "int8/token"),
    ("codes", "int4/group16/asym", "int8/token"), ("codes", "int8/channel", "uint8/channel static:minmax"),
    ("codes", "int3/group16", None),
)  # fmt: skip


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(weight: str = "int4/group16", given: str | None = None, **more: Any) -> tuple[nc.Quantized, Tensor]:
    """Two layers with an activation function between them, and their input; width 50 leaves a ragged group."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(50, 32), nn.GELU(), nn.Linear(32, 8)), noise(48, 50)
    rule = {"weight": weight, "method": "rtn"} | ({} if given is None else {"input": given})
    return nc.quantize(model, {"rule": [rule], **more}, [x], progress=False), x


def train_(model: nn.Module, x: Tensor, steps: int = 12, lr: float = 0.02) -> list[float]:
    target = torch.randint(0, 8, (len(x),), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.Adam([p for p in model.train().parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def answer(model: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = model.eval()(x)
    return out


def random_(model: nn.Module, size: float = 0.3) -> None:
    """Adapters as after some training."""
    with torch.no_grad():
        for index, (name, p) in enumerate(model.named_parameters()):
            if name.endswith("lora_B"):
                p.copy_(size * noise(*p.shape, seed=index))


@pytest.mark.parametrize("weight", ["int4/group16", "int2/group16/asym", "nf4/group16", "int8/channel", "bf16"])
def test_an_adapted_layer_is_dense_lora_over_the_dequantized_weight(weight: str) -> None:
    done, x = quantized(weight, fuse=False)
    model: Any = nc.qat.attach_adapters(done, rank=3, alpha=5.0, layers="0")
    random_(model)
    layer, given = model[0], x.clone().requires_grad_()
    upstream = noise(48, 32, seed=3)
    layer(given).backward(upstream)
    plain, a, b = (t.detach().clone().requires_grad_() for t in (x, layer.lora_A, layer.lora_B))
    y = functional.linear(plain, done.model[0].weight + 5.0 / 3 * b @ a, done.model[0].bias)
    y.backward(upstream)
    torch.testing.assert_close(layer(x), y, rtol=1e-4, atol=1e-4)
    for got, expected in ((given, plain), (layer.lora_A, a), (layer.lora_B, b)):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", ["int8/token", "uint8/token", STATIC, "uint8/channel static:minmax"])
def test_gradients_pass_integer_kernels_through_the_dequantized_weight(given: str) -> None:
    done, x = quantized("int8/channel", given, fuse=False)
    model: Any = nc.qat.attach_adapters(done, rank=2, layers="2")
    wide = (1.5 * x).requires_grad_()
    upstream = noise(48, 32, seed=3)
    model[0](wide).backward(upstream)
    expected = upstream @ done.model[0].weight
    inside = torch.ones_like(x, dtype=torch.bool)
    if "static" in given:
        ranges = done.model[0].input_ranges()
        codes = (wide / ranges.scale).round() + ranges.zero_point
        inside = (codes >= 0) & (codes <= 255)
        assert not bool(inside.all())
    torch.testing.assert_close(wide.grad, expected * inside, rtol=1e-4, atol=1e-5)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["2.lora_A", "2.lora_B"]


@pytest.mark.parametrize("merge", ["requantize", "zero_points", "codes"])
def test_training_starts_at_the_quantized_model_and_moves_nothing_but_adapters(merge: str) -> None:
    done, x = quantized("int4/group16/asym", "int8/token", fuse=False)
    model = nc.qat.attach_adapters(done, rank=2, merge=merge)
    assert torch.equal(answer(model, x), answer(done.model, x))
    torch.testing.assert_close(model.train()(x), answer(done.model, x), rtol=1e-4, atol=1e-4)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    losses = train_(model, x)
    assert losses[-1] < losses[0]
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == {f"{layer}.lora_{part}" for layer in "02" for part in "AB"}
    assert torch.equal(answer(nc.qat.attach_adapters(done, rank=2), x), answer(done.model, x)), "the caller's is kept"


@pytest.mark.parametrize("merge", ["requantize", "zero_points", "codes"])
def test_no_float_copy_of_a_frozen_weight_is_kept_not_even_for_the_gradient(merge: str) -> None:
    torch.manual_seed(0)
    x, rule = noise(4, 256), {"weight": "int4/group32/asym", "method": "rtn"}
    done = nc.quantize(nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256)), {"rule": [rule]}, progress=False)
    model = nc.qat.attach_adapters(done, rank=2, merge=merge)
    stored = sum(t.numel() * t.element_size() for t in done.model.state_dict().values())
    held = {t.data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    adapters = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(held.values()) <= stored + adapters + 400, "settings are some bytes"
    largest = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    assert largest <= 256 * 8, "the graph holds inputs, adapters and what is one per group"
    y.sum().backward()


@pytest.mark.parametrize(("merge", "weight", "given"), EXACT)
def test_exact_adapters_merge_into_what_they_are_in_evaluation_mode_bit_for_bit(
    merge: str, weight: str, given: str | None, tmp_path: Path
) -> None:
    done, x = quantized(weight, given)
    model = nc.qat.attach_adapters(done, rank=2, merge=merge)
    random_(model, 3.0 if merge == "codes" else 0.3)
    trained = model.train()(x)
    merged = nc.qat.merge_adapters(model)
    assert torch.equal(answer(merged.model, x), answer(model, x))
    assert not torch.equal(answer(merged.model, x), answer(done.model, x))
    if given is None:
        torch.testing.assert_close(trained, answer(model, x), rtol=1e-3, atol=1e-3)
    assert all("merged without loss" in row.notes for row in merged.report.layers)
    nc.save(merged, tmp_path / "merged")
    plain = nn.Sequential(nn.Linear(50, 32), nn.GELU(), nn.Linear(32, 8))
    assert torch.equal(answer(nc.load(tmp_path / "merged", into=plain), x), answer(merged.model, x))


def test_zero_points_move_by_whole_steps_of_their_format_and_stay_inside() -> None:
    done, _ = quantized("int4/group16/asym")
    model: Any = nc.qat.attach_adapters(done, rank=2, merge="zero_points")
    random_(model, 1.0)
    before, after = (m.quantized_weights()["weight"] for m in (done.model[0], nc.qat.merge_adapters(model).model[0]))
    assert torch.equal(before.codes, after.codes) and torch.equal(before.scale, after.scale)
    assert bool((after.zero_point >= -8).all()) and bool((after.zero_point <= 7).all())
    assert len(after.zero_point.unique()) > 2


@pytest.mark.parametrize("merge", ["zero_points", "codes"])
def test_gradients_of_exact_adapters_are_those_of_the_weight_straight_through(merge: str) -> None:
    done, x = quantized("int4/group16/asym", fuse=False)
    model: Any = nc.qat.attach_adapters(done, rank=2, merge=merge, layers="0")
    layer, upstream = model[0], noise(48, 32, seed=3)
    layer(x).backward(upstream)
    record = done.model[0].quantized_weights()["weight"]
    of_weight = upstream.t() @ x  # [32, 50]
    scale = record.scale.repeat_interleave(16, 1)[:, :50]
    if merge == "codes":
        expected = of_weight * scale
    else:
        expected = torch.stack([part.sum(1) for part in of_weight.split(16, 1)], 1)
    torch.testing.assert_close(layer.lora_B.grad, 8.0 * expected @ layer.lora_A.detach().t(), rtol=1e-3, atol=1e-3)


def test_requantizing_keeps_ranges_that_are_better_and_says_what_it_costs() -> None:
    done, x = quantized("int4/group16/asym")
    model = nc.qat.attach_adapters(done, rank=2)
    random_(model, 1e-4)
    merged = nc.qat.merge_adapters(model)
    rows = {row.layer: row for row in merged.report.layers}
    assert "kept ranges in" in rows["0"].method and any("the adapter moves the weight by" in n for n in rows["0"].notes)
    dropped, kept = rows["0"].errors
    assert dropped.step == "adapter dropped" and kept.step == "adapter merged"
    assert kept.weight_sqnr_db >= dropped.weight_sqnr_db
    random_(model, 0.3)
    errors = {}
    for name, more in (("rtn", {"data": [x]}), ("gptq", {"data": [x], "method": "gptq"})):
        row = nc.qat.merge_adapters(model, **more).report.layers[0]
        errors[name] = row.errors[1].output_error
        assert errors[name] < row.errors[0].output_error
    assert errors["gptq"] < 0.8 * errors["rtn"], "inputs are correlated, so compensating errors pays"


def test_merged_learned_levels_and_casts_keep_their_format() -> None:
    for weight in ("codebook4/channel", "bf16", "fp8_e4m3/channel"):
        done, x = quantized(weight)
        model = nc.qat.attach_adapters(done, rank=2)
        random_(model, 0.1)
        merged = nc.qat.merge_adapters(model)
        assert str(merged.model[0].stored("weight").spec) == str(done.model[0].stored("weight").spec)
        torch.testing.assert_close(answer(merged.model, x), answer(model, x), rtol=0.5, atol=0.5)


def test_converting_a_model_with_adapters_points_to_merging() -> None:
    model = nc.qat.attach_adapters(quantized()[0])
    with pytest.raises(nc.ModelError, match=r"nc\.qat\.merge_adapters merges them"):
        nc.qat.convert(model)


def test_the_start_from_the_float_model_is_nearer_to_it() -> None:
    torch.manual_seed(0)
    float_model, x = nn.Sequential(nn.Linear(50, 32), nn.GELU(), nn.Linear(32, 8)), noise(48, 50)
    done = nc.quantize(float_model, {"rule": [{"weight": "int2/group16", "method": "rtn"}]}, [x], progress=False)
    model = nc.qat.attach_adapters(done, rank=6, float_model=float_model)
    errors = [(answer(m, x) - answer(float_model, x)).square().mean() for m in (done.model, model)]
    assert errors[1] < 0.8 * errors[0]
    with pytest.raises(nc.ModelError, match="not the one that was quantized"):
        nc.qat.attach_adapters(done, rank=2, float_model=copy.deepcopy(float_model).apply(_negate))
    with pytest.raises(nc.RecipeError, match="float_model goes with merge 'requantize'"):
        nc.qat.attach_adapters(done, rank=2, float_model=float_model, merge="codes")


def _negate(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        parameter.data.neg_()


def test_adapters_are_saved_alone_as_peft_does_and_fit_their_base_only(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    done, x = quantized()
    model = nc.qat.attach_adapters(done, rank=2, alpha=3.0)
    train_(model, x)
    nc.qat.save_adapters(model, tmp_path)
    tensors, config = (
        load_file(tmp_path / "adapter_model.safetensors"),
        json.loads((tmp_path / "adapter_config.json").read_text()),
    )
    assert tensors["base_model.model.0.lora_A.weight"].shape == (2, 50) and len(tensors) == 4
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 2, 3.0)
    assert config["target_modules"] == ["0", "2"]
    again = nc.qat.load_adapters(done, tmp_path)
    assert torch.equal(answer(again, x), answer(model, x))
    assert torch.equal(answer(nc.qat.merge_adapters(again).model, x), answer(nc.qat.merge_adapters(model).model, x))
    with pytest.raises(nc.CheckpointError, match="trained over other integers"):
        nc.qat.load_adapters(quantized("int3/group16")[0], tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(nc.CheckpointError, match="expected a JSON object"):
        nc.qat.load_adapters(done, tmp_path)
    with pytest.raises(nc.CheckpointError, match="cannot be read"):
        nc.qat.load_adapters(done, tmp_path / "nowhere")


def test_a_state_dict_holds_base_and_adapters_and_refuses_other_settings() -> None:
    done, x = quantized("int4/group16/asym")
    model = nc.qat.attach_adapters(done, rank=2)
    train_(model, x)
    assert all(isinstance(t, Tensor) for t in model.state_dict().values())
    fresh = nc.qat.attach_adapters(quantized("int4/group16/asym")[0], rank=2)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(answer(fresh, x), answer(model, x))
    for other in ({"alpha": 4.0}, {"merge": "codes"}):
        with pytest.raises(nc.RecipeError, match=r"layer '0': the state_dict has another adapter"):
            nc.qat.attach_adapters(done, rank=2, **other).load_state_dict(model.state_dict())  # type: ignore[arg-type]


@pytest.mark.parametrize("merge", ["requantize", "zero_points", "codes"])
def test_autocast_and_checkpointing_train_the_same_adapters(merge: str) -> None:
    done, x = quantized("int4/group16/asym", "int8/token")
    model = nc.qat.attach_adapters(done, rank=2, merge=merge)
    random_(model)

    def gradients(out: Tensor) -> Tensor:
        model.zero_grad()
        out.float().square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    plain = gradients(model(x))
    assert torch.equal(plain, gradients(checkpoint(model, x, use_reentrant=False)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    assert torch.cosine_similarity(plain, gradients(out), 0) > 0.97


def test_dropout_is_drawn_in_training_alone() -> None:
    done, x = quantized()
    model = nc.qat.attach_adapters(done, rank=2, dropout=0.5)
    random_(model)
    assert not torch.equal(model.train()(x), model(x)) and torch.equal(answer(model, x), answer(model, x))


def test_layers_without_adapter_pass_gradients_and_come_back_as_they_were() -> None:
    model, x = example("transformer")
    rules = {"rule": [{"type": "Embedding", "keep": "small"}, {"weight": "int8/channel", "input": "int8/token"}]}
    done = nc.quantize(model, rules, x.split(16), progress=False)
    made: Any = nc.qat.attach_adapters(done, rank=2, layers=["body.self_attn.*", "body.linear1"])
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    made(x).square().mean().backward()
    assert made.body.linear1.lora_B.grad.abs().sum() > 0 and made.body.self_attn.q_proj.lora_B.grad.abs().sum() > 0
    assert made.position.grad is None
    merged = nc.qat.merge_adapters(made)
    assert merged.model.classes.quantized_weights() == done.model.classes.quantized_weights()
    assert torch.equal(answer(merged.model, x), answer(done.model, x)), "adapters of 0 change nothing"


def test_layers_that_gradients_cannot_pass_say_so() -> None:
    x = noise(8, 16)
    model = nn.Sequential(nn.Linear(16, 16), nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 2, 3))
    done = nc.quantize(model, {"rule": [{"weight": "int8/channel", "input": STATIC}]}, [x], progress=False)
    made = nc.qat.attach_adapters(done, rank=1, layers="0")
    with pytest.raises(nc.ModelError, match=r"layer '2' \(QuantizedConv\) stands behind an adapter"):
        made(x)
    assert torch.equal(answer(nc.qat.merge_adapters(made).model, x), answer(done.model, x))


def test_tied_heads_get_none_and_the_report_says_why() -> None:
    model, x = example("tied")
    done = nc.quantize(model, {"rule": [{"weight": "int8/channel"}]}, x.split(16), progress=False)
    made = nc.qat.attach_adapters(done, rank=2)
    assert sorted(n for n, p in made.named_parameters() if p.requires_grad) == [
        f"{layer}.lora_{part}" for layer in ("down", "up") for part in "AB"
    ]
    notes = nc.qat.merge_adapters(made).report.notes
    assert any("head: without adapter: it shares its weight" in note for note in notes)
    with pytest.raises(nc.ModelError, match=r"layer 'head': it shares its weight"):
        nc.qat.attach_adapters(done, rank=2, layers="head")


def test_what_cannot_be_attached_or_merged_says_what_and_why() -> None:
    done, x = quantized()
    attach: Any = nc.qat.attach_adapters
    for settings, error, words in (
        (
            {"layers": "nowhere.*"},
            nc.ModelError,
            r"'nowhere.\*' matches no quantized layer; the linear ones are '0', '2'",
        ),
        (
            {"rank": 9},
            nc.ModelError,
            r"layer '2': rank 9 is more than its adapter can have, which is 8x32; use at most 8",
        ),
        ({"rank": 0}, nc.RecipeError, "rank is a whole number >= 1, got 0"),
        ({"alpha": -1.0}, nc.RecipeError, "alpha is a positive number"),
        ({"dropout": 1.0}, nc.RecipeError, "dropout is a share"),
        ({"merge": "never"}, nc.RecipeError, "merge is 'never'; use one of requantize, zero_points, codes"),
        ({"merge": "codes", "dropout": 0.1}, nc.RecipeError, "no dropout"),
        ({"merge": "zero_points"}, nc.ModelError, "int4/group16 has no zero points of groups to move"),
    ):
        with pytest.raises(error, match=words):
            attach(done, **settings)
    with pytest.raises(nc.ModelError, match="nf4/group16 has no equal steps"):
        attach(quantized("nf4/group16")[0], merge="codes", rank=2)
    with pytest.raises(nc.ModelError, match="no quantized linear layer; quantize it first"):
        attach(nn.Sequential(nn.Linear(4, 4)))
    made = attach(done, rank=2)
    with pytest.raises(nc.ModelError, match="has adapters already"):
        attach(made)
    merged = nc.qat.merge_adapters(made)
    with pytest.raises(nc.ModelError, match=r"has no adapters; .* a merged model has none left"):
        nc.qat.merge_adapters(merged.model)
    with pytest.raises(nc.DataError, match="'gptq' needs data"):
        nc.qat.merge_adapters(made, method="gptq")
    with pytest.raises(nc.RecipeError, match="works on whole blocks"):
        nc.qat.merge_adapters(made, [x], method="autoround")
    exact = attach(quantized("int4/group16/asym")[0], rank=2, merge="codes")
    with pytest.raises(nc.RecipeError, match="are integers; leave method out"):
        nc.qat.merge_adapters(exact, [x], method="gptq")
    made[0].lora_B.data[0, 0] = float("nan")
    with pytest.raises(nc.ModelError, match=r"layer '0': its trained adapter is not finite"):
        nc.qat.merge_adapters(made)


def test_loaded_models_and_models_in_place_take_adapters() -> None:
    done, x = quantized()
    made = nc.qat.attach_adapters(done.model, rank=2, inplace=True)
    assert made is done.model
    train_(made, x)
    merged = nc.qat.merge_adapters(made)
    assert [row.layer for row in merged.report.layers] == ["0", "2"] and "without a report" in str(merged.report.notes)
