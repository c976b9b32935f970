"""An attention layer that attends exactly where it matters and linearly where it hardly does."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hhattn.masks import BlockMask
from hhattn.nn._projections import AttentionProjections
from hhattn.ops._check import one_of
from hhattn.ops.sparse_linear_attention import FEATURE_MAPS, sparse_linear_attention


class SparseLinearAttention(AttentionProjections):
    """Self-attention by :func:`hhattn.sparse_linear_attention`, the layer of SLA (arXiv:2509.24006):
    ``softmax branch + proj_l(linear branch)``.

    ``proj_l``, an nn.Linear over the head dim that all heads share, starts from zeros: a layer with a pretrained
    model's projections first gives what block-sparse attention gives, and learns what the marginal keys add. It and its
    weights are named as in the paper's published code, whose linear branch sums over every key and adds 1e-5: that is
    a ``marginal`` mask of every pair and ``eps=1e-5``.

    The other settings are those of :class:`~hhattn.nn._projections.AttentionProjections`. Raises ValueError for an
    unknown ``feature_map``.
    """

    def __init__(
        self, dim: int, num_heads: int, *, feature_map: str = "softmax", eps: float = 1e-15, **settings: Any
    ) -> None:
        super().__init__(dim, num_heads, **settings)
        one_of("feature_map", feature_map, FEATURE_MAPS)
        self.feature_map, self.eps = feature_map, eps
        self.proj_l = nn.Linear(self.head_dim, self.head_dim)
        nn.init.zeros_(self.proj_l.weight)
        nn.init.zeros_(self.proj_l.bias)

    def forward(
        self,
        x: Tensor,
        critical: BlockMask,
        marginal: BlockMask | None = None,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """x [B, S, C] -> [B, S, C].

        critical, marginal: masks of S queries and S keys; without ``marginal`` all that isn't critical is marginal.
        rope: (cos, sin) [S, D], which turns q and k for both branches.
        """
        q, k = self.queries_and_keys(x, rope)
        v = self.heads(self.to_v(x))
        out = sparse_linear_attention(
            q, k, v, critical, marginal, proj=self.proj_l.weight, feature_map=self.feature_map, eps=self.eps
        )
        return self.to_out((out + self.proj_l.bias.to(out.dtype)).flatten(2))
