"""Triton kernels of block_sparse_attention, backward: dq along lists of keys, dk and dv along lists of queries.

Scores are computed again from lse; with delta_i = do_i·o_i - dlse_i:

    p_ij = exp(s_ij - lse_i)      ds_ij = p_ij (do_i·v_j - delta_i)
    dq_i = scale Σ_j ds_ij k_j      dk_j = scale Σ_i ds_ij q_i      dv_j = Σ_i p_ij do_i

Every sum is made by one program in the order of its list, so gradients are the same bits every time, without atomics.
Infinities at masked pairs are left to a second launch, as in the forward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hhattn.kernels.block_sparse_attention_tiles import (
    LENGTHS,
    LOG2_E,
    any_infinite,
    finite,
    kept,
    positive,
    rows,
    tile_options,
    times,
)
from hhattn.masks.block_mask import by_column

ROWS = 32  # queries of a program of _delta


@triton.jit(do_not_specialize=["q_len", "heads", "dlse_batch", "dlse_head", "dlse_token"])
def _delta(
    dout, out, lse, dlse, delta, log2,
    dout_batch: tl.int64, dout_token: tl.int64, dout_head: tl.int64,
    dlse_batch: tl.int64, dlse_head: tl.int64, dlse_token: tl.int64, q_len: tl.int64, heads,
    V_DIM: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """delta, and lse to base 2, +inf where a query attends nothing, so that its weights are 0."""
    blocks = tl.cdiv(q_len, ROWS)
    b, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * ROWS
    h = tl.program_id(1).to(tl.int64)
    m, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_V)
    limit = q_len - first
    do = rows(dout + b * dout_batch + h * dout_head + first * dout_token, m, d, dout_token, limit, True, V_DIM)
    row = heads.to(tl.int64) * V_DIM
    o = rows(out + (b * q_len + first) * row + h * V_DIM, m, d, row, limit, True, V_DIM)
    at = (b * heads + h) * q_len + first + m
    grad = tl.load(dlse + b * dlse_batch + h * dlse_head + (first + m) * dlse_token, mask=m < limit, other=0.0)
    total = tl.load(lse + at, mask=m < limit, other=0.0)
    tl.store(delta + at, tl.sum(do.to(tl.float32) * o.to(tl.float32), 1) - grad, mask=m < limit)
    tl.store(log2 + at, tl.where(total == float("-inf"), float("inf"), total * LOG2_E), mask=m < limit)


@triton.jit
def _dq_along(
    dq, q, do, log2, delta, k, v, k_token, v_token, k_len, c, bits, columns, tiles, count, row,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, PARTIAL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dq / scale, continued over one list of key blocks."""
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
        value = rows(v + first * v_token, n, dv, v_token, limit, PARTIAL or not EVEN, V_DIM)
        p = tl.exp2(tl.dot(q, tl.trans(key), input_precision=PRECISION) * c - log2[:, None])
        ds = tl.dot(do, tl.trans(value), input_precision=PRECISION) - delta[:, None]
        if PARTIAL:
            keep = kept(bits, this_tile, row[:, None], n[None, :], start, BQ, BK, BLOCK_N)
            ds = tl.where(keep, p * ds, 0.0)
        elif EVEN:
            ds = p * ds
        else:
            ds = tl.where(n[None, :] < limit, p * ds, 0.0)
        dq = tl.dot(ds.to(key.dtype), finite(key, EXACT), dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=LENGTHS)
def _dq(
    dout, q, k, v, log2, deltas, dq, marks, counts, columns, tiles, full_counts, full_columns, bits,
    do_batch: tl.int64, do_token: tl.int64, do_head: tl.int64, q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64,
    k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64, v_batch: tl.int64, v_token: tl.int64, v_head: tl.int64,
    q_len: tl.int64, k_len: tl.int64, blocks: tl.int64, mask_batch: tl.int64, mask_head: tl.int64,
    width: tl.int64, full_width: tl.int64, heads, group, scale: tl.float32,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile of a query block's dq."""
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
    do = rows(dout + b * do_batch + h * do_head + first * do_token, m, dv, do_token, limit, True, V_DIM)
    c = scale * LOG2_E
    at = (b * heads + h) * q_len + first + m
    row_log2 = tl.load(log2 + at, mask=m < limit, other=float("inf"))
    delta = tl.load(deltas + at, mask=m < limit, other=0.0)
    k += b * k_batch + h // group * k_head
    v += b * v_batch + h // group * v_head
    line = b * mask_batch + h * mask_head + i
    count = tl.load(counts + line)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    acc = _dq_along(
        acc, query, do, row_log2, delta, k, v, k_token, v_token, k_len, c, bits,
        full_columns + line * full_width, tiles, tl.load(full_counts + line), start + m,
        DIM, V_DIM, BLOCK_D, BLOCK_V, BQ, BK, BLOCK_M, BLOCK_N, PRECISION, False, EXACT,
    )  # fmt: skip
    acc = _dq_along(
        acc, query, do, row_log2, delta, k, v, k_token, v_token, k_len, c, bits,
        columns + line * width, tiles + line * width, count, start + m,
        DIM, V_DIM, BLOCK_D, BLOCK_V, BQ, BK, BLOCK_M, BLOCK_N, PRECISION, True, EXACT,
    )  # fmt: skip
    if not EXACT:
        tl.store(mark, tl.where(count > 0, any_infinite(acc), 0))
    at = ((b * q_len + first) * heads + h) * DIM + m[:, None] * (heads.to(tl.int64) * DIM) + d[None, :]
    tl.store(dq + at, (acc * scale).to(dq.dtype.element_ty), mask=(m[:, None] < limit) & (d[None, :] < DIM))


@triton.jit
def _dkv_along(
    dk, dv, k, v, q, do, log2, deltas, q_token, do_token, q_len, c, bits, blocks, tiles, count, column, start_n,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, PARTIAL: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv, continued over one list of query blocks. Scores are [keys, queries]."""
    SUBS: tl.constexpr = (BQ + BLOCK_M - 1) // BLOCK_M
    BOUND: tl.constexpr = PARTIAL or BQ % BLOCK_M != 0
    m, d, e = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    block = tl.load(blocks, mask=count > 0, other=0)
    tile = block
    if PARTIAL:
        tile = tl.load(tiles, mask=count > 0, other=0)
    for step in tl.range(0, count * SUBS):
        start = step % SUBS * BLOCK_M
        first = block.to(tl.int64) * BQ + start
        this_tile = tile
        ahead = (step + 1) // SUBS
        block = tl.load(blocks + ahead, mask=ahead < count, other=0)
        if PARTIAL:
            tile = tl.load(tiles + ahead, mask=ahead < count, other=0)
        limit = tl.minimum(BQ - start, q_len - first).to(tl.int32)
        query = rows(q + first * q_token, m, d, q_token, limit, BOUND, DIM)
        grad = rows(do + first * do_token, m, e, do_token, limit, BOUND, V_DIM)
        if BOUND:
            row_log2 = tl.load(log2 + first + m, mask=m < limit, other=float("inf"))
            delta = tl.load(deltas + first + m, mask=m < limit, other=0.0)
        else:
            row_log2 = tl.load(log2 + first + m)
            delta = tl.load(deltas + first + m)
        p = tl.exp2(tl.dot(k, tl.trans(query), input_precision=PRECISION) * c - row_log2[None, :])
        ds = tl.dot(v, tl.trans(grad), input_precision=PRECISION) - delta[None, :]
        if PARTIAL:
            keep = kept(bits, this_tile, (start + m)[None, :], column[:, None], start_n, BQ, BK, BLOCK_N)
            p = tl.where(keep, p, 0.0)
            ds = tl.where(keep, p * ds, 0.0)
        else:
            ds = p * ds
        dv = times(p, grad, dv, PRECISION, EXACT)
        dk = tl.dot(ds.to(query.dtype), finite(query, EXACT), dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def _dkv(
    dout, q, k, v, log2, deltas, dk, dv, marks, offsets, indices, tiles, full_offsets, full_indices, bits,
    do_batch: tl.int64, do_token: tl.int64, do_head: tl.int64, q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64,
    k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64, v_batch: tl.int64, v_token: tl.int64, v_head: tl.int64,
    q_len: tl.int64, k_len: tl.int64, blocks: tl.int64, mask_batch: tl.int64, mask_head: tl.int64,
    width: tl.int64, full_width: tl.int64, heads, group, scale: tl.float32,
    DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BQ: tl.constexpr, BK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """One tile of a key block's dk and dv: the sums over queries of every head that shares its key head."""
    SUBS: tl.constexpr = (BK + BLOCK_N - 1) // BLOCK_N
    index, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    kv_heads = heads // group
    mark = marks + index * kv_heads + kv_head
    if EXACT and tl.load(mark) == 0:
        return
    b, j = index // (blocks * SUBS), index // SUBS % blocks
    start = (index % SUBS * BLOCK_N).to(tl.int32)
    first = j * BK + start
    n, d, e = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    limit = tl.minimum(BK - start, k_len - first).to(tl.int32)
    key = rows(k + b * k_batch + kv_head * k_head + first * k_token, n, d, k_token, limit, True, DIM)
    value = rows(v + b * v_batch + kv_head * v_head + first * v_token, n, e, v_token, limit, True, V_DIM)
    c = scale * LOG2_E
    to_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    to_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    partial = 0
    for r in tl.range(0, group, num_stages=1):
        h = kv_head * group + r
        row = (b * heads + h) * q_len
        entry = b * mask_batch + h * mask_head  # of the mask's batch entries and heads
        q_at, do_at = q + b * q_batch + h * q_head, dout + b * do_batch + h * do_head
        line = full_offsets + entry * (blocks + 1) + j
        begin = tl.load(line)
        to_k, to_v = _dkv_along(
            to_k, to_v, key, value, q_at, do_at, log2 + row, deltas + row, q_token, do_token, q_len, c, bits,
            full_indices + entry * full_width + begin, tiles, tl.load(line + 1) - begin, n, start,
            DIM, V_DIM, BLOCK_D, BLOCK_V, BQ, BK, BLOCK_M, BLOCK_N, PRECISION, False, EXACT,
        )  # fmt: skip
        line = offsets + entry * (blocks + 1) + j
        begin = tl.load(line)
        count = tl.load(line + 1) - begin
        at = entry * width + begin
        to_k, to_v = _dkv_along(
            to_k, to_v, key, value, q_at, do_at, log2 + row, deltas + row, q_token, do_token, q_len, c, bits,
            indices + at, tiles + at, count, n, start,
            DIM, V_DIM, BLOCK_D, BLOCK_V, BQ, BK, BLOCK_M, BLOCK_N, PRECISION, True, EXACT,
        )  # fmt: skip
        partial += count
    if not EXACT:
        tl.store(mark, tl.where(partial > 0, tl.maximum(any_infinite(to_k), any_infinite(to_v)), 0))
    row = (b * k_len + first) * kv_heads + kv_head
    inside = n[:, None] < limit
    at = row * DIM + n[:, None] * (kv_heads.to(tl.int64) * DIM) + d[None, :]
    tl.store(dk + at, (to_k * scale).to(dk.dtype.element_ty), mask=inside & (d[None, :] < DIM))
    at = row * V_DIM + n[:, None] * (kv_heads.to(tl.int64) * V_DIM) + e[None, :]
    tl.store(dv + at, to_v.to(dv.dtype.element_ty), mask=inside & (e[None, :] < V_DIM))


def block_sparse_attention_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    kv_tiles: Tensor,
    full_kv_num_blocks: Tensor,
    full_kv_indices: Tensor,
    tiles: Tensor,
    bk: int,
    scale: float,
    offsets: Tensor | None = None,
    indices: Tensor | None = None,
    places: Tensor | None = None,
    full_offsets: Tensor | None = None,
    full_indices: Tensor | None = None,
    to_q: bool = True,
    to_kv: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in q, k and v, contiguous, in their dtypes; ``out`` and ``lse`` as the forward made them, the last
    dim of ``dout`` contiguous. The lists by key block are made here unless they are given; unless ``to_q`` the gradient
    in q is empty and not computed, unless ``to_kv`` those in k and v."""
    batch, q_len, heads, _ = q.shape
    dq, dk, dv = (x.new_empty(x.shape if to else 0) for x, to in ((q, to_q), (k, to_kv), (v, to_kv)))
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    delta, log2 = torch.empty_like(lse), torch.empty_like(lse)
    _delta[(batch * triton.cdiv(q_len, ROWS), heads)](
        dout, out, lse, dlse, delta, log2, *dout.stride()[:3], *dlse.stride(), q_len, heads,
        V_DIM=v.shape[3], BLOCK_V=max(16, triton.next_power_of_2(v.shape[3])), ROWS=ROWS, num_warps=4,
    )  # fmt: skip
    q, scale, sign = positive(q, scale)
    strides = (*dout.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    masks, mask_heads, nq, width = kv_indices.shape
    full_width, bq, kv_heads = full_kv_indices.shape[3], tiles.shape[1], k.shape[2]
    some_partial = (False, True)[: 1 + (width > 0)]  # else there is nothing to compute again

    options = tile_options("dq", q, v, bq, bk)
    grid = (batch * nq * triton.cdiv(bq, options["BLOCK_M"]), heads)
    marks = q.new_empty(grid, dtype=torch.int32)
    for exact in some_partial if to_q else ():
        _dq[grid](
            dout, q, k, v, log2, delta, dq, marks, kv_num_blocks, kv_indices, kv_tiles, full_kv_num_blocks,
            full_kv_indices, tiles, *strides, q_len, k.shape[1], nq, nq * mask_heads if masks > 1 else 0,
            nq if mask_heads > 1 else 0, width, full_width, heads, heads // kv_heads, scale, **options, EXACT=exact,
        )  # fmt: skip

    nk = triton.cdiv(k.shape[1], bk)
    if to_kv and offsets is None:
        offsets, indices, places = by_column(kv_num_blocks, kv_indices, nk, kv_tiles)
        full_offsets, full_indices, _ = by_column(full_kv_num_blocks, full_kv_indices, nk, full_kv_indices)
    options = tile_options("dkv", q, v, bq, bk)
    grid = (batch * nk * triton.cdiv(bk, options["BLOCK_N"]), kv_heads)
    marks = q.new_empty(grid, dtype=torch.int32)
    for exact in some_partial if to_kv else ():
        _dkv[grid](
            dout, q, k, v, log2, delta, dk, dv, marks, offsets, indices, places, full_offsets, full_indices, tiles,
            *strides, q_len, k.shape[1], nk, mask_heads if masks > 1 else 0, 1 if mask_heads > 1 else 0,
            nq * width, nq * full_width, heads, heads // kv_heads, scale, **options, EXACT=exact,
        )  # fmt: skip
    return dq if sign > 0 else dq.mul_(sign), dk, dv
