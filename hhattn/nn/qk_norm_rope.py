"""The q/k norm and the rotary embedding of an attention layer, as one module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hhattn.ops.qk_norm_rope import qk_norm_rope


class QKNormRoPE(nn.Module):
    """:func:`hhattn.qk_norm_rope` with its weights: ``q_weight``, ``k_weight``, [H·D] across heads, else [D]."""

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        across_heads: bool = False,
        rotate: str = "interleaved",
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        self.across_heads, self.rotate, self.eps = across_heads, rotate, eps
        q_heads, k_heads = (num_heads, num_kv_heads or num_heads) if across_heads else (1, 1)
        self.q_weight = nn.Parameter(torch.ones(q_heads * head_dim))
        self.k_weight = nn.Parameter(torch.ones(k_heads * head_dim))

    def forward(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, text_len: int = 0) -> tuple[Tensor, Tensor]:
        """q [B, S, H, D], k [B, S, H_kv, D], cos and sin [S - text_len, D] -> q, k normed and rotated."""
        return qk_norm_rope(
            q,
            k,
            cos,
            sin,
            q_weight=self.q_weight,
            k_weight=self.k_weight,
            across_heads=self.across_heads,
            rotate=self.rotate,
            eps=self.eps,
            text_len=text_len,
        )
