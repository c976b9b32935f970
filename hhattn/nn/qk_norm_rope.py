"""The q/k norm and the rotary embedding of an attention layer, as one module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hhattn.nn._diffusers import head_dims, qk_norms
from hhattn.ops.qk_norm_rope import qk_norm_rope


class QKNormRoPE(nn.Module):
    """:func:`hhattn.qk_norm_rope` with its weights: ``q_weight``, ``k_weight``, [H·D] across heads, else [D]; and
    ``q_bias``, ``k_bias`` of the same size for norm="layer". Raises ValueError for another norm than that and "rms"."""

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        norm: str = "rms",
        across_heads: bool = False,
        rotate: str = "interleaved",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if norm not in ("rms", "layer"):
            raise ValueError(f"norm={norm!r}; accepted: 'rms', 'layer'")
        self.norm, self.across_heads, self.rotate, self.eps = norm, across_heads, rotate, eps
        q_heads, k_heads = (num_heads, num_kv_heads or num_heads) if across_heads else (1, 1)
        self.q_weight = nn.Parameter(torch.ones(q_heads * head_dim))
        self.k_weight = nn.Parameter(torch.ones(k_heads * head_dim))
        biases = norm == "layer"
        self.q_bias = nn.Parameter(torch.zeros(q_heads * head_dim)) if biases else None
        self.k_bias = nn.Parameter(torch.zeros(k_heads * head_dim)) if biases else None

    @classmethod
    def from_diffusers(cls, attention: Any, *, rotate: str = "interleaved") -> QKNormRoPE:
        """The norms of q and k of an attention layer of diffusers; weights and biases are **shared**, not copied.

        Raises ValueError for norms of other kinds, or without weights."""
        heads, kv_heads, head_dim = head_dims(attention)
        norm, across_heads, eps = qk_norms(attention, head_dim)
        if norm is None:
            raise ValueError("attention has no norms of q and k; accepted: a layer with them")
        module = cls(head_dim, heads, kv_heads, norm=norm, across_heads=across_heads, rotate=rotate, eps=eps)
        module.q_weight, module.k_weight = attention.norm_q.weight, attention.norm_k.weight
        module.q_bias, module.k_bias = (getattr(n, "bias", None) for n in (attention.norm_q, attention.norm_k))
        return module

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, text_len: int = 0, text_first: bool = False
    ) -> tuple[Tensor, Tensor]:
        """q [B, S, H, D], k [B, S, H_kv, D], cos and sin [S - text_len, D] -> q, k normed and rotated, but for the text
        tokens, which aren't rotated."""
        return qk_norm_rope(
            q,
            k,
            cos,
            sin,
            q_weight=self.q_weight,
            k_weight=self.k_weight,
            q_bias=self.q_bias,
            k_bias=self.k_bias,
            norm=self.norm,
            across_heads=self.across_heads,
            rotate=self.rotate,
            eps=self.eps,
            text_len=text_len,
            text_first=text_first,
        )
