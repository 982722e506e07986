"""Multi-head attention taken apart: the float function of `nn.MultiheadAttention` with four ordinary linear layers.

`nn.MultiheadAttention` multiplies with its projection matrices behind one function, where nothing can be observed or
exchanged. This module computes the same from four `nn.Linear`, which then are layers like all others. The products
of queries, keys and values stay in float.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from narrowcast.nn.base import InstalledModule


class MultiheadAttention(InstalledModule):
    """Attention with separate projections; called exactly like `nn.MultiheadAttention`.

    Args:
        embed_dim, num_heads, kdim, vdim, bias, batch_first, add_zero_attn: as in torch.
        extra_key: whether learned key and value rows (`add_bias_kv`) are appended.
        device: where the parameters are made.
    """

    kind = "MultiheadAttention"
    bias_k: nn.Parameter | None
    bias_v: nn.Parameter | None
    q_proj: Any
    out_proj: Any
    # torch's TransformerEncoderLayer takes its own fused path, past these modules, unless this is False
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        kdim: int,
        vdim: int,
        bias: bool,
        batch_first: bool,
        add_zero_attn: bool,
        extra_key: bool,
        device: str = "meta",
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.kdim, self.vdim = embed_dim, num_heads, kdim, vdim
        self.batch_first, self.add_zero_attn = batch_first, add_zero_attn
        self.dropout = 0.0
        self.in_proj_bias = None  # read by torch's TransformerEncoderLayer
        widths = {"q_proj": embed_dim, "k_proj": kdim, "v_proj": vdim, "out_proj": embed_dim}
        for name, width in widths.items():
            self.add_module(name, nn.Linear(width, embed_dim, bias=bias, device=device))
        rows = (
            [nn.Parameter(torch.empty(1, 1, embed_dim, device=device)) for _ in range(2)] if extra_key else [None, None]
        )
        self.bias_k, self.bias_v = rows

    @classmethod
    def of(cls, module: nn.MultiheadAttention) -> MultiheadAttention:
        """The same attention, taken apart; the parameters are views of the module's own."""
        has_bias = module.in_proj_bias is not None
        made = cls(
            module.embed_dim, module.num_heads, kdim=module.kdim, vdim=module.vdim, bias=has_bias,
            batch_first=module.batch_first, add_zero_attn=module.add_zero_attn, extra_key=module.bias_k is not None,
        )  # fmt: skip
        if module.in_proj_weight is not None:
            weights = list(module.in_proj_weight.detach().chunk(3))
        else:
            weights = [getattr(module, f"{part}_proj_weight").detach() for part in "qkv"]
        biases = list(module.in_proj_bias.detach().chunk(3)) if has_bias else [None] * 3
        projections = [(f"{part}_proj", w, b) for part, w, b in zip("qkv", weights, biases, strict=True)]
        for name, weight, bias in [*projections, ("out_proj", module.out_proj.weight, module.out_proj.bias)]:
            linear = getattr(made, name)
            linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
            linear.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        made.bias_k, made.bias_v = module.bias_k, module.bias_v  # type: ignore[assignment]
        return made.train(module.training)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MultiheadAttention:
        """See `InstalledModule`."""
        return cls(**config)

    def config(self) -> dict[str, Any]:
        """See `InstalledModule`."""
        return {
            "embed_dim": self.embed_dim, "num_heads": self.num_heads, "kdim": self.kdim, "vdim": self.vdim,
            "bias": self.q_proj.bias is not None, "batch_first": self.batch_first,
            "add_zero_attn": self.add_zero_attn, "extra_key": self.bias_k is not None,
        }  # fmt: skip

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As `nn.MultiheadAttention`: (output, attention weights or None)."""
        batched = query.dim() == 3
        inputs = [t if batched else t.unsqueeze(0 if self.batch_first else 1) for t in (query, key, value)]
        if not self.batch_first:
            inputs = [t.transpose(0, 1) for t in inputs]
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        projected = [getattr(self, f"{part}_proj")(t) for part, t in zip("qkv", inputs, strict=True)]
        q, k, v, extra = self._heads(*projected)
        mask = self._mask(attn_mask, key_padding_mask, q, k.shape[2], extra, is_causal=is_causal)
        weights = None
        if need_weights:
            scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            context = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            context = functional.scaled_dot_product_attention(q, k, v, mask)
        output = self.out_proj(context.transpose(1, 2).flatten(2))
        output = output if self.batch_first else output.transpose(0, 1)
        if batched:
            return output, weights
        return output.squeeze(0 if self.batch_first else 1), None if weights is None else weights.squeeze(0)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
        """[batch, heads, tokens, head_dim] each, and how many keys were appended."""
        batch = q.shape[0]
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(batch, 1, -1)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(batch, 1, -1)], 1)
            extra += 1
        if self.add_zero_attn:
            k, v = functional.pad(k, (0, 0, 0, 1)), functional.pad(v, (0, 0, 0, 1))
            extra += 1
        heads = [t.view(batch, t.shape[1], self.num_heads, -1).transpose(1, 2) for t in (q, k, v)]
        return heads[0], heads[1], heads[2], extra

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, keys: int, extra: int, *, is_causal: bool
    ) -> Tensor | None:
        """An additive mask [batch or 1, heads or 1, queries, keys], or None."""
        if is_causal and attn_mask is None:
            attn_mask = torch.ones(q.shape[2], keys - extra, dtype=torch.bool, device=q.device).triu(1)
        total = None
        if attn_mask is not None:
            total = _additive(attn_mask, q.dtype)
            total = total.view(q.shape[0], self.num_heads, *total.shape[1:]) if total.dim() == 3 else total[None, None]
        if padding is not None:
            blocked = _additive(padding, q.dtype)[:, None, None, :]
            total = blocked if total is None else total + blocked
        return total if total is None or not extra else functional.pad(total, (0, extra))


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
