"""GPTQModel: GPTQ with activation order on transformers' classes."""

from __future__ import annotations

import os
import tempfile

# With its own default, one worker on two cores, it raises: "Virtual pool 'model_loader:cpu' requests 2 workers".
os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig

from benchmarks.kit import KitModel
from benchmarks.peers_low_bits import llama
from benchmarks.peers_low_bits.base import BITS, Answers, group_of, weights_of


def quantize(kit: KitModel, form: str, method: str) -> Answers:
    """One cell; every calibration story is a batch of its own.

    Its CPU layer computes in float16 only, so its weights, rounded to float16, are put into a float32 decoder.
    """
    padded = method.endswith("zero-padded")
    stories = [{"input_ids": ids[0], "attention_mask": torch.ones_like(ids[0])} for ids in kit.calibration()]
    settings = QuantizeConfig(bits=BITS[form], group_size=group_of(form) or -1, sym=False, desc_act=True)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as finished:
        model = llama.saved(kit, folder, padded=padded)
        before = weights_of(model)
        work = GPTQModel.load(folder, settings, device="cpu", dtype=torch.float32)
        work.quantize(stories, batch_size=1)
        work.save(finished)
        packed = GPTQModel.load(finished, device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model
    with torch.no_grad():
        for name in before:
            layer = packed.get_submodule(name)
            if hasattr(layer, "dequantize_weight"):
                model.get_submodule(name).weight.copy_(layer.dequantize_weight().T)
    return llama.compared(model, before)
