"""OutlierLinear: a linear layer whose few largest input channels are multiplied in float, all others in integers.

Paper: Dettmers et al. 2022, "LLM.int8()" (arXiv:2208.07339), section 3.2. With O the outlier channels,

    y = dequantize(quantize(x without O) quantize(W without O)^T) + x[O] W[:, O]^T + b.

Departures: O is fixed by calibration and not sought in every call, so W[:, O] is stored as float16 once and nothing of
it in integers; the channels of O are set to 0 in the integer product, which keeps the width and its groups, and 0 is
exact in every format of inputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from narrowcast.core import QuantizedTensor, QuantSpec
from narrowcast.errors import FormatError
from narrowcast.kernels.reference_linear import FUSED
from narrowcast.nn.activation import FLOAT, Activation
from narrowcast.nn.linear import QuantizedLinear

# what one outlier channel takes besides its column of float16: its index, int64
_INDEX_BITS = 64


def outlier_bits(rows: int, count: int) -> int:
    """Bits that `count` outlier channels of a weight with `rows` rows add to it."""
    return count * (16 * rows + _INDEX_BITS)


class OutlierLinear(QuantizedLinear):
    """A quantized linear layer with some columns in float16.

    Args:
        spec: format of the other columns.
        shape: (out_features, in_features), outlier columns included.
        activation: treatment of the input, found at run time; its `outliers` are the channels kept in float.
        record: the weight, 0 in the outlier columns; None leaves empty buffers on the meta device, for loading.
        columns: [out_features, outliers] float, the outlier columns; None together with `record`.
        bias, has_bias, fused: as in `QuantizedLinear`.

    Raises:
        FormatError: the input is not found at run time, or a column does not fit float16.
    """

    kind = "OutlierLinear"
    outlier_index: Tensor
    outlier_columns: Tensor

    def __init__(
        self,
        spec: QuantSpec,
        shape: tuple[int, int],
        activation: Activation = FLOAT,
        *,
        record: QuantizedTensor | None = None,
        columns: Tensor | None = None,
        bias: Tensor | None = None,
        has_bias: bool = False,
        fused: str = "none",
    ) -> None:
        super().__init__(spec, shape, activation, record=record, bias=bias, has_bias=has_bias, fused=fused)
        if activation.mode not in ("dynamic", "asymmetric") or activation.outliers is None:
            raise FormatError("outlier channels go with inputs like 'int8/token', whose ranges are found at run time")
        if (record is None) != (columns is None):
            raise FormatError("a linear layer with outliers needs both its quantized and its float columns, or neither")
        stored = torch.empty(shape[0], activation.outliers.numel(), dtype=torch.float16, device="meta")
        if columns is not None:
            stored = columns.detach().to(torch.float16).contiguous()
            if not bool(torch.isfinite(stored).all()):
                raise FormatError("an outlier column holds a weight above 65504, which float16 does not have")
        self.register_buffer("outlier_index", activation.outliers.to(torch.int64))
        self.register_buffer("outlier_columns", stored)
        if record is not None:
            self.prepare_()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> OutlierLinear:
        """See `InstalledModule`."""
        spec = Activation.from_dict(config["activation"]).spec
        index = torch.empty(int(config["outliers"]), dtype=torch.int64, device="meta")
        rows, columns = config["shape"]
        return cls(
            QuantSpec.parse(config["spec"]), (rows, columns), Activation(spec, outliers=index), has_bias=config["bias"],
            fused=config.get("fused", "none"),
        )  # fmt: skip

    def config(self) -> dict[str, Any]:
        """See `InstalledModule`."""
        return super().config() | {"outliers": self.outlier_index.numel()}

    def prepare_(self) -> None:
        """See `QuantizedLinear`; the float columns are widened once, [outliers, out_features]."""
        super().prepare_()
        if "outlier_columns" in self._buffers:  # not yet, when the base class calls
            self.register_buffer("kernel_columns", self.outlier_columns.t().float().contiguous(), persistent=False)

    @property
    def fused(self) -> str:
        """The activation function that follows; applied here, when both parts are added."""
        name: str = self.__dict__["_after"]
        return name

    @fused.setter
    def fused(self, name: str) -> None:
        self.__dict__["_after"] = name
        self.__dict__["fused"] = "none"  # what the integer op of the base class reads

    @property
    def weight(self) -> Tensor:
        """See `QuantizedLinear`."""
        return self.float_weight("weight").index_copy(1, self.outlier_index, self.outlier_columns.float())

    @property
    def kernel(self) -> str:
        """See `QuantizedModule`."""
        return f"{super().kernel}, and {self.outlier_index.numel()} of {self.in_features} inputs in torch mm"

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features] in the dtype of `x`."""
        y = super().forward(x.index_fill(-1, self.outlier_index, 0.0))
        part = x.index_select(-1, self.outlier_index).float() @ self.get_buffer("kernel_columns")
        return FUSED[self.fused](y + part.to(y.dtype))

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{super().extra_repr()}, outliers={self.outlier_index.numel()}"
