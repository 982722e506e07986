"""The presets: recipes by name, each a list of rules that a recipe file could hold as well.

Why they are as they are:
- int4 groups are asymmetric: on a small language model symmetric int4 loses 18 % of perplexity, asymmetric 8 %.
- Weights that no integer kernel multiplies are asymmetric: it costs a byte per row and nothing at run time, and on a
  sentence encoder it takes 4.4 dB of error out of the embeddings and 1.5 dB out of the linear layers.
- Dynamic inputs of linear layers have zero points (uint8/token): symmetric codes lose 5 dB on a sentence encoder, where
  one channel is far from zero on one side. Int4 kernels have a range per 32 channels, which does as much.
- No rule names a solver: `defaults.py` chooses by bits and data.
- Embeddings and output heads stay in int8 in the int4 presets: they are read by every token.
- With integer activations convolutions keep int8 weights in `dynamic-int4`: 4-bit weights per channel, which is what
  an integer convolution can run, cost MobileNetV2 52 points of accuracy when rounded to nearest without data.
- Static inputs have one range per channel, unclipped: on MobileNetV1 that gives 32 dB at the output, one range for all
  channels 29 dB, and ranges clipped for the least square error 19 dB.
- A tied head has one static range: a weight that is also looked up cannot take in the scales of an input.
- Fused experts find their ranges at run time in `static-int8`, too: each expert's inputs are others.
- Recurrent layers find their ranges at run time also in `static-int8`: the hidden state is not visible from outside.
"""

from __future__ import annotations

from typing import Any

from narrowcast.recipe.rules import Recipe

_INT8 = "int8/channel"
_INT8_ASYMMETRIC = "int8/channel/asym"
_INT4 = "int4/group32/asym"
_STATIC = "uint8/channel static:minmax"
_STATIC_TENSOR = "uint8/tensor static:minmax"
_DYNAMIC = "int8/token"
_DYNAMIC_ASYMMETRIC = "uint8/token"
_CONVOLUTIONS = ("Conv1d", "Conv2d", "ConvTranspose2d")
_RECURRENT = ("LSTM", "GRU")


def _rule(weight: str, activation: str = "", **selector: str) -> dict[str, Any]:
    rule: dict[str, Any] = {"weight": weight, "optional": True, **selector}
    return rule | ({"input": activation} if activation else {})


def _preset(name: str, *rules: dict[str, Any]) -> Recipe:
    return Recipe.from_dict({"name": name, "rule": list(rules)}, f"preset {name}")


_EMBEDDING = _rule(_INT8_ASYMMETRIC, role="embedding")
_SYMMETRIC_DYNAMIC = [_rule(_INT8, _DYNAMIC, type=kind) for kind in (*_CONVOLUTIONS, *_RECURRENT)]

PRESETS: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        _preset("weight-int8", _rule(_INT8_ASYMMETRIC)),
        _preset(
            "weight-int4",
            *(_rule(_INT8_ASYMMETRIC, role=role) for role in ("embedding", "head", "tied")),
            _rule(_INT4),
        ),
        _preset("dynamic-int8", _EMBEDDING, *_SYMMETRIC_DYNAMIC, _rule(_INT8, _DYNAMIC_ASYMMETRIC)),
        _preset(
            "dynamic-int4",
            _EMBEDDING,
            *(_rule(_INT8, _DYNAMIC_ASYMMETRIC, role=role) for role in ("head", "tied")),
            *_SYMMETRIC_DYNAMIC,
            _rule(_INT4, _DYNAMIC),
        ),
        _preset(
            "static-int8",
            _EMBEDDING,
            _rule(_INT8, _STATIC_TENSOR, role="tied"),
            *(_rule(_INT8, _DYNAMIC, type=kind) for kind in _RECURRENT),
            _rule(_INT8, _DYNAMIC_ASYMMETRIC, type="Experts"),
            _rule(_INT8, _STATIC),
        ),
        _preset("fp16", _rule("fp16")),
        _preset("bf16", _rule("bf16", "bf16")),
    )
}

# Names that users of other tools know: weight and activation bits.
ALIASES: dict[str, str] = {
    "W8A16": "weight-int8",
    "W4A16": "weight-int4",
    "W8A8": "dynamic-int8",
    "W4A8": "dynamic-int4",
    "W8A8-STATIC": "static-int8",
}
