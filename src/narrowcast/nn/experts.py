"""QuantizedExperts: the experts of a mixture, fused in one weight each for up and down, multiplied as stored.

The float weight of transformers' mixtures is [experts, out, in] (or [experts, in, out]); here it is the matrix
[experts * out, in], so that every solver, format and kernel for linear layers serves it: an expert is a slice of rows,
and only the experts that a token is sent to are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from narrowcast.core import QuantizedTensor, QuantSpec
from narrowcast.errors import FormatError
from narrowcast.kernels import kernel_name
from narrowcast.kernels.capability import missing_library
from narrowcast.kernels.reference_linear import FUSED, input_group_of
from narrowcast.nn.activation import FLOAT, Activation
from narrowcast.nn.base import QuantizedModule, row_sums
from narrowcast.nn.linear import linear_op


@dataclass(frozen=True)
class ExpertsShape:
    """The geometry of a mixture's experts and what they compute between their two products.

    Args:
        experts: how many.
        hidden: width of what goes in and comes out.
        inner: width between the products.
        activation: a name in FUSED: gate and up are the halves of the first product and act(gate) * up follows; without
            a gate act(up). "" for the clamped form.
        gated: whether the first product has a gate.
        alpha, limit: of the clamped form (GPT-OSS), where gate and up alternate:
            (clamp(up) + 1) * gate * sigmoid(alpha * gate), gate at most and up within the limit.
        bias: whether both products have one.
    """

    experts: int
    hidden: int
    inner: int
    activation: str = "silu"
    gated: bool = True
    alpha: float = 0.0
    limit: float = 0.0
    bias: bool = False

    @property
    def first(self) -> str:
        """The parameter of the first product."""
        return "gate_up_proj" if self.gated else "up_proj"

    def weights(self) -> dict[str, tuple[int, int]]:
        """Shape [experts * out, in] of both matrices, by parameter."""
        wide = self.inner * (2 if self.gated else 1)
        return {
            self.first: (self.experts * wide, self.hidden),
            "down_proj": (self.experts * self.hidden, self.inner),
        }

    def between(self, first: Tensor) -> Tensor:
        """[tokens, first product] -> [tokens, inner]."""
        if not self.activation:
            gate, up = first[..., ::2].clamp(max=self.limit), first[..., 1::2].clamp(-self.limit, self.limit)
            return (up + 1) * gate * torch.sigmoid(gate * self.alpha)
        if not self.gated:
            return FUSED[self.activation](first)
        gate, up = first.chunk(2, dim=-1)
        return FUSED[self.activation](gate) * up


class QuantizedExperts(QuantizedModule):
    """The experts of a mixture with quantized weights, called like transformers' module.

    Args:
        shape: geometry.
        specs: format of each weight, by parameter.
        activation: treatment of both products' inputs: float, or found at run time.
        records: the weights; None leaves empty buffers on the meta device, for loading.
        biases: [experts, out] float32 by parameter, where there are any; needed with `records`.
    """

    kind = "Experts"

    def __init__(
        self,
        shape: ExpertsShape,
        specs: dict[str, QuantSpec],
        activation: Activation = FLOAT,
        *,
        records: dict[str, QuantizedTensor] | None = None,
        biases: dict[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        if shape.activation and shape.activation not in FUSED:
            raise FormatError(f"experts: activation {shape.activation!r} is not known; use one of {', '.join(FUSED)}")
        self.shape, self.num_experts = shape, shape.experts
        self.add_input_ranges(activation)
        self.weight_names = tuple(shape.weights())
        self._ops: dict[str, str | None] = {}
        for name, matrix in shape.weights().items():
            self.add_weight(name, specs[name], matrix, None if records is None else records[name])
            self._ops[name] = linear_op(specs[name], matrix, activation.mode)
            if shape.bias:
                empty = torch.empty(shape.experts, matrix[0] // shape.experts, device="meta")
                self.register_buffer(f"{name}_bias", empty if biases is None else biases[name].detach().float().clone())
        if records is not None:
            self.prepare_()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizedExperts:
        """See `InstalledModule`."""
        specs = {name: QuantSpec.parse(text) for name, text in config["specs"].items()}
        return cls(ExpertsShape(**config["shape"]), specs, Activation.from_dict(config["activation"]))

    def config(self) -> dict[str, Any]:
        """See `InstalledModule`."""
        return {
            "shape": dict(vars(self.shape)),
            "specs": {name: str(self.stored(name).spec) for name in self.weight_names},
            "activation": self.input_ranges().to_dict(),
        }

    def prepare_(self) -> None:
        """Row sums and flat scales for the int8 op; other ops read the weights as they are stored."""
        super().prepare_()
        for name in self.weight_names:
            if self._ops[name] != "linear_int8_dynamic":
                continue
            record = self.stored(name).to_record(self)
            assert record.scale is not None
            derived = {
                f"kernel_{name}": record.codes,
                f"kernel_scale_{name}": record.scale.expand(record.shape[0], 1).reshape(-1).contiguous(),
                f"kernel_sum_{name}": row_sums(record.codes),
            }
            for key, tensor in derived.items():
                self.register_buffer(key, tensor, persistent=False)

    @property
    def kernel(self) -> str:
        """See `QuantizedModule`."""
        ops = {self._ops[name] or self._float_op(name) for name in self.weight_names}
        return ", ".join(sorted(kernel_name(op) if op else "torch linear, weight dequantized" for op in ops)) + (
            " per expert"
        )

    def _float_op(self, name: str) -> str:
        return "linear_weight_only" if self.stored(name).has_kernel() and not missing_library() else ""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' answers.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: [tokens, k] integer, the experts of each token; an index of `num_experts` or more is nobody.
            top_k_weights: [tokens, k] float.

        Returns:
            [tokens, hidden] in the dtype of `hidden_states`; sums are float32, in ascending order of the experts.
        """
        total = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        for expert in top_k_index.unique().tolist():
            if expert >= self.num_experts:
                continue
            token, slot = torch.where(top_k_index == expert)
            inner = self.shape.between(self._multiply(self.shape.first, expert, hidden_states[token]))
            answer = self._multiply("down_proj", expert, inner) * top_k_weights[token, slot, None]
            total.index_add_(0, token, answer.float())
        return total.to(hidden_states.dtype)

    def _multiply(self, name: str, expert: int, x: Tensor) -> Tensor:
        """[tokens, in] times one expert's rows of a weight, plus its bias."""
        stored, op = self.stored(name), self._ops[name]
        height = stored.shape[0] // self.num_experts
        rows = slice(expert * height, (expert + 1) * height)
        bias = self.get_buffer(f"{name}_bias")[expert] if self.shape.bias else None
        own = self.__dict__["_buffers"]
        if op == "linear_int8_dynamic":
            terms = (own[f"{term}_{name}"][rows] for term in ("kernel", "kernel_scale", "kernel_sum"))
            symmetric = self.activation.mode == "dynamic"
            return torch.ops.narrowcast.linear_int8_dynamic(x, *terms, bias, symmetric, "none")  # type: ignore[no-any-return]
        if op == "linear_lowbit_dynamic":
            group = stored.group
            kept = f"{name}_kernel" if stored.expanded() else name
            zero_point = own.get(f"{kept}_zero_point")
            return torch.ops.narrowcast.linear_lowbit_dynamic(  # type: ignore[no-any-return]
                x, own[f"{name}_codes"][rows], own[f"{kept}_scale"][rows],
                None if zero_point is None else zero_point[rows], bias, stored.spec.format.name, group,
                input_group_of(group, stored.shape[1]), "none", 0,
            )  # fmt: skip
        arguments = stored.kernel_arguments(self) if self._float_op(name) else None
        if arguments is None or x.device.type != "cpu":
            weight = stored.dequantize(self)[rows].to(x.dtype)
            return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))
        codes, scale, zero_point, levels, bits, group = arguments
        if scale.shape[0] == stored.shape[0]:  # not one row of scales for all
            scale, zero_point = scale[rows], None if zero_point is None else zero_point[rows]
        own_levels = levels[rows] if levels is not None and levels.dim() == 3 else levels
        return torch.ops.narrowcast.linear_weight_only(  # type: ignore[no-any-return]
            x, codes[rows], scale, zero_point, own_levels, bias, bits, group, "none"
        )

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        specs = ", ".join(f"{name}={self.stored(name).spec}" for name in self.weight_names)
        return f"experts={self.num_experts}, hidden={self.shape.hidden}, inner={self.shape.inner}, {specs}"
