"""QuantizedConv: 1-D and 2-D convolutions and 2-D transposed convolutions with a quantized weight.

The weight matrix is [out_channels, in_channels / groups * kernel] in PyTorch's order. A transposed convolution is
held as the ordinary convolution that it is on the zero-inserted input: channels exchanged, kernel flipped
(Dumoulin & Visin 2016, arXiv:1603.07285, chapter 4), so one integer kernel serves both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from narrowcast.core import QuantizedTensor, QuantSpec, pack
from narrowcast.errors import DataError, FormatError
from narrowcast.kernels import kernel_name
from narrowcast.kernels.reference import LONGEST_SUM
from narrowcast.kernels.reference_conv import conv_plan
from narrowcast.nn.activation import FLOAT, Activation
from narrowcast.nn.base import QuantizedModule
from narrowcast.nn.linear import is_int8_per_channel


@dataclass(frozen=True)
class ConvShape:
    """The geometry of a convolution, always with two spatial dimensions (a 1-D one has height 1).

    Args:
        dimensions: 1 or 2 spatial dimensions of the input.
        in_channels, out_channels, groups: as in torch.
        kernel, stride, dilation: (height, width).
        padding: (top, left, bottom, right); for a transposed convolution torch's own padding, before conversion.
        output_padding: (height, width), transposed only.
        transposed: whether the float layer was a transposed convolution.
        padding_mode: "zeros", "reflect", "replicate" or "circular".
    """

    dimensions: int
    in_channels: int
    out_channels: int
    groups: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]
    output_padding: tuple[int, int] = (0, 0)
    transposed: bool = False
    padding_mode: str = "zeros"

    @classmethod
    def of(cls, module: nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d) -> ConvShape:
        """The geometry of a torch module."""
        dimensions = 1 if isinstance(module, nn.Conv1d) else 2
        kernel, stride, dilation = (_pair(v, 1) for v in (module.kernel_size, module.stride, module.dilation))
        if module.padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            top, left = total[0] // 2, total[1] // 2
            padding = (top, left, total[0] - top, total[1] - left)
        else:
            vertical, horizontal = (0, 0) if module.padding == "valid" else _pair(module.padding, 0)  # type: ignore[arg-type]
            padding = (vertical, horizontal, vertical, horizontal)
        transposed = isinstance(module, nn.ConvTranspose2d)
        output_padding = _pair(module.output_padding, 0) if transposed else (0, 0)
        return cls(
            dimensions, module.in_channels, module.out_channels, module.groups, kernel, stride, dilation, padding,
            output_padding, transposed, module.padding_mode,
        )  # fmt: skip

    @property
    def matrix(self) -> tuple[int, int]:
        """Shape of the weight matrix: (out_channels, in_channels / groups * kernel)."""
        return self.out_channels, self.in_channels // self.groups * self.kernel[0] * self.kernel[1]

    def to_matrix(self, weight: Tensor) -> Tensor:
        """The module's weight as the matrix [out_channels, in_channels / groups * kernel]."""
        if self.transposed:
            weight = weight.reshape(self.groups, self.in_channels // self.groups, -1, *self.kernel)
            weight = weight.transpose(1, 2).flip(-2, -1)
        return weight.reshape(self.matrix)

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """The inverse of `to_matrix`, in the layout torch's functional convolutions want (four dimensions)."""
        per_group = self.in_channels // self.groups
        if self.transposed:
            weight = matrix.reshape(self.groups, self.out_channels // self.groups, per_group, *self.kernel)
            return weight.transpose(1, 2).flip(-2, -1).reshape(self.in_channels, -1, *self.kernel)
        return matrix.reshape(self.out_channels, per_group, *self.kernel)

    def as_direct(self) -> tuple[tuple[int, int], tuple[int, int, int, int], tuple[int, int]]:
        """(stride, padding, upsample) of the ordinary convolution that the integer kernel runs."""
        if not self.transposed:
            return self.stride, self.padding, (1, 1)
        rest = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        top, left, bottom, right = self.padding
        return (1, 1), (rest[0] - top, rest[1] - left, rest[0] - bottom, rest[1] - right), self.stride

    def extra_padding(self, images: Tensor, output_size: list[int] | None) -> tuple[int, int]:
        """The output padding of a transposed convolution that gives `output_size`; its own where that is None."""
        if output_size is None:
            return self.output_padding
        wanted = list(output_size)[-2:]
        smallest = [
            (images.shape[2 + i] - 1) * self.stride[i] - self.padding[i] - self.padding[2 + i]
            + self.dilation[i] * (self.kernel[i] - 1) + 1
            for i in range(2)
        ]  # fmt: skip
        missing = wanted[0] - smallest[0], wanted[1] - smallest[1]
        if not all(0 <= missing[i] < self.stride[i] for i in range(2)):
            highest = [smallest[i] + self.stride[i] - 1 for i in range(2)]
            raise DataError(f"transposed convolution: output_size {wanted} is not between {smallest} and {highest}")
        return missing

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` takes them back."""
        return dict(vars(self))  # asdict copies deeply, which a load would pay for each layer

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ConvShape:
        """The geometry that `to_dict` described."""
        fields: dict[str, Any] = {k: tuple(value) if isinstance(value, list) else value for k, value in values.items()}
        return cls(**fields)


def _pair(value: int | tuple[int, ...], filler: int) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (filler, value[0]) if len(value) == 1 else (value[0], value[1])


class QuantizedConv(QuantizedModule):
    """A convolution with a quantized weight.

    Args:
        spec: format of the weight.
        shape: geometry of the convolution.
        activation: treatment of the input; "dynamic" finds one range per sample.
        record: the weight; None leaves empty buffers on the meta device, for loading.
        bias: [out_channels] float32 or None; `has_bias` says so where the tensor comes later.
        channels_last: memory format of the output of the integer kernel.
    """

    kind = "Conv"
    weight_codes: Tensor | None
    kernel_panels: Tensor
    kernel_scale: Tensor
    kernel_zero_sum: Tensor
    bias: Tensor | None

    def __init__(
        self,
        spec: QuantSpec,
        shape: ConvShape,
        activation: Activation = FLOAT,
        *,
        record: QuantizedTensor | None = None,
        bias: Tensor | None = None,
        has_bias: bool = False,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        self.shape, self.channels_last = shape, channels_last
        self.add_input_ranges(activation)
        self.add_weight("weight", spec, shape.matrix, record)
        if bias is None and has_bias:
            bias = torch.empty(shape.out_channels, device="meta")
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.is_integer = activation.mode in ("dynamic", "static") and is_int8_per_channel(spec)
        if self.is_integer and shape.matrix[1] > LONGEST_SUM:
            raise FormatError(
                f"convolution: sums of {shape.matrix[1]} products can overflow 32 bits, {LONGEST_SUM} cannot; leave "
                "its input in float"
            )
        self._planned: tuple[Any, list[int]] | None = None
        if record is not None:
            self.prepare_()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizedConv:
        """See `InstalledModule`."""
        activation = Activation.from_dict(config["activation"])
        return cls(
            QuantSpec.parse(config["spec"]), ConvShape.from_dict(config["shape"]), activation,
            has_bias=config["bias"], channels_last=config["channels_last"],
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """See `InstalledModule`."""
        return {
            "spec": str(self.stored("weight").spec),
            "shape": self.shape.to_dict(),
            "activation": self.input_ranges().to_dict(),
            "bias": self.bias is not None,
            "channels_last": self.channels_last,
        }

    def prepare_(self) -> None:
        """Panels, row sums and scales for the integer kernel.

        The panels take the place of the stored codes in memory, which are unpacked from them exactly when asked for.
        """
        if not self.is_integer or self.weight_codes is None:
            return
        terms = self.kernel_terms("weight", groups=self.shape.groups)
        codes = terms.pop("kernel_codes")
        terms.setdefault("kernel_zero_sum", 128 * terms.pop("kernel_sum"))  # dynamic codes are int8 + 128
        terms["kernel_panels"] = torch.ops.narrowcast.conv2d_int8_pack(codes, self.shape.kernel, self.shape.groups)
        for name, tensor in terms.items():
            self.register_buffer(name, tensor, persistent=False)
        self.weight_codes = None

    def quantized_weights(self) -> dict[str, QuantizedTensor]:
        """See `QuantizedModule`."""
        with _codes_restored(self):
            return super().quantized_weights()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        with _codes_restored(self):
            super()._save_to_state_dict(destination, prefix, keep_vars)

    @property
    def weight(self) -> Tensor:
        """The float32 weight in torch's layout, computed anew at every access; writing to it has no effect."""
        with _codes_restored(self):
            weight = self.shape.from_matrix(self.float_weight("weight", groups=self.shape.groups))
        return weight.squeeze(-2) if self.shape.dimensions == 1 else weight

    @property
    def kernel(self) -> str:
        """See `QuantizedModule`."""
        if self.is_integer:
            return kernel_name("conv2d_int8")
        target = f" in {self.activation.spec}" if self.activation.mode == "cast" else ""
        return f"torch convolution{target}, weight dequantized at each call"

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """[batch, in_channels, *spatial] -> [batch, out_channels, *spatial] in x's dtype; unbatched input too."""
        unbatched = x.dim() == self.shape.dimensions + 1
        images = x.unsqueeze(0) if unbatched else x
        images = images.unsqueeze(-2) if self.shape.dimensions == 1 else images
        if images.shape[1] != self.shape.in_channels:  # panels are padded, so the op cannot tell 3 channels from 4
            raise DataError(f"convolution: the input has {images.shape[1]} channels, expected {self.shape.in_channels}")
        output_padding = self.shape.extra_padding(images, output_size)
        run = self._integer_forward if self.is_integer else self._float_forward
        y = run(self._padded(images), output_padding)
        y = y.squeeze(-2) if self.shape.dimensions == 1 else y
        return y.squeeze(0) if unbatched else y

    def _padded(self, images: Tensor) -> Tensor:
        if self.shape.padding_mode == "zeros":
            return images
        top, left, bottom, right = self.shape.padding
        return functional.pad(images, (left, right, top, bottom), mode=self.shape.padding_mode)

    def _integer_forward(self, images: Tensor, output_padding: tuple[int, int]) -> Tensor:
        static = self.input_scale is not None
        images = self.within_codes(images, 1) if static else images
        return torch.ops.narrowcast.conv2d_int8_planned(  # type: ignore[no-any-return]
            images, self.kernel_panels, self.kernel_scale, self.kernel_zero_sum, self.bias,
            self.kernel_input_inverse if static else None, self.kernel_input_zero if static else None,
            self._plan(output_padding),
        )  # fmt: skip

    def _plan(self, output_padding: tuple[int, int]) -> list[int]:
        """The integers of the op; made anew only when the output padding or the layout changes."""
        key = (output_padding, self.channels_last)
        if self._planned is None or self._planned[0] != key:
            shape = self.shape
            stride, padding, upsample = shape.as_direct()
            if shape.padding_mode != "zeros":
                padding = (0, 0, 0, 0)
            last = self.channels_last and shape.dimensions == 2
            plan = conv_plan(
                shape.kernel, stride, padding, shape.dilation, shape.groups, upsample, output_padding, last
            )
            self._planned = (key, plan)
        return self._planned[1]

    def _float_forward(self, images: Tensor, output_padding: tuple[int, int]) -> Tensor:
        shape, dtype = self.shape, images.dtype
        compute = dtype
        if self.activation.mode == "cast":
            assert self.activation.spec is not None
            compute = self.activation.spec.format.storage
        weight = shape.from_matrix(self.float_weight("weight", groups=shape.groups)).to(compute)
        bias = None if self.bias is None else self.bias.to(compute)
        images = images.to(compute)
        top, left, bottom, right = shape.padding if shape.padding_mode == "zeros" else (0, 0, 0, 0)
        if shape.transposed:
            y = functional.conv_transpose2d(
                images, weight, bias, shape.stride, (top, left), output_padding, shape.groups, shape.dilation
            )
            return y.to(dtype)
        if (top, left) != (bottom, right):
            images, top, left = functional.pad(images, (left, right, top, bottom)), 0, 0
        y = functional.conv2d(images, weight, bias, shape.stride, (top, left), shape.dilation, shape.groups)
        return y.to(dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        s = self.shape
        return (
            f"{s.in_channels}, {s.out_channels}, kernel={s.kernel}, stride={s.stride}, groups={s.groups}, "
            f"transposed={s.transposed}, weight={self.stored('weight').spec}, input={self.activation.mode}"
        )


@contextmanager
def _codes_restored(module: QuantizedConv) -> Iterator[None]:
    """While this lasts the stored codes are a buffer again, unpacked from the panels."""
    if module.weight_codes is not None:
        yield
        return
    shape, spec = module.shape, module.stored("weight").spec
    codes = torch.ops.narrowcast.conv2d_int8_unpack(
        module.kernel_panels, shape.out_channels, shape.in_channels // shape.groups, shape.kernel, shape.groups
    )
    module.weight_codes = pack(codes, spec.format) if spec.format.bits < 8 else codes
    try:
        yield
    finally:
        module.weight_codes = None
