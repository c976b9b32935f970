"""Triton kernels of block_sparse_attention, forward: a program holds a tile of a block's queries and follows its list.

With c = scale · log2 e > 0 and raw scores r_ij = q_i·k_j, a tile of keys at a time:

    m = max_j r_ij      p_ij = 2^(c·r_ij - c·m)      l_i = Σ_j p_ij      out_i = Σ_j p_ij v_j / l_i
    lse_i = (c·m + log2 l_i) / log2 e

Full blocks are computed without a mask, partial ones with their bits. A tile of queries or keys is a part of a block of
the mask; both sizes come from a table. The next list entry is loaded while the present one is computed.

**Infinities.** A masked pair has weight 0, and 0 times an infinite or NaN value would be NaN. So every tile is computed
as if values were finite. If the sums aren't, it is marked, and a second launch, in which programs of other tiles end
at once, computes it again with products that skip zeros.

Numbers of tokens and blocks, list lengths and strides are int64 or runtime int32, lengths never specialised: one
compilation serves every clip and every density.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hhattn.kernels.block_sparse_attention_backward import (
    block_sparse_attention_backward as block_sparse_attention_backward,
)
from hhattn.kernels.block_sparse_attention_tiles import (
    LENGTHS,
    LOG2_E,
    any_infinite,
    kept,
    positive,
    rows,
    tile_options,
    times,
)


@triton.jit
def _attend(
    out, top, total, q, k, v, k_token, v_token, k_len, c, bits, columns, tiles, count, row,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, PARTIAL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """The running softmax (out, top, total) continued over one list of key blocks, ``row`` being rows of the block."""
    SUBS: tl.constexpr = (BK + BLOCK_N - 1) // BLOCK_N
    EVEN: tl.constexpr = BK % BLOCK_N == 0
    n, d, dv = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    block = tl.load(columns, mask=count > 0, other=0)
    tile = block
    if PARTIAL:
        tile = tl.load(tiles, mask=count > 0, other=0)
    for step in tl.range(0, count * SUBS):
        start = step % SUBS * BLOCK_N
        first = block.to(tl.int64) * BK + start
        this_tile = tile
        ahead = (step + 1) // SUBS
        block = tl.load(columns + ahead, mask=ahead < count, other=0)
        if PARTIAL:
            tile = tl.load(tiles + ahead, mask=ahead < count, other=0)
        limit = tl.minimum(BK - start, k_len - first).to(tl.int32)
        key = rows(k + first * k_token, n, d, k_token, limit, PARTIAL or not EVEN, DIM)
        s = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        if PARTIAL:
            s = tl.where(kept(bits, this_tile, row[:, None], n[None, :], start, BQ, BK, BLOCK_N), s, float("-inf"))
        elif not EVEN:
            s = tl.where(n[None, :] < limit, s, float("-inf"))
        now = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(now == float("-inf"), 0.0, now * c)
        p = tl.exp2(s * c - shift[:, None])
        keep = tl.exp2(top * c - shift)
        total = total * keep + tl.sum(p, 1)
        value = rows(v + first * v_token, n, dv, v_token, limit, PARTIAL or not EVEN, V_DIM)
        out = times(p, value, out * keep[:, None], PRECISION, EXACT)
        top = now
    return out, top, total


@triton.jit(do_not_specialize=LENGTHS)
def _forward(
    q, k, v, out, lse, marks, counts, columns, tiles, full_counts, full_columns, bits,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64, k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64,
    v_batch: tl.int64, v_token: tl.int64, v_head: tl.int64,
    q_len: tl.int64, k_len: tl.int64, blocks: tl.int64, mask_batch: tl.int64, mask_head: tl.int64,
    width: tl.int64, full_width: tl.int64, heads, group, scale: tl.float32,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    SUBS: tl.constexpr = (BQ + BLOCK_M - 1) // BLOCK_M
    index, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    mark = marks + index * heads + h
    if EXACT and tl.load(mark) == 0:
        return
    b, i = index // (blocks * SUBS), index // SUBS % blocks
    start = (index % SUBS * BLOCK_M).to(tl.int32)
    first = i * BQ + start
    m, d, dv = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    limit = tl.minimum(BQ - start, q_len - first).to(tl.int32)
    query = rows(q + b * q_batch + h * q_head + first * q_token, m, d, q_token, limit, True, DIM)
    c = scale * LOG2_E
    k += b * k_batch + h // group * k_head
    v += b * v_batch + h // group * v_head
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    line = b * mask_batch + h * mask_head + i
    count = tl.load(counts + line)
    acc, top, total = _attend(
        acc, top, total, query, k, v, k_token, v_token, k_len, c, bits,
        full_columns + line * full_width, tiles, tl.load(full_counts + line), start + m,
        DIM, V_DIM, BLOCK_D, BLOCK_V, BQ, BK, BLOCK_M, BLOCK_N, PRECISION, False, EXACT,
    )  # fmt: skip
    acc, top, total = _attend(
        acc, top, total, query, k, v, k_token, v_token, k_len, c, bits,
        columns + line * width, tiles + line * width, count, start + m,
        DIM, V_DIM, BLOCK_D, BLOCK_V, BQ, BK, BLOCK_M, BLOCK_N, PRECISION, True, EXACT,
    )  # fmt: skip
    if not EXACT:
        tl.store(mark, tl.where(count > 0, any_infinite(acc), 0))
    empty = total == 0
    total = tl.where(empty, 1.0, total)
    result = acc / total[:, None]
    at = ((b * q_len + first) * heads + h) * V_DIM + m[:, None] * (heads.to(tl.int64) * V_DIM) + dv[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=(m[:, None] < limit) & (dv[None, :] < V_DIM))
    log = tl.where(empty, float("-inf"), (top * c + tl.log2(total)) / LOG2_E)
    tl.store(lse + (b * heads + h) * q_len + first + m, log, mask=m < limit)


def block_sparse_attention(
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
    scale: float,
    *columns: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """out [B, Sq, H, Dv] and lse [B, H, Sq] (float32); shapes and meaning as in :func:`hhattn.block_sparse_attention`,
    the mask as the tensors of a :class:`hhattn.BlockMask`, contiguous; last dims of q, k, v contiguous. ``columns`` are
    for the backward."""
    batch, q_len, heads, _ = q.shape
    out = q.new_empty(batch, q_len, heads, v.shape[3])
    lse = q.new_empty(batch, heads, q_len, dtype=torch.float32)
    masks, mask_heads, nq, width = kv_indices.shape
    q, scale, _ = positive(q, scale)
    options = tile_options("forward", q, v, tiles.shape[1], bk)
    grid = (batch * nq * triton.cdiv(tiles.shape[1], options["BLOCK_M"]), heads)
    marks = q.new_empty(grid, dtype=torch.int32)
    for exact in (False, True)[: 1 + (width > 0)]:
        if not out.numel():
            break
        _forward[grid](
            q, k, v, out, lse, marks, kv_num_blocks, kv_indices, kv_tiles, full_kv_num_blocks, full_kv_indices, tiles,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], q_len, k.shape[1], nq,
            nq * mask_heads if masks > 1 else 0, nq if mask_heads > 1 else 0, width, full_kv_indices.shape[3],
            heads, heads // k.shape[2], scale, **options, EXACT=exact,
        )  # fmt: skip
    return out, lse
