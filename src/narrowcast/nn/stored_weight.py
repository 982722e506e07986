"""How one weight lies in buffers and files, and how the kernels that read stored weights take it."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn

from narrowcast.core import (
    PerBlock,
    PerChannel,
    PerGroup,
    QuantizedTensor,
    QuantSpec,
    packed_width,
    scale_shape,
    split_int8_scale,
    split_super_scale,
    spread_super_scale,
)
from narrowcast.core.formats import FORMATS, NumberFormat
from narrowcast.core.spec import SUPER_BITS
from narrowcast.errors import FormatError
from narrowcast.kernels import kernel_name  # noqa: F401  importing it defines torch.ops.narrowcast

KernelArguments = tuple[Tensor, Tensor, Tensor | None, Tensor | None, int, int]
"""codes, scale, zero_point, levels, bits and group of a stored weight, in the order of the weight-only ops."""


class StoredWeight:
    """How one weight lies in buffers and files: packed codes, scales in their own format, 8-bit zero points.

    Args:
        name: prefix of the buffers `<name>_codes`, `<name>_scale`, `<name>_outer_scale`, `<name>_zero_point`,
            `<name>_levels`.
        spec: format of the weight.
        shape: (rows, columns) of the weight matrix.
    """

    def __init__(self, name: str, spec: QuantSpec, shape: tuple[int, int]) -> None:
        self.name, self.spec, self.shape = name, spec, shape

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Buffer suffix -> (dtype, shape) of what is stored."""
        rows, columns = self.shape
        number = self.spec.format
        if number.bits < 8:
            parts: dict[str, tuple[torch.dtype, tuple[int, ...]]]
            parts = {"codes": (torch.uint8, (rows, packed_width(columns, number.bits)))}
        else:
            parts = {"codes": (number.storage, self.shape)}
        scales = scale_shape(self.spec.granularity, self.shape)
        if number.learned:
            parts["levels"] = (torch.float16, (*scales, 2**number.bits))
        if not number.scaled:
            return parts
        if self.spec.scale_format == "k6":
            return parts | self._super_layout(scales)
        kinds = {"fp32": torch.float32, "fp16": torch.float16, "e8m0": torch.uint8, "int8": torch.uint8}
        parts["scale"] = (kinds[self.spec.scale_format], scales)
        if self.spec.scale_format == "int8":
            parts["outer_scale"] = (torch.bfloat16, (scales[0], 1))
        if not self.spec.symmetric:
            parts["zero_point"] = (torch.uint8, scales)
        return parts

    def _super_layout(self, scales: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        packed: tuple[torch.dtype, tuple[int, ...]]
        packed = (torch.uint8, (scales[0], packed_width(scales[1], SUPER_BITS)))
        outer = (torch.float16, (scales[0], -(-scales[1] // self.spec.blocks_in_super)))
        zero_point = {} if self.spec.symmetric else {"zero_point": packed}
        return {"scale": packed, "outer_scale": outer, **zero_point}

    def empty(self) -> dict[str, Tensor]:
        """Buffers of the right dtype and shape on the meta device."""
        return {
            suffix: torch.empty(shape, dtype=dtype, device="meta") for suffix, (dtype, shape) in self.layout().items()
        }

    def encode(self, record: QuantizedTensor) -> dict[str, Tensor]:
        """The stored tensors of a record; zero points are stored as `zero_point - format.low`, an unsigned byte."""
        if record.spec != self.spec or record.shape != self.shape:
            raise FormatError(
                f"weight {self.name!r} is {self.spec} of shape {self.shape}, got {record.spec} of shape {record.shape}"
            )
        number = self.spec.format
        parts = {"codes": _pack(record.codes, number) if number.bits < 8 else record.codes.contiguous()}
        if record.scale is not None:
            parts |= self._encode_scale(record.scale)
        if record.levels is not None:
            parts["levels"] = record.levels.to(torch.float16)
        if record.zero_point is not None:
            fields = ((record.zero_point - int(number.low)) / self.spec.zero_step).to(torch.uint8)
            parts["zero_point"] = _pack_parts(fields) if self.spec.scale_format == "k6" else fields
        return parts

    def _encode_scale(self, scale: Tensor) -> dict[str, Tensor]:
        if self.spec.scale_format == "int8":
            codes, outer = split_int8_scale(scale)
            return {"scale": codes, "outer_scale": outer.to(torch.bfloat16)}
        if self.spec.scale_format == "k6":
            codes, outer = split_super_scale(scale, self.spec)
            return {"scale": _pack_parts(codes), "outer_scale": outer.to(torch.float16)}
        if self.spec.scale_format == "e8m0":
            return {"scale": FORMATS["e8m0"].encode(scale)}
        return {"scale": scale.to(torch.float16 if self.spec.scale_format == "fp16" else torch.float32)}

    def scale(self, owner: nn.Module) -> Tensor | None:
        """The scales of the buffers of `owner`, float32 [block_rows, block_columns]."""
        if not self.spec.format.scaled:
            return None
        stored: Tensor = getattr(owner, f"{self.name}_scale")
        if self.spec.scale_format == "e8m0":
            return FORMATS["e8m0"].decode(stored)
        if self.spec.scale_format == "int8":
            outer: Tensor = getattr(owner, f"{self.name}_outer_scale")
            return outer.to(torch.float32) * stored.to(torch.float32)
        if self.spec.scale_format == "k6":
            halves: Tensor = getattr(owner, f"{self.name}_outer_scale")
            codes = self._super_parts(stored)
            return codes.to(torch.float32) * spread_super_scale(halves.to(torch.float32), self.spec, codes.shape[1])
        return stored.to(torch.float32)

    def zero_point(self, owner: nn.Module) -> Tensor | None:
        """The zero points of the buffers of `owner`, [block_rows, block_columns] as a record has them."""
        if self.spec.symmetric:
            return None
        stored: Tensor = getattr(owner, f"{self.name}_zero_point")
        low = int(self.spec.format.low)
        if self.spec.scale_format != "k6":
            return stored.to(torch.int32) + low
        fields = self._super_parts(stored)
        return fields.to(torch.int32) + low if self.spec.zero_step == 1 else fields * self.spec.zero_step + low

    def _super_parts(self, stored: Tensor) -> Tensor:
        """The 6-bit scales or zero points [block_rows, block_columns] uint8."""
        blocks = scale_shape(self.spec.granularity, self.shape)[1]
        parts: Tensor = torch.ops.narrowcast.unpack_codes(stored, SUPER_BITS, 0, blocks, False)
        return parts

    def to_record(self, owner: nn.Module) -> QuantizedTensor:
        """The record that the buffers of `owner` hold."""
        number = self.spec.format
        codes: Tensor = getattr(owner, f"{self.name}_codes")
        if number.bits < 8:
            codes = _unpack(codes, number, self.shape[1])
        levels = getattr(owner, f"{self.name}_levels").to(torch.float32) if number.learned else None
        return QuantizedTensor(codes, self.scale(owner), self.zero_point(owner), self.spec, levels)

    def dequantize(self, owner: nn.Module) -> Tensor:
        """The float32 weight [rows, columns], by the native kernel where there is one for this format."""
        arguments = self.kernel_arguments(owner)
        if arguments is None:
            return self.to_record(owner).dequantize()
        return torch.ops.narrowcast.dequantize_weight(*arguments, self.shape[1])  # type: ignore[no-any-return]

    def has_kernel(self) -> bool:
        """Whether the weight-only ops read this format.

        That is one with scales or learned levels, each for a group of a row or, scales only, for all rows.
        """
        if self.spec.format.learned:
            return isinstance(self.spec.granularity, PerChannel | PerGroup)
        return self.spec.format.scaled and not isinstance(self.spec.granularity, PerBlock)

    def expanded(self) -> bool:
        """Whether the ops read scales, zero points or levels in a wider form than the stored one."""
        return self.has_kernel() and (self.spec.format.learned or self.spec.scale_format == "k6")

    def expand(self, owner: nn.Module) -> dict[str, Tensor]:
        """That form: what a module keeps beside its buffers, so that no call has to make it.

        Returns:
            scale [block_rows, block_columns] float32, of learned levels a row of ones; levels [block_rows,
            block_columns, 2^bits] float32; zero_point as the ops take it: uint8, or float16 between codes.
        """
        if self.spec.format.learned:
            levels: Tensor = getattr(owner, f"{self.name}_levels").to(torch.float32)
            return {"scale": levels.new_ones(1, levels.shape[1]), "levels": levels}
        scale, zero_point = self.scale(owner), self.zero_point(owner)
        assert scale is not None
        if zero_point is None:
            return {"scale": scale}
        fields = zero_point - int(self.spec.format.low)
        return {"scale": scale, "zero_point": fields.to(torch.uint8 if self.spec.zero_step == 1 else torch.float16)}

    def kernel_arguments(self, owner: nn.Module) -> KernelArguments | None:
        """The stored tensors as the weight-only ops take them; None for formats and blocks that they do not read.

        Returns:
            (codes, scale, zero_point, levels, bits, group): see `kernels.reference_weight_only.dequantize_weight`.
        """
        if not self.has_kernel():
            return None
        number = self.spec.format
        codes: Tensor = getattr(owner, f"{self.name}_codes")
        if self.expanded():
            return self._expanded_arguments(owner, codes)
        zero_point = None if self.spec.symmetric else getattr(owner, f"{self.name}_zero_point")
        stored: Tensor | None = getattr(owner, f"{self.name}_scale")
        scale = self.scale(owner) if self.spec.scale_format == "int8" else stored
        assert scale is not None
        levels = None
        if number.kind != "int":
            levels = kernel_levels(number.name).to(codes.device)
            codes = codes.view(torch.uint8)
        return codes, scale, zero_point, levels, number.bits, self.group

    def _expanded_arguments(self, owner: nn.Module, codes: Tensor) -> KernelArguments:
        kept = {part: getattr(owner, f"{self.name}_kernel_{part}", None) for part in ("scale", "zero_point", "levels")}
        parts = self.expand(owner) if kept["scale"] is None else kept
        number, levels = self.spec.format, parts.get("levels")
        if levels is None and number.kind != "int":
            levels = kernel_levels(number.name).to(codes.device)
        if number.kind != "int":
            codes = codes.view(torch.uint8)
        scale = parts["scale"]
        assert scale is not None
        return codes, scale, parts.get("zero_point"), levels, number.bits, self.group

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        granularity = self.spec.granularity
        return min(granularity.size, self.shape[1]) if isinstance(granularity, PerGroup) else self.shape[1]

    def runs_as_int4(self) -> bool:
        """Whether the int4 kernels read this weight as it is stored: groups of a multiple of 32, float16 scales."""
        if self.spec.format.name != "int4" or self.spec.scale_format != "fp16":
            return False
        granularity = self.spec.granularity
        if isinstance(granularity, PerGroup):
            return self.group % 32 == 0 or self.group == self.shape[1]
        return isinstance(granularity, PerChannel)


def _pack_parts(fields: Tensor) -> Tensor:
    packed: Tensor = torch.ops.narrowcast.pack_codes(fields, SUPER_BITS, 0)
    return packed


def _pack(codes: Tensor, number: NumberFormat) -> Tensor:
    packed: Tensor = torch.ops.narrowcast.pack_codes(codes, number.bits, _field_offset(number))
    return packed


def _unpack(packed: Tensor, number: NumberFormat, columns: int) -> Tensor:
    codes: Tensor = torch.ops.narrowcast.unpack_codes(
        packed, number.bits, _field_offset(number), columns, number.storage == torch.int8
    )
    return codes


def _field_offset(number: NumberFormat) -> int:
    """The code whose packed field is 0."""
    return int(number.low) if number.kind == "int" else 0


@lru_cache
def kernel_levels(name: str) -> Tensor:
    """The float32 value of every field of a format that is not of integers."""
    number = FORMATS[name]
    return number.decode(torch.arange(2**number.bits, dtype=torch.uint8).view(number.storage))
