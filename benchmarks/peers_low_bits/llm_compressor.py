"""llm-compressor: `oneshot` with GPTQ, AWQ or plain rounding on transformers' classes."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from llmcompressor import oneshot
from llmcompressor.modifiers.awq import AWQModifier
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from torch.utils.data import DataLoader

from benchmarks.kit import KitModel
from benchmarks.peers_low_bits import llama
from benchmarks.peers_low_bits.base import BITS, Answers, group_of, weights_of

MODIFIERS = {"gptq": GPTQModifier, "awq": AWQModifier, "rtn": QuantizationModifier}


def scheme(form: str) -> QuantizationScheme:
    """Asymmetric integer weights, float activations."""
    group = group_of(form)
    strategy = QuantizationStrategy.GROUP if group else QuantizationStrategy.CHANNEL
    weights = QuantizationArgs(num_bits=BITS[form], symmetric=False, strategy=strategy, group_size=group)
    return QuantizationScheme(targets=["Linear"], weights=weights)


def quantize(kit: KitModel, form: str, method: str) -> Answers:
    """One cell; every calibration story is a batch of its own."""
    name, _, padding = method.partition(" ")
    stories: list[dict[str, Any]] = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in kit.calibration()
    ]
    with tempfile.TemporaryDirectory() as folder:
        model = llama.saved(kit, folder, padded=padding == "zero-padded")
        before = weights_of(model)
        oneshot(
            model=model,
            processor=llama.tokenizer(),
            dataset=DataLoader(stories, batch_size=None),
            recipe=MODIFIERS[name](config_groups={"weights": scheme(form)}, ignore=["lm_head"]),
            num_calibration_samples=len(stories),
        )
    return llama.compared(model, before)
