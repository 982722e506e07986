"""Numbers and tensors: formats, granularity, the affine equation, packing and error metrics. Knows no model."""

from narrowcast.core.affine import (
    block_range,
    choose_scale,
    dequantize,
    nearest_scale,
    quantize,
    quantize_blocks,
    quantize_learned,
    round_scale,
    round_zero_point,
    split_int8_scale,
)
from narrowcast.core.channels import spread_channels
from narrowcast.core.codebook import nearest_levels
from narrowcast.core.formats import FORMATS, NumberFormat, all_finite, number_format
from narrowcast.core.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    block_shape,
    expand_to_matrix,
    from_blocks,
    parse_granularity,
    scale_shape,
    to_blocks,
)
from narrowcast.core.metrics import bits_per_weight, cosine, kl_divergence, sqnr_db
from narrowcast.core.packing import pack, packed_width, unpack
from narrowcast.core.pieces import pieces
from narrowcast.core.rounding import distinct_levels, fake_quantize, integer_steps_, range_gradients, through
from narrowcast.core.spec import SCALE_FORMATS, QuantSpec
from narrowcast.core.super_blocks import split_super_scale, spread_super_scale
from narrowcast.core.tensor import QuantizedTensor, dequantize_blocks, level_values

__all__ = [
    "FORMATS",
    "SCALE_FORMATS",
    "Granularity",
    "NumberFormat",
    "PerBlock",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QuantSpec",
    "QuantizedTensor",
    "all_finite",
    "bits_per_weight",
    "block_range",
    "block_shape",
    "choose_scale",
    "cosine",
    "dequantize",
    "dequantize_blocks",
    "distinct_levels",
    "expand_to_matrix",
    "fake_quantize",
    "from_blocks",
    "integer_steps_",
    "kl_divergence",
    "level_values",
    "nearest_levels",
    "nearest_scale",
    "number_format",
    "pack",
    "packed_width",
    "parse_granularity",
    "pieces",
    "quantize",
    "quantize_blocks",
    "quantize_learned",
    "range_gradients",
    "round_scale",
    "round_zero_point",
    "scale_shape",
    "split_int8_scale",
    "split_super_scale",
    "spread_channels",
    "spread_super_scale",
    "sqnr_db",
    "through",
    "to_blocks",
    "unpack",
]
