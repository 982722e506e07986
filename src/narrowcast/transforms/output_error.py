"""The error of a quantized layer on a sample of its inputs, which is what a searched transform minimises."""

from __future__ import annotations

from torch import Tensor

from narrowcast.core import PerChannel, QuantSpec, quantize, spread_channels


def quantized_inputs(inputs: Tensor, spec: QuantSpec | None) -> Tensor:
    """Inputs as a quantized layer sees them.

    Args:
        inputs: [n, in] float32.
        spec: None for float inputs; per token, per tensor (the range of this sample) or a cast. Ranges per input
            channel follow any scale of the channel, so they are left out.
    """
    if spec is None or isinstance(spec.granularity, PerChannel) or not spec.format.scaled:
        return inputs
    return quantize(inputs, spec).dequantize()


def linear_error(weight: Tensor, changed: Tensor, inputs: Tensor, changed_inputs: Tensor) -> float:
    """Sum of squares of `changed_inputs @ changed.T - inputs @ weight.T`.

    Args:
        weight: [out, in] float32.
        changed: [out, in] what stands for it.
        inputs: [n, in] float32.
        changed_inputs: [n, in] what stands for them.
    """
    return float((changed_inputs @ changed.t() - inputs @ weight.t()).double().square().sum())


def diagonal_error(weight: Tensor, changed: Tensor, inputs: Tensor, scale: Tensor, groups: int = 1) -> float:
    """The expected error of a convolution whose input channels are taken as uncorrelated: sum_j d_j^2 E[x_j^2] n.

    Args:
        weight: [out, in / groups * kernel] float32.
        changed: of that shape, for inputs divided by `scale`.
        inputs: [n, in] float32, positions of the image.
        scale: [in] float.
        groups: groups of the convolution.
    """
    shape = (weight.shape[0], weight.shape[1])
    back = changed.double() / spread_channels(scale.double(), shape, groups)
    energy = spread_channels(inputs.double().square().sum(0), shape, groups)
    return float(((back - weight.double()).square() * energy).sum())
