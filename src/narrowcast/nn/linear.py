"""QuantizedLinear: y = x W^T + b with W in any format, as one op call where an integer kernel exists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from narrowcast.core import PerChannel, PerGroup, PerTensor, QuantizedTensor, QuantSpec
from narrowcast.errors import DataError, FormatError
from narrowcast.kernels import kernel_name
from narrowcast.kernels.reference_linear import FUSED, LOW_BIT_FORMATS, input_group_of
from narrowcast.nn.activation import FLOAT, INTEGER_MODES, Activation
from narrowcast.nn.base import QuantizedModule
from narrowcast.nn.interleaved import CALLS_BETWEEN, calls_before, interleave_, restore_
from narrowcast.nn.weight_only import weight_only_kernel, weight_only_linear

_INT8_DYNAMIC = torch.ops.narrowcast.linear_int8_dynamic.default
_INT8_STATIC = torch.ops.narrowcast.linear_int8_static.default
_LOW_BIT_DYNAMIC = torch.ops.narrowcast.linear_lowbit_dynamic.default


def is_int8_per_channel(spec: QuantSpec) -> bool:
    """Whether the int8 kernels can run this weight: symmetric integer codes of at most 8 bits, one scale per row."""
    return spec.format.kind == "int" and spec.symmetric and isinstance(spec.granularity, PerChannel | PerTensor)


def is_low_bit(spec: QuantSpec, columns: int) -> bool:
    """Whether the low-bit kernels read the codes of this weight as they are stored.

    That is so for 2 to 6 bits, nf4 and fp4 per row or in groups of a multiple of 16, and for symmetric int8 in such
    groups, with scales stored in float16 or float32, or in super-blocks without zero points between codes.
    """
    if spec.format.name not in LOW_BIT_FORMATS or spec.scale_format not in ("fp16", "fp32", "k6"):
        return False
    if not spec.symmetric and spec.zero_step != 1:
        return False
    grouped = isinstance(spec.granularity, PerGroup) and min(spec.granularity.size, columns) in (
        columns,
        spec.granularity.size // 16 * 16,
    )
    if spec.format.bits == 8:
        return grouped and spec.symmetric
    return grouped or isinstance(spec.granularity, PerChannel)


def linear_op(spec: QuantSpec, shape: tuple[int, int], mode: str) -> str | None:
    """The integer op that multiplies a weight of `spec` with inputs of `mode`; None where there is none."""
    if mode not in INTEGER_MODES:
        return None
    if mode == "dynamic" and is_low_bit(spec, shape[1]):
        return "linear_lowbit_dynamic"
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
        fused: the activation function that follows the layer, a name in `narrowcast.kernels.reference_linear.FUSED`.
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
        fused: str = "none",
    ) -> None:
        super().__init__()
        if fused not in FUSED:
            raise FormatError(f"linear layer: fused {fused!r} is not known; use one of {', '.join(FUSED)}")
        self.fused = fused
        self.out_features, self.in_features = shape
        self.add_input_ranges(activation)
        self.add_weight("weight", spec, shape, record)
        if bias is None and has_bias:
            bias = torch.empty(shape[0], device="meta")
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self._symmetric = activation.mode == "dynamic"
        self._op = linear_op(spec, shape, activation.mode)
        self._narrow = activation.mode == "static" and activation.code_high < 255
        group = self.stored("weight").group
        self.kernel_groups = (spec.format.name, group, input_group_of(group, shape[1]))
        # in super-blocks what `prepare_` has spread out
        middle = "kernel_" if self.stored("weight").expanded() else ""
        self.group_buffers = (f"weight_{middle}scale", f"weight_{middle}zero_point")
        self._calls_left = 0
        if record is not None:
            self.prepare_()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizedLinear:
        """See `InstalledModule`."""
        activation = Activation.from_dict(config["activation"])
        rows, columns = config["shape"]
        return cls(
            QuantSpec.parse(config["spec"]), (rows, columns), activation, has_bias=config["bias"],
            fused=config.get("fused", "none"),
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """See `InstalledModule`."""
        values = {
            "spec": str(self.stored("weight").spec),
            "shape": [self.out_features, self.in_features],
            "activation": self.input_ranges().to_dict(),
            "bias": self.bias is not None,
        }
        # left out where there is none, as in checkpoints from before there were any
        return values if self.fused == "none" else values | {"fused": self.fused}

    def prepare_(self) -> None:
        """Row sums and flat scales for the int8 kernels; the codes are used as they are stored for the first call."""
        self.restore_layout_()
        super().prepare_()
        if self._op in ("linear_int8_dynamic", "linear_int8_static"):
            for name, tensor in self.kernel_terms("weight").items():
                self.register_buffer(name, tensor, persistent=False)
        self._calls_left = calls_before(self, self._op)

    def restore_layout_(self) -> None:
        """See `QuantizedModule`; the next call but one interleaves the weight again."""
        restore_(self)
        self._calls_left = calls_before(self, self._op)

    @property
    def weight(self) -> Tensor:
        """The float32 weight [out_features, in_features], computed at every access; writing to it has no effect."""
        return self.float_weight("weight")

    @property
    def kernel(self) -> str:
        """See `QuantizedModule`."""
        if self._op is not None:
            return kernel_name(self._op) + ("" if self.fused == "none" else f" with {self.fused}")
        native = weight_only_kernel(self.stored("weight"))
        if self.activation.mode == "float" and native is not None:
            return native
        target = f" in {self.activation.spec}" if self.activation.mode == "cast" else ""
        return f"torch linear{target}, weight dequantized at each call"

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in the dtype of `x`."""
        # Read past nn.Module's attribute look-up, which takes 0.3 us for every buffer of an op that takes 5 us.
        own = self.__dict__
        op = own["_op"]
        if own["_calls_left"] and not torch.compiler.is_compiling():
            self._count_call()
        buffers = own["_buffers"]
        if op == "linear_int8_dynamic":
            return _INT8_DYNAMIC(  # type: ignore[no-any-return]
                x, buffers["kernel_codes"], buffers["kernel_scale"], buffers["kernel_sum"], buffers["bias"],
                own["_symmetric"], own["fused"],
            )  # fmt: skip
        if op == "linear_lowbit_dynamic":
            if x.shape[-1] != own["in_features"]:  # packed rows of an odd width and the next look alike to the op
                raise DataError(f"linear layer: the input has {x.shape[-1]} features, expected {self.in_features}")
            weight = buffers["weight_codes"]
            return _LOW_BIT_DYNAMIC(  # type: ignore[no-any-return]
                x, weight, *(buffers.get(name) for name in own["group_buffers"]), buffers["bias"],
                *own["kernel_groups"], own["fused"], own["out_features"] if weight.dim() == 4 else 0,
            )  # fmt: skip
        if op == "linear_int8_static":
            x = self.within_codes(x, -1) if own["_narrow"] else x
            return _INT8_STATIC(  # type: ignore[no-any-return]
                x, buffers["kernel_codes"], buffers["kernel_scale"], buffers["kernel_zero_sum"], buffers["bias"],
                buffers["kernel_input_inverse"], buffers["kernel_input_zero"], own["fused"],
            )  # fmt: skip
        y = weight_only_linear(self, x) if self.activation.mode == "float" else None
        return FUSED[self.fused](self._float_forward(x)) if y is None else y

    def _count_call(self) -> None:
        self._calls_left = max(self._calls_left - 1, 0)
        if self._calls_left == 0 and self._op is not None and not interleave_(self, self._op):
            self._calls_left = CALLS_BETWEEN

    def _float_forward(self, x: Tensor) -> Tensor:
        if self.activation.mode == "cast":
            assert self.activation.spec is not None
            dtype = self.activation.spec.format.storage
            bias = None if self.bias is None else self.bias.to(dtype)
            weight = self.weight_codes if self.weight_codes.dtype == dtype else self.weight.to(dtype)
            return functional.linear(x.to(dtype), weight, bias).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(x, self.weight.to(x.dtype), bias)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        spec = self.stored("weight").spec
        return f"{self.in_features}, {self.out_features}, weight={spec}, input={self.activation.mode}"
