"""Modules that take the place of float ones: one op call each, weights as records, settings as JSON."""

from narrowcast.nn.activation import FLOAT, INTEGER_MODES, Activation, activation_mode, activation_spec
from narrowcast.nn.attention import MultiheadAttention
from narrowcast.nn.base import InstalledModule, QuantizedModule, StoredWeight
from narrowcast.nn.conv import ConvShape, QuantizedConv
from narrowcast.nn.embedding import QuantizedEmbedding
from narrowcast.nn.experts import ExpertsShape, QuantizedExperts
from narrowcast.nn.folded import FoldedBatchNorm, FusedActivation
from narrowcast.nn.linear import QuantizedLinear, is_int8_per_channel, linear_op
from narrowcast.nn.outliers import OutlierLinear, outlier_bits
from narrowcast.nn.portable import is_portable, mark_portable_
from narrowcast.nn.recurrent import QuantizedRecurrent, RecurrentShape
from narrowcast.nn.training import DEFAULT_TRAINING, TRAINING, Training
from narrowcast.nn.weight_only import weight_only_kernel

MODULES: dict[str, type[InstalledModule]] = {
    module.kind: module
    for module in (
        QuantizedLinear,
        OutlierLinear,
        QuantizedConv,
        QuantizedEmbedding,
        QuantizedRecurrent,
        QuantizedExperts,
        MultiheadAttention,
        FoldedBatchNorm,
        FusedActivation,
    )
}

__all__ = [
    "DEFAULT_TRAINING",
    "FLOAT",
    "INTEGER_MODES",
    "MODULES",
    "TRAINING",
    "Activation",
    "ConvShape",
    "ExpertsShape",
    "FoldedBatchNorm",
    "FusedActivation",
    "InstalledModule",
    "MultiheadAttention",
    "OutlierLinear",
    "QuantizedConv",
    "QuantizedEmbedding",
    "QuantizedExperts",
    "QuantizedLinear",
    "QuantizedModule",
    "QuantizedRecurrent",
    "RecurrentShape",
    "StoredWeight",
    "Training",
    "activation_mode",
    "activation_spec",
    "is_int8_per_channel",
    "is_portable",
    "linear_op",
    "mark_portable_",
    "outlier_bits",
    "weight_only_kernel",
]
