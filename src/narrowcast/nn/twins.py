"""The table of trainable twins: which quantized modules can be trained, and by what."""

from __future__ import annotations

from narrowcast.nn.base import QuantizedModule
from narrowcast.nn.trained import TrainedModule
from narrowcast.nn.trained_conv import TrainedConv
from narrowcast.nn.trained_embedding import TrainedEmbedding
from narrowcast.nn.trained_linear import TrainedLinear
from narrowcast.nn.trained_recurrent import TrainedRecurrent

TWINS: dict[type[QuantizedModule], type[TrainedModule]] = {
    twin.twin_of: twin for twin in (TrainedLinear, TrainedConv, TrainedEmbedding, TrainedRecurrent)
}
