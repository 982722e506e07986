"""auto-round: learned rounding and ranges, block after block, 200 steps."""

from __future__ import annotations

import torch
from auto_round import AutoRound

from benchmarks.kit import KitModel
from benchmarks.kit.stories260k import CONTEXT
from benchmarks.peers_low_bits import llama
from benchmarks.peers_low_bits.base import BITS, Answers, group_of, weights_of


def quantize(kit: KitModel, form: str, method: str) -> Answers:
    """One cell; the calibration stories are joined into rows of 512 tokens, because it drops shorter ones."""
    model = llama.build(kit, padded=method == "zero-padded")
    before = weights_of(model)
    joined = torch.cat([batch[0] for batch in kit.calibration()])
    rows = list(joined[: len(joined) // CONTEXT * CONTEXT].view(-1, 1, CONTEXT))
    work = AutoRound(
        model,
        tokenizer=llama.tokenizer(),
        bits=BITS[form],
        group_size=group_of(form) or -1,
        sym=False,
        iters=200,
        dataset=rows,
        seqlen=CONTEXT,
        nsamples=len(rows),
        device_map="cpu",
        enable_torch_compile=False,
    )
    quantized, _ = work.quantize()
    return llama.compared(quantized.float(), before)  # it leaves the model in bfloat16
