"""Rewrites of weights and biases that make a layer easier to quantize, or mend it after. Sees tensors, never models."""

from narrowcast.transforms.bias_correction import ChannelError
from narrowcast.transforms.fold_batchnorm import BatchNormStatistics, fold_batchnorm
from narrowcast.transforms.input_scales import channel_scales, fold_input_scales, with_headroom

__all__ = [
    "BatchNormStatistics",
    "ChannelError",
    "channel_scales",
    "fold_batchnorm",
    "fold_input_scales",
    "with_headroom",
]
