"""QuantizedLinear: y = x W^T + b with W in any format, as one op call where an integer kernel exists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from narrowcast.core import PerChannel, PerTensor, QuantizedTensor, QuantSpec
from narrowcast.errors import DataError
from narrowcast.kernels import kernel_name
from narrowcast.nn.activation import FLOAT, INTEGER_MODES, Activation
from narrowcast.nn.base import QuantizedModule, StoredWeight
from narrowcast.nn.weight_only import weight_only_kernel, weight_only_linear


def is_int8_per_channel(spec: QuantSpec) -> bool:
    """Whether the int8 kernels can run this weight: symmetric integer codes of at most 8 bits, one scale per row."""
    return spec.format.kind == "int" and spec.symmetric and isinstance(spec.granularity, PerChannel | PerTensor)


def linear_op(spec: QuantSpec, shape: tuple[int, int], mode: str) -> str | None:
    """The integer op that multiplies a weight of `spec` with inputs of `mode`; None where there is none."""
    if mode not in INTEGER_MODES:
        return None
    if mode == "dynamic" and StoredWeight("weight", spec, shape).runs_as_int4():
        return "linear_int4_dynamic"
    if is_int8_per_channel(spec):
        return "linear_int8_static" if mode == "static" else "linear_int8_dynamic"
    return None


class QuantizedLinear(QuantizedModule):
    """A linear layer with a quantized weight.

    Args:
        spec: format of the weight.
        shape: (out_features, in_features).
        activation: treatment of the input.
        record: the weight; None leaves empty buffers on the meta device, for loading.
        bias: [out_features] float32 or None; `has_bias` says so where the tensor comes later.
    """

    kind = "Linear"
    weight_codes: Tensor
    bias: Tensor | None

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, int],
        activation: Activation = FLOAT,
        *,
        record: QuantizedTensor | None = None,
        bias: Tensor | None = None,
        has_bias: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = shape
        self.add_input_ranges(activation)
        self.add_weight("weight", spec, shape, record)
        if bias is None and has_bias:
            bias = torch.empty(shape[0], device="meta")
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._symmetric = activation.mode == "dynamic"
        self._op = linear_op(spec, shape, activation.mode)
        if record is not None:
            self.prepare_()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizedLinear:
        """See `InstalledModule`."""
        activation = Activation.from_dict(config["activation"])
        rows, columns = config["shape"]
        return cls(QuantSpec.parse(config["spec"]), (rows, columns), activation, has_bias=config["bias"])

    def config(self) -> dict[str, Any]:
        """See `InstalledModule`."""
        return {
            "spec": str(self.stored("weight").spec),
            "shape": [self.out_features, self.in_features],
            "activation": self.input_ranges().to_dict(),
            "bias": self.bias is not None,
        }

    def prepare_(self) -> None:
        """Row sums and flat scales for the int8 kernels; the codes themselves are used as they are stored."""
        if self._op not in ("linear_int8_dynamic", "linear_int8_static"):
            return
        for name, tensor in self.kernel_terms("weight").items():
            self.register_buffer(name, tensor, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The float32 weight [out_features, in_features], computed at every access; writing to it has no effect."""
        return self.float_weight("weight")

    @property
    def kernel(self) -> str:
        """See `QuantizedModule`."""
        if self._op is not None:
            return kernel_name(self._op)
        native = weight_only_kernel(self.stored("weight"))
        if self.activation.mode == "float" and native is not None:
            return native
        target = f" in {self.activation.spec}" if self.activation.mode == "cast" else ""
        return f"torch linear{target}, weight dequantized at each call"

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in the dtype of `x`."""
        if self._op == "linear_int8_dynamic":
            return torch.ops.narrowcast.linear_int8_dynamic(  # type: ignore[no-any-return]
                x, self.kernel_codes, self.kernel_scale, self.kernel_sum, self.bias, self._symmetric
            )
        if self._op == "linear_int8_static":
            return torch.ops.narrowcast.linear_int8_static(  # type: ignore[no-any-return]
                x, self.kernel_codes, self.kernel_scale, self.kernel_zero_sum, self.bias,
                self.kernel_input_inverse, self.kernel_input_zero,
            )  # fmt: skip
        if self._op == "linear_int4_dynamic":
            if x.shape[-1] != self.in_features:  # the packed rows of an odd width and the next look alike to the op
                raise DataError(f"linear layer: the input has {x.shape[-1]} features, expected {self.in_features}")
            return torch.ops.narrowcast.linear_int4_dynamic(  # type: ignore[no-any-return]
                x, self.weight_codes, self.weight_scale, getattr(self, "weight_zero_point", None), self.bias,
                self.stored("weight").group,
            )  # fmt: skip
        return self._float_forward(x)

    def _float_forward(self, x: Tensor) -> Tensor:
        if self.activation.mode == "cast":
            assert self.activation.spec is not None
            dtype = self.activation.spec.format.storage
            bias = None if self.bias is None else self.bias.to(dtype)
            weight = self.weight_codes if self.weight_codes.dtype == dtype else self.weight.to(dtype)
            return functional.linear(x.to(dtype), weight, bias).to(x.dtype)
        if (y := weight_only_linear(self.stored("weight"), self, x, self.bias)) is not None:
            return y
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        spec = self.stored("weight").spec
        return f"{self.in_features}, {self.out_features}, weight={spec}, input={self.activation.mode}"
