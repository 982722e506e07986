"""What every quantized module is: a module that knows its weights as records, its settings as JSON, and its kernel.

Saving and loading need nothing else. A module's persistent buffers are exactly what is stored on disk, in the
layout that is independent of any kernel; what a kernel wants besides is derived by `prepare_` and never stored.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from narrowcast.core import QuantizedTensor, QuantSpec, spread_channels
from narrowcast.nn.activation import Activation
from narrowcast.nn.stored_weight import KernelArguments, StoredWeight

__all__ = ["InstalledModule", "KernelArguments", "QuantizedModule", "StoredWeight", "row_sums"]


class InstalledModule(nn.Module):
    """Base of every module that narrowcast puts in the place of another; saving and loading rebuild it from this.

    Attributes:
        kind: the name in the table `MODULES` and in checkpoints.
    """

    kind: ClassVar[str]

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """Everything but the tensors and children, as plain JSON values; `from_config` takes it back."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: dict[str, Any]) -> InstalledModule:
        """A module of these settings whose tensors are on the meta device, to be filled by loading."""

    def prepare_(self) -> None:
        """Derive what the kernel wants besides the stored buffers; called after installing and after loading."""


class QuantizedModule(InstalledModule):
    """Base of the installed modules that hold quantized weights.

    Attributes:
        weight_names: the weights that the module holds, each as buffers `<name>_codes`, `<name>_scale`, ...
    """

    weight_names: tuple[str, ...] = ("weight",)
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    @property
    @abstractmethod
    def kernel(self) -> str:
        """The op and instruction set that runs, or the torch function where there is no op."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedModule:
        """Moves to devices as other modules do; `half()` and the like leave scales and biases as they are."""

        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        self.restore_layout_()
        super()._apply(keep_dtype, recurse)
        return self

    def quantized_weights(self) -> dict[str, QuantizedTensor]:
        """The weights as records, by name; codes unpacked, shapes [out, in * kernel]."""
        self.restore_layout_()
        return {name: self.stored(name).to_record(self) for name in self.weight_names}

    def restore_layout_(self) -> None:
        """Bring weights that a kernel keeps in a layout of its own back into the stored one; nothing else changes."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self.restore_layout_()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self.restore_layout_()
        super()._load_from_state_dict(*arguments)
        self._refresh_expanded()

    def prepare_(self) -> None:
        """Keep scales, zero points and levels in the form that the weight-only ops read, where that is a wider one."""
        for name in self.weight_names:
            if self.stored(name).expanded():
                for part, tensor in self.stored(name).expand(self).items():
                    self.register_buffer(f"{name}_kernel_{part}", tensor, persistent=False)

    def _refresh_expanded(self) -> None:
        if any(f"{name}_kernel_scale" in self._buffers for name in self.weight_names):
            QuantizedModule.prepare_(self)

    def stored(self, name: str) -> StoredWeight:
        """The description of one stored weight."""
        description: StoredWeight = self._stored[name]
        return description

    def add_input_ranges(self, activation: Activation) -> None:
        """Register the static ranges of the input as buffers; empty ones where the ranges are not static."""
        self.activation = Activation(activation.spec)
        self.register_buffer("input_scale", activation.scale)
        self.register_buffer("input_zero_point", activation.zero_point)

    def input_ranges(self) -> Activation:
        """The treatment of the input, with the ranges that the buffers hold."""
        return Activation(self.activation.spec, self.input_scale, self.input_zero_point)

    def within_codes(self, x: Tensor, channel_dim: int) -> Tensor:
        """The input as a kernel whose codes go to 255 may have it: clamped to what fewer static codes can say.

        Args:
            x: the input; what is not finite stays so, for the op to refuse.
            channel_dim: of the channels of `x`.
        """
        ranges = self.input_ranges()
        if ranges.scale is None or ranges.zero_point is None or ranges.code_high == 255:
            return x
        shape = [1] * x.dim()
        shape[channel_dim] = ranges.scale.numel()
        scale, zero = ranges.scale.view(shape), ranges.zero_point.view(shape).to(torch.float32)
        return (x.clamp(-zero * scale, (ranges.code_high - zero) * scale) + 0.0 * x).to(x.dtype)

    def kernel_terms(self, name: str, *, groups: int = 1) -> dict[str, Tensor]:
        """What the int8 kernels want of a weight besides panels: codes, output scale, sum of zero points, inverse.

        Args:
            name: the weight.
            groups: groups of a convolution.

        Returns:
            kernel_codes [out, in * kernel] int8; kernel_scale [out] float32, input scale included where it is static;
            kernel_zero_sum [out] int32: sum over the row of zero point times code, static inputs only;
            kernel_input_inverse and kernel_input_zero [1] or [channels], static inputs only.
        """
        stored = self.stored(name)
        record = stored.to_record(self)
        assert record.scale is not None
        codes = record.codes
        scale = record.scale.expand(codes.shape[0], 1).reshape(-1)
        terms = {"kernel_codes": codes, "kernel_sum": row_sums(codes)}
        if self.input_scale is not None and self.input_zero_point is not None:
            zero = self.input_zero_point.to(torch.int32)
            scale = scale * self.input_scale.max()
            terms["kernel_zero_sum"] = terms["kernel_sum"] * zero[0]
            if zero.numel() > 1:
                terms["kernel_zero_sum"] = row_sums(codes, spread_channels(zero, record.shape, groups))
            terms["kernel_input_inverse"] = 1.0 / self.input_scale
            terms["kernel_input_zero"] = zero
        return terms | {"kernel_scale": scale.contiguous()}

    def float_weight(self, name: str, *, groups: int = 1) -> Tensor:
        """The float32 weight [out, in * kernel] without the input scales that it has taken in."""
        self.restore_layout_()
        weight = self.stored(name).dequantize(self)
        ratio = self.input_ranges().ratio()
        return weight if ratio is None else weight / spread_channels(ratio, self.stored(name).shape, groups)

    def add_weight(self, name: str, spec: QuantSpec, shape: tuple[int, int], record: QuantizedTensor | None) -> None:
        """Register the buffers of one weight, filled from `record`, or empty on the meta device.

        Args:
            name: prefix of the buffers.
            spec: format of the weight.
            shape: (rows, columns) of the weight matrix.
            record: the weight; None registers empty buffers on the meta device.
        """
        if "_stored" not in self.__dict__:
            self._stored: dict[str, StoredWeight] = {}
        stored = StoredWeight(name, spec, shape)
        self._stored[name] = stored
        tensors = stored.encode(record) if record is not None else stored.empty()
        for suffix, tensor in tensors.items():
            self.register_buffer(f"{name}_{suffix}", tensor)


def row_sums(codes: Tensor, factors: Tensor | None = None) -> Tensor:
    """Sum over each row of codes, times their factors where given, [rows] int32.

    In strips: torch widens what it sums, and four more bytes per weight all at once is a second copy of the model.

    Args:
        codes: [rows, columns] int8.
        factors: [1 or rows, columns] int32.
    """
    height = max(1, (1 << 16) // max(codes.shape[1], 1))
    # into one tensor: small results that live on between the strips keep the allocator from using their memory again
    sums = codes.new_zeros(codes.shape[0], dtype=torch.int32)
    for start in range(0, codes.shape[0], height):
        strip = codes[start : start + height]
        if factors is not None:
            strip = strip.to(torch.int32) * (factors if factors.shape[0] == 1 else factors[start : start + height])
        torch.sum(strip, 1, dtype=torch.int32, out=sums[start : start + height])
    return sums
