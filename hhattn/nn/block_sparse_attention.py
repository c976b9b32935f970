"""A softmax attention layer that attends only where its mask says, with a window of past keys and values in front."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from hhattn.masks import BlockMask, LayerPlan
from hhattn.nn._projections import AttentionProjections
from hhattn.ops.block_sparse_attention import block_sparse_attention


class BlockSparseAttention(AttentionProjections):
    """Self-attention by :func:`hhattn.block_sparse_attention`; :func:`hhattn.qk_norm_rope` norms and rotates q and k.

    The settings are those of :class:`~hhattn.nn._projections.AttentionProjections`.
    """

    def forward(
        self,
        x: Tensor,
        mask: BlockMask | LayerPlan,
        *,
        rope: tuple[Tensor, Tensor] | None = None,
        kv_cache: tuple[Tensor, Tensor] | None = None,
        return_kv: bool = False,
    ) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [B, S, C] -> [B, S, C].

        mask: queries are this call's S tokens, keys the Sc cached ones followed by this call's. A
            ``hhattn.masks.SparsityPlan(...).at(layer)`` chooses a mask of its own for each call.
        rope: (cos, sin) [S, D] at this call's positions. Keys are rotated before they are cached, so a cached key keeps
            the position it was made at.
        kv_cache: (k, v), each [B, Sc, H_kv, D], of past tokens.
        return_kv: also return this call's own (k, v) [B, S, H_kv, D], for the caller's ring of past frames.
        """
        q, k = self.queries_and_keys(x, rope)
        v = self.heads(self.to_v(x))
        keys, values = k, v
        if kv_cache is not None:
            keys, values = (torch.cat((past, new), 1) for past, new in zip(kv_cache, (k, v), strict=True))
        if isinstance(mask, LayerPlan):
            out = mask.attend(q, keys, values)
        else:
            out = cast(Tensor, block_sparse_attention(q, keys, values, mask))
        out = self.to_out(out.flatten(2))
        return (out, (k, v)) if return_kv else out
