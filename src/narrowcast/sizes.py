"""How many bytes a model takes in every number format, before any work is done.

Owns the arithmetic for weights, for the key/value cache and for activations, from parameter counts, tensor shapes and
Hugging Face configurations. Reads no file, opens no model, allocates no tensor. Sizes are decimal: 1 GB = 10^9 bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from math import prod
from typing import Any

from narrowcast.core import FORMATS, QuantSpec
from narrowcast.core.spec import ALIASES
from narrowcast.errors import FormatError, ModelError

_UNITS = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9, "t": 12}
_COUNT = re.compile(r"(\d[\d_,]*\.?\d*(?:[eE][+-]?\d{1,3})?)\s*([kKmMbBgGtT]?)")
_PREFIXES = ("B", "kB", "MB", "GB", "TB", "PB", "EB")


@dataclass(frozen=True)
class FormatSize:
    """What a number of weights takes in one format.

    Args:
        name: format as recipes write it.
        bits: bits of one code.
        codes: bytes of the codes alone.
        spec: the specification behind `total`, "" for formats without scales.
        total: bytes of codes, scales and zero points.
    """

    name: str
    bits: int
    codes: int
    spec: str
    total: int


def parse_count(text: str) -> int | None:
    """The number of parameters that `text` means, or None where it is no number.

    Args:
        text: "30B", "7b", "270M", "1.5e9", "7,000,000"; k, M, B (or G) and T are 10^3, 10^6, 10^9 and 10^12.

    Raises:
        FormatError: a number, but not of at least one parameter and at most 10^18.
    """
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        return None
    count = Decimal(re.sub("[_,]", "", match[1])).scaleb(_UNITS[match[2].lower()])
    if not 1 <= count <= Decimal(10) ** 18:
        raise FormatError(f"{text!r} is {count:.3g} parameters; expected 1 to 10^18, for example 270M or 30B")
    return int(count)


def format_bytes(count: int | float) -> str:
    """A number of bytes with three significant digits and a decimal prefix: "120 GB", "16.9 GB", "512 B"."""
    value, index = float(count), 0
    while value >= 999.5 and index < len(_PREFIXES) - 1:
        value, index = value / 1000, index + 1
    digits = 0 if index == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    text = f"{value:.{digits}f}"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} {_PREFIXES[index]}"


def format_sizes(matrices: Iterable[tuple[int, int]], other: int = 0, *, group: int = 32) -> list[FormatSize]:
    """Bytes of a model's weights in every format.

    Args:
        matrices: (rows, columns) of every weight that can be quantized; (1, n) for a plain count of n.
        other: bytes of what stays as it is: norms, biases, buffers.
        group: weights that share a scale.

    Returns:
        One row per format of FORMATS that can hold a weight (learned levels always per channel), then the microscaling
        formats (always groups of 32).

    Raises:
        FormatError: `group` is smaller than 1.
    """
    counted: dict[tuple[int, int], int] = {}
    for shape in matrices:
        counted[shape] = counted.get(shape, 0) + 1
    names = [name for name, number in FORMATS.items() if number.kind != "exponent"]
    return [_format_size(name, counted, other, group) for name in (*names, *ALIASES)]


def _format_size(name: str, counted: Mapping[tuple[int, int], int], other: int, group: int) -> FormatSize:
    # learned levels are for whole rows: a table of them costs more bits than a group has
    alone = name in ALIASES or not FORMATS[name].scaled
    spec = QuantSpec.parse(name if alone else f"{name}/group{group}")
    bits = spec.format.bits
    codes = sum(number * rows * -(-columns * bits // 8) for (rows, columns), number in counted.items())
    total = sum(
        number * round(spec.bits_per_value(shape) * shape[0] * shape[1] / 8) for shape, number in counted.items()
    )
    return FormatSize(name, bits, codes + other, "" if spec.format.is_cast else str(spec), total + other)


@dataclass(frozen=True)
class TransformerShape:
    """What the memory of a transformer at work depends on.

    Args:
        cached_layers: layers that keep keys and values of the whole context; 0 for an encoder.
        windowed_layers: layers that keep those of the last `window` tokens only.
        window: tokens a windowed layer attends to.
        cached_values: numbers that one layer keeps per token: 2 * key/value heads * head size, or less.
        hidden: width of the residual stream.
        attention: width of the queries, and of the keys or values: (heads * head size, kv heads * head size).
        heads: query heads.
        intermediate: width of the feed-forward network.
        gated: whether that network has a gate beside its first projection.
        vocabulary: entries of the output head; 0 without one.
        longest: tokens that the model was made for; None if it does not say.
    """

    cached_layers: int
    windowed_layers: int
    window: int
    cached_values: int
    hidden: int
    attention: tuple[int, int]
    heads: int
    intermediate: int
    gated: bool
    vocabulary: int
    longest: int | None


# What one thing is called by the families of models, in the order in which to look.
_NAMES: dict[str, tuple[str, ...]] = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim", "n_embed"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "num_decoder_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv", "n_kv_heads"),
    "head_size": ("head_dim", "d_kv", "attention_head_dim"),
    "intermediate": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "hidden_dim", "ffn_hidden_size"),
    "vocabulary": ("vocab_size",),
    "longest": ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length"),
    "window": ("sliding_window",),
}  # fmt: skip
_ENCODERS = (
    "bert", "roberta", "xlm-roberta", "distilbert", "electra", "albert", "mpnet", "deberta", "deberta-v2", "camembert",
    "modernbert", "esm", "nomic_bert", "vit", "deit", "dinov2", "swin", "beit", "siglip_vision_model",
    "clip_vision_model", "wav2vec2", "hubert",
)  # fmt: skip
_GATED_ACTIVATIONS = ("silu", "swish", "gelu_pytorch_tanh", "gated-gelu", "gelu_new_gated")
_UNGATED = (
    "gpt2", "gpt_neo", "gpt_neox", "gptj", "opt", "bloom", "falcon", "phi", "gpt_bigcode", "starcoder2", "codegen",
    "mpt",
)  # fmt: skip


def transformer_shape(config: Mapping[str, Any]) -> TransformerShape:
    """The shape of a transformer from the content of its `config.json`.

    Args:
        config: as read; the text part is used of one that has several.

    Raises:
        ModelError: width, layers or heads are missing or not positive integers.
    """
    config = config.get("text_config") or config
    hidden, layers, heads = (_need(config, name) for name in ("hidden", "layers", "heads"))
    multi_query = bool(config.get("multi_query")) and not config.get("new_decoder_architecture")
    kv_heads = 1 if multi_query else _find(config, "kv_heads") or heads
    head_size = _find(config, "head_size") or max(hidden // heads, 1)
    cached = 2 * kv_heads * head_size
    if isinstance(config.get("kv_lora_rank"), int):  # multi-head latent attention, DeepSeek-V2, arXiv:2405.04434
        cached = int(config["kv_lora_rank"]) + int(config.get("qk_rope_head_dim") or 0)
    full, windowed = _split_layers(config, layers)
    family = str(config.get("model_type", ""))
    names = ("hidden_act", "hidden_activation", "feed_forward_proj")
    activation = next((str(config[name]) for name in names if config.get(name)), "")
    return TransformerShape(
        cached_layers=full,
        windowed_layers=windowed,
        window=_find(config, "window") or 0,
        cached_values=cached,
        hidden=hidden,
        attention=(heads * head_size, kv_heads * head_size),
        heads=heads,
        intermediate=_find(config, "intermediate") or 4 * hidden,
        gated=activation in _GATED_ACTIVATIONS and family not in _UNGATED,
        vocabulary=0 if is_encoder(config) else _find(config, "vocabulary") or 0,
        longest=_find(config, "longest"),
    )


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether the model reads its whole input at once and keeps no keys and values between calls."""
    names = [str(name) for name in config.get("architectures") or ()]
    if any(name.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")) for name in names):
        return False
    return str(config.get("model_type", "")) in _ENCODERS


def _split_layers(config: Mapping[str, Any], layers: int) -> tuple[int, int]:
    """Layers that keep the whole context, and those that keep a window of it; linear attention keeps neither."""
    if is_encoder(config):
        return 0, 0
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and kinds:
        full = sum(kind in ("full_attention", "attention", "global_attention") for kind in kinds)
        return full, sum(kind in ("sliding_attention", "chunked_attention", "local_attention") for kind in kinds)
    windowed = bool(_find(config, "window")) and config.get("use_sliding_window", True)
    return (0, layers) if windowed else (layers, 0)


def _find(config: Mapping[str, Any], name: str) -> int | None:
    for key in _NAMES[name]:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _need(config: Mapping[str, Any], name: str) -> int:
    value = _find(config, name)
    if value is None:
        raise ModelError(
            f"the configuration has no positive integer under any of {', '.join(_NAMES[name])}; "
            "it is needed for the size of activations and of the key/value cache"
        )
    return value


def cache_bytes(shape: TransformerShape, name: str, *, batch: int, context: int) -> int:
    """Bytes of the key/value cache when it is full.

    Args:
        shape: of the model; query heads that share keys and values count once.
        name: format of the cached numbers; formats with scales have one float16 scale per 32 numbers.
        batch: sequences at once.
        context: tokens of each.
    """
    spec = QuantSpec.parse(name if FORMATS[name].is_cast else f"{name}/group32")
    tokens = shape.cached_layers * context + shape.windowed_layers * min(context, shape.window or context)
    return round(batch * tokens * shape.cached_values * spec.bits_per_value((1, shape.cached_values)) / 8)


def activation_bytes(shape: TransformerShape, name: str, *, batch: int, context: int) -> int:
    """Largest memory of the values between layers while a whole context is read in one pass.

    The residual stream, and beside it the widest of: queries, keys, values and attention output; the normalised
    input and the feed-forward network's inner values; the logits of the last token. Attention scores are not counted:
    fused attention never stores them (see `score_bytes`).

    Args:
        shape: of the model.
        name: format of the activations, without scales.
        batch: sequences at once.
        context: tokens of each.
    """
    queries, keys = shape.attention
    attention = 2 * queries + 2 * keys
    feed_forward = shape.hidden + shape.intermediate * (3 if shape.gated else 2)
    values = batch * context * (shape.hidden + max(attention, feed_forward))
    values = max(values, batch * (shape.hidden * context + shape.vocabulary))
    return values * FORMATS[name].bits // 8


def score_bytes(shape: TransformerShape, name: str, *, batch: int, context: int) -> int:
    """Bytes of one layer's attention scores [batch, heads, context, context], where attention is not fused."""
    return batch * shape.heads * context * context * FORMATS[name].bits // 8


def weight_matrix(shape: tuple[int, ...]) -> tuple[int, int] | None:
    """(rows, columns) of a weight tensor as recipes see it, or None for a vector or scalar, which is kept."""
    if len(shape) < 2 or prod(shape) == 0:
        return None
    return shape[0], prod(shape[1:])
