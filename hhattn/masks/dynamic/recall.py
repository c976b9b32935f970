"""What a mask loses: the attention mass outside it, and what that does to the output."""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor

from hhattn.layout import Order
from hhattn.masks.block_mask import BlockMask


class Quality(NamedTuple):
    """recall [B, H]: the share of the attention mass that the mask keeps, averaged over queries. error [B, H]: relative
    error of the output, ``|out - dense| / |dense|`` over a head's tokens and channels. Both float32."""

    recall: Tensor
    error: Tensor


@torch.no_grad()
def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, block_size: tuple[int, int], scale: float | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) of all pairs, block by block."""
    from hhattn.ops.block_sparse_attention import block_sparse_attention

    nq, nk = (-(-x.shape[1] // size) for x, size in zip((q, k), block_size, strict=True))
    blocks = torch.ones(1, 1, nq, nk, dtype=torch.bool, device=q.device)
    everything = BlockMask.from_blocks(blocks, block_size, q.shape[1], k.shape[1], max_blocks=nk)
    return cast(tuple[Tensor, Tensor], block_sparse_attention(q, k, v, everything, scale=scale, return_lse=True))


@torch.no_grad()
def recall(q: Tensor, k: Tensor, mask: BlockMask, *, scale: float | None = None, order: Order | None = None) -> Tensor:
    """The share of the attention mass that ``mask`` keeps, averaged over queries: [B, H] float32, in [0, 1]::

        recall = mean_i Σ_{j in mask} exp(s_ij) / Σ_j exp(s_ij) = mean_i exp(lse_i of the mask - lse_i of all)

    q [B, Sq, H, D], k [B, Sk, H_kv, D], in ``order`` (None: the mask's); ``scale`` None is 1 / sqrt(D). Costs a dense
    attention, and like one never holds an S x S array.
    """
    return quality(q, k, k[..., :1], mask, scale=scale, order=order).recall


@torch.no_grad()
def quality(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    order: Order | None = None,
    dense: tuple[Tensor, Tensor] | None = None,
) -> Quality:
    """:func:`recall`, and the error of the output: how near attention under ``mask`` comes to dense attention.

    ``dense`` is (out, lse) of dense attention in ``order``, where it is known already. Otherwise as :func:`recall`,
    with v [B, Sk, H_kv, Dv].
    """
    from hhattn.ops.block_sparse_attention import block_sparse_attention

    full, full_lse = dense_attention(q, k, v, mask.block_size, scale) if dense is None else dense
    out, lse = block_sparse_attention(q, k, v, mask, scale=scale, return_lse=True, order=order)
    difference = (out.float() - full.float()).square().sum((1, 3)).sqrt()
    size = full.float().square().sum((1, 3)).sqrt()
    return Quality((lse - full_lse).exp().clamp(max=1).mean(-1).float(), difference / size.clamp(min=1e-30))
