"""Triton kernels of sparse_linear_attention's linear branch, forward; the other branch is block_sparse_attention.

    states of key blocks     KV_j = Σ φ(k) vᵀ     K_j = Σ φ(k)       the sums of block_linear_attention, a block a chunk
    states of query blocks   KV_i = Σ_j KV_j      K_i = Σ_j K_j      one product with a matrix of zeros and ones
    outputs                  out_i = φ(q_i)ᵀ KV_i / (φ(q_i)ᵀ K_i + eps)

The matrix is exact in TF32 and a state's two parts of TF32 hold 22 of its bits, so that sums are as good as float32's,
on tensor cores. Heads are taken in groups whose states fit a bound, whatever the length.

Blocks that aren't marginal as a whole have no state: a kernel follows the mask's lists of partial blocks, leaves out
what turns out whole (a ragged edge), and computes the weights pair by pair.

Numbers of tokens and blocks and list lengths are never specialised: one compilation serves every clip and density.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hhattn.kernels.block_linear_attention import tile, weighted_sums
from hhattn.kernels.block_sparse_attention_tiles import precision, times
from hhattn.kernels.sparse_linear_attention_backward import (
    sparse_linear_marginal_backward as sparse_linear_marginal_backward,
)
from hhattn.kernels.sparse_linear_attention_pairs import (
    LENGTHS,
    Pairs,
    add_up,
    features,
    groups,
    marginal,
    outputs,
    pairs_of,
    part_options,
    weights,
)


@triton.jit(do_not_specialize=LENGTHS)
def _part_sums(
    q, k, v, sums, total, counts, columns, tiles, bits,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64, k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64,
    v_batch: tl.int64, v_token: tl.int64, v_head: tl.int64,
    q_len: tl.int64, k_len: tl.int64, blocks: tl.int64, mask_batch: tl.int64, mask_head: tl.int64, width: tl.int64,
    heads, group,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PHI: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    COMPLEMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ w v [B, Sq, H, Dv] and Σ w [B, Sq, H] over a tile of queries' parts, float32."""
    SUBS: tl.constexpr = (BQ + BLOCK_M - 1) // BLOCK_M
    index, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, i, start = index // (blocks * SUBS), index // SUBS % blocks, (index % SUBS * BLOCK_M).to(tl.int32)
    m, n, d, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    t = i * BQ + start + m
    rows = (t < q_len) & (start + m < BQ)
    phi_q = features(q + b * q_batch + h * q_head, t, rows, d, q_token, DIM, PHI)
    k += b * k_batch + h // group * k_head
    v += b * v_batch + h // group * v_head
    line = b * mask_batch + h * mask_head + i
    acc, weight = tl.zeros([BLOCK_M, BLOCK_V], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for entry in range(tl.load(counts + line)):
        number = tl.load(tiles + line * width + entry)
        if number >= 0:
            first = tl.load(columns + line * width + entry).to(tl.int64) * BK
            for at in range(0, BK, BLOCK_N):
                key = first + at + n
                present = (key < k_len) & (at + n < BK)
                keep = marginal(
                    bits, number, start + m, n, at, rows[:, None] & present[None, :], BQ, BK, BLOCK_N, COMPLEMENT
                )
                w = weights(phi_q, features(k, key, present, d, k_token, DIM, PHI), keep, q.dtype.element_ty)
                weight += tl.sum(w, 1)
                acc = times(w, tile(v, key, present, c, v_token, V_DIM), acc, PRECISION, True)
    place = (b * q_len + t) * heads + h
    tl.store(total + place, weight, mask=rows)
    tl.store(sums + place[:, None] * V_DIM + c[None, :], acc, mask=rows[:, None] & (c[None, :] < V_DIM))


def part_sums(
    q: Tensor, k: Tensor, v: Tensor, pairs: Pairs, bits: Tensor, bk: int, phi: int
) -> tuple[Tensor | None, Tensor | None]:
    """Σ w v [B, Sq, H, Dv] and Σ w [B, Sq, H] over parts, or None where the mask has no partial blocks."""
    if not pairs.columns.shape[3]:
        return None, None
    batch, q_len, heads, _ = q.shape
    sums = q.new_empty(batch, q_len, heads, v.shape[3], dtype=torch.float32)
    total = sums.new_empty(batch, q_len, heads)
    options: dict[str, Any] = part_options(q, v, bits.shape[1], bk)
    masks, mask_heads, nq, width = pairs.columns.shape
    _part_sums[(batch * nq * triton.cdiv(bits.shape[1], options["BLOCK_M"]), heads)](
        q, k, v, sums, total, pairs.counts, pairs.columns, pairs.tiles, bits,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], q_len, k.shape[1], nq,
        nq * mask_heads if masks > 1 else 0, nq if mask_heads > 1 else 0, width, heads, heads // k.shape[2],
        PHI=phi, COMPLEMENT=pairs.complement, PRECISION=precision(q), **options,
    )  # fmt: skip
    return sums, total


def sparse_linear_marginal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    kv_tiles: Tensor,
    full_kv_num_blocks: Tensor,
    full_kv_indices: Tensor,
    tiles: Tensor,
    bk: int,
    complement: bool,
    phi: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """out [B, Sq, H, Dv] and the divisors den [B, H, Sq] (float32, inf where a query has no weights) of linear
    attention over a mask's pairs or, with ``complement``, all others; q, k, v [B, S, H, D] with their last dims
    contiguous, the mask as the tensors of a :class:`hhattn.BlockMask`, contiguous; phi as in ``feature_map``."""
    (batch, q_len, heads, _), v_dim, bq = q.shape, v.shape[3], tiles.shape[1]
    out, den = q.new_empty(batch, q_len, heads, v_dim), q.new_empty(batch, heads, q_len, dtype=torch.float32)
    if not out.numel():
        return out, den
    lists = (kv_num_blocks, kv_indices, kv_tiles, full_kv_num_blocks, full_kv_indices, tiles)
    every = pairs_of(*lists, bk, q_len, k.shape[1], complement)
    nq, nk = every.whole.shape[2:]
    for of_q, of_k in groups(q, k.shape[2], max(nq, nk), v_dim):
        pairs = every.of_heads(of_q.start, of_q.stop)
        some_q, some_k, some_v = q[:, :, of_q], k[:, :, of_k], v[:, :, of_k]
        states = weighted_sums(some_k, some_v, None, None, None, None, bk, [], phi, phi)
        kv, k_sum = (add_up(pairs.whole, x, some_q.shape[2]) for x in states)
        sums, total = part_sums(some_q, some_k, some_v, pairs, tiles, bk, phi)
        outputs(some_q, kv, k_sum, sums, total, out[:, :, of_q], den[:, of_q], bq, phi, eps)
    return out, den
