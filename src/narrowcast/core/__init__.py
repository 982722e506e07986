"""Numbers and tensors: formats, granularity, the affine equation, packing and error metrics. Knows no model."""

from narrowcast.core.affine import (
    block_range,
    choose_scale,
    dequantize,
    nearest_scale,
    quantize,
    quantize_blocks,
    round_scale,
    split_int8_scale,
)
from narrowcast.core.channels import spread_channels
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
from narrowcast.core.rounding import clamp_steps, distinct_levels, fake_quantize, range_gradients, through
from narrowcast.core.spec import SCALE_FORMATS, QuantSpec
from narrowcast.core.tensor import QuantizedTensor, dequantize_blocks

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
    "clamp_steps",
    "cosine",
    "dequantize",
    "dequantize_blocks",
    "distinct_levels",
    "expand_to_matrix",
    "fake_quantize",
    "from_blocks",
    "kl_divergence",
    "nearest_scale",
    "number_format",
    "pack",
    "packed_width",
    "parse_granularity",
    "quantize",
    "quantize_blocks",
    "range_gradients",
    "round_scale",
    "scale_shape",
    "split_int8_scale",
    "spread_channels",
    "sqnr_db",
    "through",
    "to_blocks",
    "unpack",
]
