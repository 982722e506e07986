"""MultiheadAttention taken apart gives what `nn.MultiheadAttention` gives."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from tests.nn.oracles import close, noise, restored
from torch import Tensor, nn

import narrowcast as nc
from narrowcast.core import sqnr_db
from narrowcast.nn import InstalledModule, MultiheadAttention

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "without bias": {"bias": False},
    "other widths of keys and values": {"kdim": 10, "vdim": 6},
    "learned extra key": {"add_bias_kv": True},
    "zero extra key": {"add_zero_attn": True},
    "both extra keys": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True, "kdim": 10},
}


def attention(**options: Any) -> nn.MultiheadAttention:
    module = nn.MultiheadAttention(16, 4, **options).eval()
    with torch.no_grad():
        for index, parameter in enumerate(module.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=index) * 0.5)
    return module.requires_grad_(False)


def inputs(module: nn.MultiheadAttention, batch: int | None = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Query of 5 tokens, keys and values of 7."""
    made = []
    for seed, (tokens, width) in enumerate(((5, module.embed_dim), (7, module.kdim), (7, module.vdim))):
        shape = (tokens, width) if batch is None else (batch, tokens, width)
        x = noise(*shape, seed=seed + 20)
        made.append(x if batch is None or module.batch_first else x.transpose(0, 1))
    return made[0], made[1], made[2]


def padding(batch: int, tokens: int) -> Tensor:
    """The first row sees all, the others ever fewer keys."""
    return torch.arange(tokens)[None, :] >= tokens - torch.arange(batch)[:, None]


def check(module: nn.MultiheadAttention, given: tuple[Tensor, ...], **options: Any) -> None:
    expected = module(*given, **options)
    got = MultiheadAttention.of(module)(*given, **options)
    close(got[0], expected[0])
    assert (got[1] is None) == (expected[1] is None)
    if expected[1] is not None:
        close(got[1], expected[1])


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_outputs_and_weights_are_those_of_torch(geometry: str) -> None:
    module = attention(**GEOMETRIES[geometry])
    for batch, need, average in itertools.product((3, None), (True, False), (True, False)):
        check(module, inputs(module, batch), need_weights=need, average_attn_weights=average)


MASKS: dict[str, Tensor] = {
    "none": torch.zeros(0),
    "boolean": torch.arange(7)[None, :] > torch.arange(5)[:, None] + 1,
    "added": noise(5, 7, seed=3),
    "minus infinity": torch.zeros(5, 7).masked_fill(
        torch.arange(7)[None, :] > torch.arange(5)[:, None] + 2, -torch.inf
    ),
    "boolean, per head": noise(12, 5, 7, seed=4) > 0.8,
    "added, per head": noise(12, 5, 7, seed=5),
}


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask is deprecated:UserWarning")
@pytest.mark.parametrize("pad", [None, "boolean", "added"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("geometry", ["plain", "batch first", "both extra keys"])
def test_masks_mean_what_they_mean_in_torch(geometry: str, mask: str, pad: str | None) -> None:
    module = attention(**GEOMETRIES[geometry])
    blocked = None if pad is None else padding(3, 7)
    if pad == "added":
        blocked = torch.zeros(3, 7).masked_fill(blocked, -torch.inf)
    given_mask = None if mask == "none" else MASKS[mask]
    for need in (True, False):
        check(module, inputs(module), attn_mask=given_mask, key_padding_mask=blocked, need_weights=need)


@pytest.mark.parametrize("need", [True, False])
def test_unbatched_inputs_take_masks_too(need: bool) -> None:
    module = attention()
    given = inputs(module, None)
    check(module, given, key_padding_mask=padding(4, 7)[3], need_weights=need)
    check(module, given, attn_mask=MASKS["boolean"], need_weights=need)
    check(module, given, attn_mask=noise(4, 5, 7), need_weights=need)


@pytest.mark.parametrize("need", [True, False])
def test_the_causal_hint_with_its_mask_is_the_mask(need: bool) -> None:
    module = attention()
    x = inputs(module)[0]
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    check(module, (x, x, x), attn_mask=causal, is_causal=True, need_weights=need)


def test_parameters_are_views_of_the_modules_own() -> None:
    module = attention()
    taken = MultiheadAttention.of(module)
    assert taken.q_proj.weight.untyped_storage().data_ptr() == module.in_proj_weight.untyped_storage().data_ptr()
    assert taken.out_proj.weight.data_ptr() == module.out_proj.weight.data_ptr()
    assert sum(p.numel() for p in taken.parameters()) == sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_settings_and_tensors_rebuild_the_module(geometry: str) -> None:
    module = attention(**GEOMETRIES[geometry])
    taken = MultiheadAttention.of(module)
    again = restored(taken)
    given = inputs(module)
    assert torch.equal(again(*given)[0], taken(*given)[0])
    assert torch.equal(copy.deepcopy(taken)(*given)[0], taken(*given)[0])


def encoder(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()


@pytest.mark.parametrize("recipe", ["weight-int8", "dynamic-int8", "weight-int4", "bf16"])
@pytest.mark.parametrize("options", [
    {"batch_first": True}, {}, {"batch_first": True, "norm_first": True}, {"batch_first": True, "activation": "gelu"},
])  # fmt: skip
def test_torchs_encoder_runs_on_quantized_layers_and_is_near(recipe: str, options: dict[str, Any]) -> None:
    model = encoder(**options)
    x = noise(4, 9, 32)
    with torch.no_grad():
        expected = model(x)
        quantized = nc.quantize(model, recipe, progress=False)
        got = quantized.model(x)
    assert sqnr_db(expected, got) > (17 if recipe == "weight-int4" else 30)
    kept = [row.layer for row in quantized.report.layers if row.outcome == "kept" and row.type != "Parameter"]
    assert not kept
    assert sum(row.outcome == "quantized" for row in quantized.report.layers) == 2 * 6


def test_torchs_encoder_takes_masks_on_quantized_layers() -> None:
    model = encoder(batch_first=True)
    x = noise(3, 7, 32)
    blocked = padding(3, 7)
    causal = nn.Transformer.generate_square_subsequent_mask(7)
    quantized = nc.quantize(model, "dynamic-int8", progress=False).model
    with torch.no_grad():
        for options in ({"src_key_padding_mask": blocked}, {"mask": causal}, {"mask": causal, "is_causal": True}):
            expected, got = model(x, **options), quantized(x, **options)
            seen = ~blocked if "src_key_padding_mask" in options else torch.ones(3, 7, dtype=torch.bool)
            assert sqnr_db(expected[seen], got[seen]) > 30


def test_torchs_decoder_runs_on_quantized_layers() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(32, 4, 1, 1, 64, batch_first=True).eval()
    quantized = nc.quantize(model, "dynamic-int8", progress=False).model
    assert sum(isinstance(m, InstalledModule) and m.kind == "MultiheadAttention" for m in quantized.modules()) == 3
    with torch.no_grad():
        source, target = noise(2, 5, 32), noise(2, 6, 32, seed=1)
        assert sqnr_db(model(source, target), quantized(source, target)) > 30


@pytest.mark.parametrize("embed", [16, 20])
def test_dropout_is_off_in_evaluation_mode(embed: int) -> None:
    module = nn.MultiheadAttention(embed, 4, dropout=0.5).eval().requires_grad_(False)
    x = noise(5, 2, embed)
    check(module, (x, x, x))
