"""Bias correction: take the mean error that quantization leaves in every output channel out through the bias.

Source:
    Nagel et al. 2019, arXiv:1906.04721, section 4.2 (empirical variant). Differs: each layer is corrected on its own
    float inputs, and the measured mean is shrunk by its uncertainty (James & Stein 1961), so a small sample cannot put
    its own noise into the bias.
"""

from __future__ import annotations

from torch import Tensor

# Below this many positions the mean of an error says more of the sample than of the layer.
SMALLEST_SAMPLE = 64


def bias_correction(expected: Tensor, got: Tensor, channel_dim: int) -> Tensor | None:
    """What to add to the bias.

    Args:
        expected: the float layer's output.
        got: the quantized layer's output on the same input, same shape.
        channel_dim: the dimension of the output channels.

    Returns:
        [channels] float32; None where the sample is too small.
    """
    error = (expected.double() - got.double()).movedim(channel_dim, -1)
    rows = error.reshape(-1, error.shape[-1])
    if rows.shape[0] < SMALLEST_SAMPLE:
        return None
    mean = rows.mean(0)
    uncertainty = rows.var(0) / rows.shape[0]
    shrink = (1 - uncertainty / mean.square().clamp(min=1e-300)).clamp(min=0)
    return (mean * shrink).float()
