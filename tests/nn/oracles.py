"""What a quantized module should answer, computed by torch from dequantized weights and fake-quantized inputs."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from torch import Tensor, nn

from narrowcast.core import QuantizedTensor, QuantSpec, quantize
from narrowcast.nn import Activation

CAST = {"fp16": torch.float16, "bf16": torch.bfloat16}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def record(weight: Tensor, spec: str) -> QuantizedTensor:
    return quantize(weight.detach().float(), QuantSpec.parse(spec))


def static_activation(x: Tensor, channel_dim: int, *, per_channel: bool, format: str = "uint8") -> Activation:
    """A static range for `x`, one for all or one for each channel, with a zero point that is not trivial."""
    rows = x.movedim(channel_dim, -1).flatten(0, -2)
    low, high = rows.amin(0).clamp(max=0), rows.amax(0).clamp(min=0)
    if not per_channel:
        low, high = low.min().view(1), high.max().view(1)
    spec = QuantSpec.parse(f"{format}/channel" if per_channel else f"{format}/tensor")
    scale = ((high - low) / spec.format.high).clamp(min=1e-6)
    return Activation(spec, scale, (-low / scale).round().to(torch.uint8))


def taken_in(weight: Tensor, activation: Activation, spread: Callable[[Tensor], Tensor]) -> Tensor:
    """The weight that goes with ranges per channel: multiplied by each channel's scale relative to the largest."""
    ratio = activation.ratio()
    return weight if ratio is None else weight * spread(ratio)


def as_the_kernel_sees(x: Tensor, activation: Activation, channel_dim: int, *, group: int = 0) -> Tensor:
    """`x` after quantizing and dequantizing it: per token (`channel_dim` -1) or per sample, in groups where given."""
    if activation.mode == "static":
        shape = [1] * x.dim()
        shape[channel_dim] = -1
        scale = activation.scale.view(shape)
        zero = activation.zero_point.float().view(shape)
        return (((x * (1.0 / scale)).round() + zero).clamp(0, activation.code_high) - zero) * scale
    if activation.mode == "dynamic" and group:
        pieces = [as_the_kernel_sees(part, activation, channel_dim) for part in x.split(group, -1)]
        return torch.cat(pieces, -1)
    if activation.mode == "asymmetric":
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = high / 255 - low / 255
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
        zero = (-low * inverse).round().clamp(max=255)
        return (x * inverse).clamp(-zero, 255 - zero).round() * scale
    if activation.mode == "dynamic":
        dims = (-1,) if channel_dim == -1 else tuple(range(1, x.dim()))
        absmax = x.abs().amax(dims, keepdim=True)
        inverse = torch.where(absmax == 0, 0.0, torch.tensor(127.0) / absmax)
        return (x * inverse).round().clamp(-127, 127) * (absmax / 127)
    return x


def close(got: Tensor, expected: Tensor, part: float = 1e-5) -> None:
    """Equal up to `part` of the largest magnitude: only the order of float additions may differ."""
    got, expected = got.detach(), expected.detach()
    assert got.shape == expected.shape and got.dtype == expected.dtype
    bound = part * float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got, expected, atol=bound, rtol=0)


def restored(module: nn.Module) -> nn.Module:
    """The module rebuilt from its settings and stored tensors, as loading does."""
    settings = json.loads(json.dumps(module.config()))
    fresh = type(module).from_config(settings)
    assert json.loads(json.dumps(fresh.config())) == settings
    fresh.load_state_dict(module.state_dict(), assign=True, strict=True)
    fresh.prepare_()
    return fresh.eval()
