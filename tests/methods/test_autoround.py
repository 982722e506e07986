from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from narrowcast.core import QuantSpec, quantize
from narrowcast.errors import DataError, ModelError, RecipeError
from narrowcast.methods import AutoRound, Rtn, Seen, make_method
from tests.methods.small_block import SmallBlock, perceptron

SPECS = (
    "int8/channel",
    "int6/group16/asym",
    "int4/channel/asym",
    "int4/group16/asym",
    "int3/group32",
    "int2/group16/asym",
    "int2/group16",
    "uint4/group8/asym",
    "int3/block4x8",
    "int4/tensor/asym",
    "int4/group16/asym/scale:int8",
    "int4/group16/scale:e8m0",
    "nf4/group16",
    "mxfp4",
    "fp8_e4m3/channel",
)
QUICK = AutoRound(iterations=60)


def judged(block: SmallBlock) -> list[int]:
    return list(range(block.samples))[-round(block.samples * AutoRound().held_out) :]


def nearest_weights(block: SmallBlock) -> dict[str, torch.Tensor]:
    return {
        name: Rtn().quantize(weight, block.specs[name], block.seen.get(name)).dequantize()
        for name, weight in block.weights.items()
    }


@pytest.mark.parametrize("text", SPECS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_block_is_never_worse_than_round_to_nearest_on_the_samples_that_judge(text: str, seed: int) -> None:
    block = perceptron(text, seed)
    learned = {name: solved.record.dequantize() for name, solved in QUICK.solve_block(block).items()}
    assert block.error(learned, judged(block)) <= block.error(nearest_weights(block), judged(block)) * (1 + 1e-6)


@pytest.mark.parametrize("text", [text for text in SPECS if "8" not in text])
def test_training_takes_a_third_off_the_error_on_samples_it_never_saw(text: str) -> None:
    large = perceptron(text, 2, samples=96)
    seen = replace(large, inputs=large.inputs[:64], wanted=large.wanted[:64])
    learned = {name: s.record.dequantize() for name, s in AutoRound(iterations=150).solve_block(seen).items()}
    unseen = list(range(64, 96))
    assert large.error(learned, unseen) < 2 / 3 * large.error(nearest_weights(large), unseen)
