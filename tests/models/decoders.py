"""Tiny models of the families that patterns know, untrained, with an input each; some parts are made uneven."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

_COMMON: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 50,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_GROUPED = _COMMON | {"num_key_value_heads": 2}
_HEADS = _GROUPED | {"head_dim": 8}
_SMALL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_OPT = {key: value for key, value in _COMMON.items() if key != "intermediate_size"}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)),
    "llama tied": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED, tie_word_embeddings=True)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**_GROUPED)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_HEADS)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_GROUPED)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_HEADS)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**_HEADS)),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**_COMMON)),
    "phi3": lambda: hf.Phi3ForCausalLM(hf.Phi3Config(**_GROUPED)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64, bos_token_id=1, eos_token_id=2)
    ),
    "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**_OPT, ffn_dim=48, word_embed_proj_dim=32)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**_COMMON)),
    "roberta": lambda: hf.RobertaModel(hf.RobertaConfig(**_COMMON)),
    "vit": lambda: hf.ViTModel(
        hf.ViTConfig(**_SMALL, image_size=16, patch_size=8)
    ),
}  # fmt: skip


def tiny(name: str) -> tuple[nn.Module, Tensor]:
    """A model in evaluation mode whose norms are not all ones, and an input."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for module in model.modules():
            if "Norm" in type(module).__name__ and isinstance(getattr(module, "weight", None), nn.Parameter):
                module.weight.add_(torch.rand_like(module.weight))
            for parameter in module._parameters.values():
                if parameter is not None and parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    if name == "vit":
        return model, torch.randn(2, 3, 16, 16)
    return model, torch.randint(3, 50, (2, 9))
