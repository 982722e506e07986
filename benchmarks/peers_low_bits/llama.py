"""stories260K as transformers' LlamaForCausalLM, for tools that know only such models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.kit import KitModel
from benchmarks.kit.stories260k import BOS, CONTEXT, DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, VOCABULARY
from benchmarks.peers_low_bits.base import GROUP, Answers, answers

NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
WIDER = -(-HIDDEN // GROUP) * GROUP


def halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of interleaved rotation pairs reordered into transformers' two halves per head."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def converted(state: dict[str, Tensor], hidden: int) -> dict[str, Tensor]:
    """The kit's weights under transformers' names, the feed-forward widened with zeros to `hidden`."""
    result = {
        "model.embed_tokens.weight": state["tok_embeddings.weight"],
        "lm_head.weight": state["tok_embeddings.weight"],
        "model.norm.weight": state["norm.weight"],
    }
    for layer in range(LAYERS):
        for ours, theirs in NAMES.items():
            weight = state[f"layers.{layer}.{ours}.weight"]
            if ours in ("attention.wq", "attention.wk"):
                weight = halves(weight, HEADS if ours.endswith("q") else KV_HEADS)
            missing = hidden - HIDDEN
            if ours == "feed_forward.w2":
                weight = F.pad(weight, (0, missing))
            elif ours in ("feed_forward.w1", "feed_forward.w3"):
                weight = F.pad(weight, (0, 0, 0, missing))
            result[f"model.layers.{layer}.{theirs}.weight"] = weight
    return result


def build(kit: KitModel, *, padded: bool) -> nn.Module:
    """The trained decoder as transformers' class, eval mode.

    Args:
        kit: stories260k.
        padded: whether the feed-forward of 172 becomes one of 192, which every group of 32 fits; the function is the
            same.

    Returns:
        The model; refuses to return one that answers otherwise than the kit's.
    """
    hidden = WIDER if padded else HIDDEN
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=DIM,
            intermediate_size=hidden,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            rms_norm_eps=1e-5,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=BOS,
            eos_token_id=BOS,
            use_cache=False,
        )
    ).float()
    original = kit.build()
    model.load_state_dict(converted(original.state_dict(), hidden))
    model.tie_weights()
    model.eval()
    ids = kit.calibration()[0]
    with torch.no_grad():
        error = (model(ids).logits - original(ids)).abs().max().item()
    if error > 1e-3:
        raise RuntimeError(f"the converted decoder answers differently, by up to {error:.3g}")
    return model


def tokenizer() -> Any:
    """A tokenizer that tools ask for although the calibration data are token ids; "7" is token 7."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(VOCABULARY)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="0", bos_token="1", pad_token="0")


def saved(kit: KitModel, folder: str, *, padded: bool) -> nn.Module:
    """The decoder written to a folder with its tokenizer, for tools that read its path, and read back."""
    build(kit, padded=padded).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()


def answering(model: Any) -> Callable[[Tensor], Tensor]:
    """Token ids -> logits; tools differ in whether their layers bear inference mode, so it is left."""

    def call(ids: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return model(ids.clone()).logits.float()

    return call


def compared(model: nn.Module, before: dict[str, Tensor]) -> Answers:
    """The quantized decoder with its matrices compared to those `before`."""
    return answers(model, before, answering(model))
