"""Attention in two grains: coarse between blocks' means, fine on the blocks that the coarse one finds (VSA)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from hhattn.masks import Policy, coarse_attention, mean_pool, select, top_k
from hhattn.nn._projections import AttentionProjections
from hhattn.ops.block_sparse_attention import block_sparse_attention


class VideoSparseAttention(AttentionProjections):
    """Video Sparse Attention (arXiv 2505.13389), with gradients through both grains::

        out = gate · coarse_attention(q, k, v) + block_sparse_attention(q, k, v, select(q, k, mean_pool(), policy))

    ``gate = x W`` is learned, a factor a channel; it starts at 0, so that a pretrained layer starts as its sparse self.
    Tokens of a block should lie together in the video: give x in tile order, with tiles as long as a block.

    policy: which blocks of keys a block of queries attends.
    block_size: (bq, bk), tokens in a block.
    Other settings are those of :class:`~hhattn.nn._projections.AttentionProjections`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        policy: Policy | None = None,
        block_size: tuple[int, int] = (64, 64),
        **settings: Any,
    ) -> None:
        super().__init__(dim, num_heads, **settings)
        self.policy, self.block_size = policy or top_k(ratio=0.125), block_size
        self.to_gate = nn.Linear(dim, self.num_heads * self.head_dim)
        nn.init.zeros_(self.to_gate.weight)
        nn.init.zeros_(self.to_gate.bias)

    def forward(self, x: Tensor, *, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x [B, S, C] -> [B, S, C]; rope: (cos, sin) [S, D] at the tokens' positions, in their order."""
        q, k = self.queries_and_keys(x, rope)
        v = self.heads(self.to_v(x))
        mask = select(q, k, mean_pool(), self.policy, block_size=self.block_size)
        fine = cast(Tensor, block_sparse_attention(q, k, v, mask))
        coarse = coarse_attention(q, k, v, self.block_size)
        return self.to_out(torch.addcmul(fine, self.heads(self.to_gate(x)), coarse).flatten(2))
