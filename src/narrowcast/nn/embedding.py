"""QuantizedEmbedding: a table whose rows are dequantized as they are looked up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from narrowcast.core import FORMATS, QuantizedTensor, QuantSpec
from narrowcast.kernels import kernel_name
from narrowcast.nn.base import QuantizedModule

_NAMES = {FORMATS[name].storage: name for name in ("fp32", "fp16", "bf16")}


class QuantizedEmbedding(QuantizedModule):
    """An embedding table in a number format.

    Args:
        spec: format of the table.
        shape: (num_embeddings, embedding_dim).
        record: the table; None leaves empty buffers on the meta device, for loading.
        padding_idx: kept for code that reads it; it has no effect on inference.
        dtype: of the rows that are looked up: float32, or float16 or bfloat16 as the float table's.
    """

    kind = "Embedding"

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, int],
        *,
        record: QuantizedTensor | None = None,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = shape
        self.padding_idx, self.dtype = padding_idx, dtype
        self.add_weight("weight", spec, shape, record)
        if record is not None:
            self.prepare_()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizedEmbedding:
        """See `InstalledModule`."""
        rows, columns = config["shape"]
        dtype = FORMATS[config["dtype"]].storage
        return cls(QuantSpec.parse(config["spec"]), (rows, columns), padding_idx=config["padding_idx"], dtype=dtype)

    def config(self) -> dict[str, Any]:
        """See `InstalledModule`."""
        shape = [self.num_embeddings, self.embedding_dim]
        spec, dtype = str(self.stored("weight").spec), _NAMES[self.dtype]
        return {"spec": spec, "shape": shape, "padding_idx": self.padding_idx, "dtype": dtype}

    @property
    def weight(self) -> Tensor:
        """The table in `dtype`, computed anew at every access; writing to it has no effect."""
        return self.stored("weight").dequantize(self).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedEmbedding:
        # a model that is cast looks up rows of its new type
        dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self.dtype = dtype if dtype in _NAMES else self.dtype
        super()._apply(fn, recurse)
        return self

    @property
    def kernel(self) -> str:
        """See `QuantizedModule`."""
        reads = self.stored("weight").has_kernel()
        return kernel_name("embedding_rows") if reads else "torch row lookup, rows dequantized at each call"

    def forward(self, indices: Tensor) -> Tensor:
        """[...] integer -> [..., embedding_dim] in `dtype`."""
        rows = self._look_up(indices)
        return rows if rows.dtype == self.dtype else rows.to(self.dtype)

    def _look_up(self, indices: Tensor) -> Tensor:
        arguments = self.stored("weight").kernel_arguments(self)
        if arguments is not None:
            return torch.ops.narrowcast.embedding_rows(  # type: ignore[no-any-return]
                indices, *arguments, self.embedding_dim
            )
        return self._looked_up(indices)

    def _looked_up(self, indices: Tensor) -> Tensor:
        record = self.stored("weight").to_record(self)
        flat = indices.reshape(-1)
        if record.scale is None and record.levels is None:
            looked_up = QuantizedTensor(_rows(record.codes, flat), None, None, record.spec).dequantize()
        else:
            looked_up = record.dequantize().index_select(0, flat)
        return looked_up.reshape(*indices.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}, weight={self.stored('weight').spec}"


def _rows(codes: Tensor, flat: Tensor) -> Tensor:
    # index_select refuses negative indices, as an embedding does; it does not take float8
    if codes.dtype.itemsize == 1 and codes.dtype.is_floating_point:
        return codes.view(torch.uint8).index_select(0, flat).view(codes.dtype)
    return codes.index_select(0, flat)
