"""Attention whose projections are four linear layers of their own, instead of one packed tensor."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SplitAttention(nn.Module):
    """Computes what ``nn.MultiheadAttention`` does, with ``query``, ``key``, ``value`` and ``out``.

    Its projections can be factorized and coded as any linear layers, and whole heads can leave.

    Args:
        packed: the layer it replaces; projections begin with its numbers.
        weights: whether these are copied; else they are left empty, for loading.
    """

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float

    in_proj_bias = None
    """PyTorch's sign to transformer blocks around it that there is no fused path."""

    def __init__(self, packed: nn.MultiheadAttention, *, weights: bool = True) -> None:
        super().__init__()
        names = ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first")
        for name in (*names, "add_zero_attn", "_qkv_same_embed_dim"):
            setattr(self, name, getattr(packed, name))
        out = packed.out_proj.weight
        where: Any = {"device": out.device, "dtype": out.dtype}
        bias = packed.in_proj_bias is not None
        width = self.embed_dim
        for name, size in (("query", width), ("key", self.kdim), ("value", self.vdim)):
            setattr(self, name, nn.utils.skip_init(nn.Linear, size, width, bias, **where))
        again = packed.out_proj.bias is not None
        self.out = nn.utils.skip_init(nn.Linear, width, width, again, **where)
        self.bias_k, self.bias_v = packed.bias_k, packed.bias_v
        if weights:
            self._fill(packed)
        self.train(packed.training)

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
        """Attend: the arguments and what comes back are those of ``nn.MultiheadAttention``."""
        batched = query.dim() == 3
        first = self.batch_first or not batched
        if not batched:
            query, key, value = query[None], key[None], value[None]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask[None]
        q, k, v = self.query(query), self.key(key), self.value(value)
        if not first:
            q, k, v = (each.transpose(0, 1) for each in (q, k, v))
        k, v, more = self._longer(k, v)
        mask = self._mask(attn_mask, key_padding_mask, q, k.shape[1] - more, more)
        q, k, v = (self._heads(each) for each in (q, k, v))
        found, shares = self._attended(q, k, v, mask, needed=need_weights)
        found = self.out(found.transpose(1, 2).flatten(2))
        if shares is not None:
            shares = shares.mean(1) if average_attn_weights else shares
        if not batched:
            return found[0], None if shares is None else shares[0]
        return found if first else found.transpose(0, 1), shares

    def _attended(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, needed: bool
    ) -> tuple[Tensor, Tensor | None]:
        drop = self.dropout if self.training else 0.0
        if not needed:
            return F.scaled_dot_product_attention(q, k, v, mask, drop), None
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
        shares = (scores if mask is None else scores + mask).softmax(-1)
        shares = F.dropout(shares, drop) if drop else shares
        return shares @ v, shares

    def _heads(self, x: Tensor) -> Tensor:
        """Lay heads on an axis of their own: (N, heads, L, head_dim)."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _longer(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
        """Add the keys and values that are parameters or zeros."""
        more = 0
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, -1)], 1)
            v, more = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1)], 1), 1
        if self.add_zero_attn:
            k, v, more = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), more + 1
        return k, v, more

    def _mask(
        self,
        attention: Tensor | None,
        padding: Tensor | None,
        q: Tensor,
        sources: int,
        more: int,
    ) -> Tensor | None:
        """Return what is added to scores (N, heads or 1, L, S), None for nothing."""
        found: Tensor | None = None
        if attention is not None:
            added = _added(attention, q)
            found = added.unflatten(0, (q.shape[0], -1)) if added.dim() == 3 else added
        if padding is not None:
            added = _added(padding, q)[:, None, None, :]
            found = added if found is None else found + added
        return found if found is None or not more else F.pad(found, (0, more))

    @torch.no_grad()
    def _fill(self, packed: nn.MultiheadAttention) -> None:
        layers: Any = (self.query, self.key, self.value)
        weights: Any = (packed.q_proj_weight, packed.k_proj_weight, packed.v_proj_weight)
        if packed.in_proj_weight is not None:
            weights = packed.in_proj_weight.chunk(3)
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight.copy_(weight)
            layer.weight.requires_grad_(packed.out_proj.weight.requires_grad)
        if packed.in_proj_bias is not None:
            for layer, bias in zip(layers, packed.in_proj_bias.chunk(3), strict=True):
                layer.bias.copy_(bias)
                layer.bias.requires_grad_(packed.in_proj_bias.requires_grad)
        self.out.weight, self.out.bias = packed.out_proj.weight, packed.out_proj.bias


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """Turn a mask that is true where nothing is seen into minus infinity there."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
