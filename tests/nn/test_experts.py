"""Fused experts: quantized like linear layers, called like transformers' own module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import narrowcast as nc
from narrowcast.core import sqnr_db
from narrowcast.nn import QuantizedExperts

transformers = pytest.importorskip("transformers", reason="fused experts are transformers' modules")

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "num_experts_per_tok": 2,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 48, "head_dim": 8},
    "Olmoe": {"num_experts": 4},
    "GptOss": {"num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention", "full_attention"]},
}


def build(family: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL, **FAMILIES[family], **options, tie_word_embeddings=False)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 or "bias" in "".join(n for n, p in model.named_parameters() if p is parameter):
                parameter.normal_(0, 0.15)
    return model


def ids() -> Tensor:
    share = 1.0 / torch.arange(1, 65)
    return torch.multinomial(share, 8 * 24, replacement=True, generator=torch.Generator().manual_seed(0)).view(8, 24)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(ids()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_of_a_mixture_is_quantized_and_the_model_stays_near(family: str) -> None:
    model = build(family)
    for recipe, nearest in (
        ("weight-int8", 38),
        ("dynamic-int8", 30),
        ("static-int8", 30),
        ("weight-int4", 16),
        ("dynamic-int4", 16),
    ):
        result = nc.quantize(model, recipe, ids(), progress=False)
        experts = [row for row in result.report.layers if row.type == "Experts"]
        assert len(experts) == 4 and {row.outcome for row in experts} == {"quantized"}
        assert min(row.output_sqnr_db for row in experts) > nearest, recipe
        assert sqnr_db(logits(model), logits(result.model)) > 8  # a token near the border goes to another expert


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "spec",
    [
        "int8/channel",
        "int4/group32/asym",
        "nf4/group32",
        "fp16",
        "int8/block16x16",
        "int8/tensor",
        "codebook3/channel",
        "int4/group16/asym/scale:k6",
    ],
)
def test_the_module_computes_what_the_float_one_does_with_dequantized_weights(family: str, spec: str) -> None:
    model = build(family)
    recipe = {"rule": [{"type": "Experts", "weight": spec}, {"layers": "*", "keep": "not asked"}]}
    result = nc.quantize(model, recipe, progress=False).model
    for path, module in result.named_modules():
        if isinstance(module, QuantizedExperts):
            original: Any = model.get_submodule(path)
            for name in module.weight_names:
                matrix = module.quantized_weights()[name].dequantize()
                parameter = getattr(original, name)
                shape = parameter.shape if not original.is_transposed else parameter.transpose(1, 2).shape
                weight = matrix.view(shape)
                parameter.data = weight.transpose(1, 2).contiguous() if original.is_transposed else weight
    assert sqnr_db(logits(model), logits(result)) > 80


@pytest.mark.parametrize("recipe", ["weight-int4", "dynamic-int8", "dynamic-int4"])
@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_checkpoints_give_back_the_same_bits(family: str, recipe: str, tmp_path: Path) -> None:
    result = nc.quantize(build(family), recipe, ids(), progress=False)
    nc.save(result, tmp_path / "out")
    assert torch.equal(logits(nc.load(tmp_path / "out", into=build(family))), logits(result.model))


def test_only_the_chosen_share_of_the_experts_counts_as_multiplied() -> None:
    report = nc.quantize(build("Mixtral"), "dynamic-int8", ids(), progress=False).report
    row = next(row for row in report.layers if row.layer.endswith("layers.0.mlp.experts.down_proj"))
    assert row.macs == 8 * 24 * 2 * 32 * 48
    assert "per expert" in row.kernel and row.parameters == 4 * 32 * 48


def test_experts_that_no_token_was_sent_to_are_a_finding() -> None:
    model = build("Mixtral")
    with torch.no_grad():
        for layer in model.model.layers:  # the same two experts win whatever the token
            layer.mlp.gate.weight.zero_()
    report = nc.quantize(model, "weight-int8", ids(), progress=False).report
    message = next(finding.message for finding in report.findings if "never ran" in finding.message)
    assert message.startswith("4 experts or branches of") and ".mlp.experts." in message


def test_experts_with_a_gate_of_their_own_are_kept_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("Mixtral")

    def own(self: Any, gate_up: Tensor) -> Tensor:
        return gate_up.chunk(2, dim=-1)[0]

    monkeypatch.setattr(type(model.model.layers[0].mlp.experts), "_apply_gate", own)
    rows = [row for row in nc.plan(model, "weight-int8").layers if "experts" in row.layer.name]
    assert {row.weight for row in rows} == {None}
    assert all("MixtralExperts: its gate is of its own making" in row.reason for row in rows)


def test_a_mixture_is_planned_without_weights() -> None:
    with torch.device("meta"):
        model = build("Mixtral")
    rows = [row for row in nc.plan(model, "weight-int4").layers if row.layer.type == "Experts"]
    assert [row.layer.shape for row in rows[:2]] == [(4 * 96, 32), (4 * 32, 48)]
