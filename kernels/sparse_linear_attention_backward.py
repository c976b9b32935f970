"""Triton kernels of the backward of sparse_linear_attention's linear branch.

With u = dout / den and e = -(dout·out) / den, 0 where a query has no weights:

    query blocks   dφ(q) = KV_i u + e K_i                    dKV_i = Σ φ(q) uᵀ    dK_i = Σ e φ(q)
    key blocks     dφ(k) = dKV_j v + dK_j    dv = dKV_jᵀ φ(k)    dKV_j = Σ_i dKV_i    dK_j = Σ_i dK_i

Sums over i take the forward's matrix turned round. Parts, blocks that aren't marginal as a whole, are computed pair by
pair before, along the mask's lists for queries and along the lists turned round for keys. No atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hhattn.kernels.block_linear_attention import tile, tiles_of, weighted_sums
from hhattn.kernels.block_sparse_attention_tiles import finite, precision, times
from hhattn.kernels.feature_map import map_gradient, product
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
    rows_and_warps,
    weights,
)


@triton.jit(do_not_specialize=["den_batch", "den_head", "tokens", "heads"])
def _upstream(
    dout, out, den, factor, weight, dout_batch: tl.int64, dout_token: tl.int64, dout_head: tl.int64,
    out_batch: tl.int64, out_token: tl.int64, out_head: tl.int64, den_batch: tl.int64, den_head: tl.int64,
    tokens: tl.int64, heads, V_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """1 / den and e [B, Sq, H] of a tile of queries."""
    tiles = (tokens + BLOCK_T - 1) // BLOCK_T
    index, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, t = index // tiles, index % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    rows, c = t < tokens, tl.arange(0, BLOCK_V)
    divisor = tl.load(den + b * den_batch + h * den_head + t, mask=rows, other=float("inf"))
    used = divisor != float("inf")
    x = tile(dout + b * dout_batch + h * dout_head, t, rows & used, c, dout_token, V_DIM).to(tl.float32)
    y = tile(out + b * out_batch + h * out_head, t, rows & used, c, out_token, V_DIM).to(tl.float32)
    at = (b * tokens + t) * heads + h
    tl.store(factor + at, tl.where(used, 1.0 / divisor, 0.0), mask=rows)
    tl.store(weight + at, tl.where(used, -tl.sum(x * y, 1) / divisor, 0.0), mask=rows)


@triton.jit
def _weight_gradients(y, v, factor, e, keep, PRECISION: tl.constexpr):
    """u·v + e [queries, keys], 0 where ``keep`` says so; y has the rows of dout."""
    g = tl.dot(y, tl.trans(v), input_precision=PRECISION)
    return tl.where(keep, g * factor[:, None] + e[:, None], 0.0)


@triton.jit(do_not_specialize=LENGTHS)
def _part_queries(
    q, k, v, dout, factor, weight, dphi, counts, columns, tiles, bits,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64, k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64,
    v_batch: tl.int64, v_token: tl.int64, v_head: tl.int64,
    y_batch: tl.int64, y_token: tl.int64, y_head: tl.int64,
    q_len: tl.int64, k_len: tl.int64, blocks: tl.int64, mask_batch: tl.int64, mask_head: tl.int64, width: tl.int64,
    heads, group,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PHI: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    COMPLEMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dφ(q) [B, Sq, H, D] float32 of a tile of queries' parts."""
    SUBS: tl.constexpr = (BQ + BLOCK_M - 1) // BLOCK_M
    index, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, i, start = index // (blocks * SUBS), index // SUBS % blocks, (index % SUBS * BLOCK_M).to(tl.int32)
    m, n, d, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    t = i * BQ + start + m
    rows = (t < q_len) & (start + m < BQ)
    place = (b * q_len + t) * heads + h
    by, e = tl.load(factor + place, mask=rows, other=0.0), tl.load(weight + place, mask=rows, other=0.0)
    y = tile(dout + b * y_batch + h * y_head, t, rows & (by != 0), c, y_token, V_DIM)
    k += b * k_batch + h // group * k_head
    v += b * v_batch + h // group * v_head
    line = b * mask_batch + h * mask_head + i
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
                g = _weight_gradients(y, tile(v, key, present, c, v_token, V_DIM), by, e, keep, PRECISION)
                phi_k = finite(features(k, key, present, d, k_token, DIM, PHI), True)
                acc = product(g, phi_k, acc, q.dtype.element_ty, 2)
    tl.store(dphi + place[:, None] * DIM + d[None, :], acc, mask=rows[:, None] & (d[None, :] < DIM))


@triton.jit(do_not_specialize=LENGTHS)
def _part_keys(
    q, k, v, dout, factor, weight, dphi, dv, offsets, listed, tiles, bits,
    q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64, k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64,
    v_batch: tl.int64, v_token: tl.int64, v_head: tl.int64,
    y_batch: tl.int64, y_token: tl.int64, y_head: tl.int64,
    q_len: tl.int64, k_len: tl.int64, blocks: tl.int64, mask_batch: tl.int64, mask_head: tl.int64, width: tl.int64,
    heads, group,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PHI: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    COMPLEMENT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dφ(k) [B, Sk, H_kv, D] and dv [B, Sk, H_kv, Dv], float32, of a tile of keys' parts. ``width`` entries a head and
    mask, ``mask_batch`` and ``mask_head`` in heads."""
    SUBS: tl.constexpr = (BK + BLOCK_N - 1) // BLOCK_N
    index, g = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, j, at = index // (blocks * SUBS), index // SUBS % blocks, (index % SUBS * BLOCK_N).to(tl.int32)
    m, n, d, c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    key = j * BK + at + n
    present = (key < k_len) & (at + n < BK)
    phi_k = features(k + b * k_batch + g * k_head, key, present, d, k_token, DIM, PHI)
    value = tile(v + b * v_batch + g * v_head, key, present, c, v_token, V_DIM)
    to_k, to_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for r in range(group):
        h = g * group + r
        of_head = b * mask_batch + h * mask_head
        begin = tl.load(offsets + of_head * (blocks + 1) + j)
        for entry in range(begin, tl.load(offsets + of_head * (blocks + 1) + j + 1)):
            number = tl.load(tiles + of_head * width + entry)
            if number >= 0:
                first = tl.load(listed + of_head * width + entry).to(tl.int64) * BQ
                for start in range(0, BQ, BLOCK_M):
                    t = first + start + m
                    rows = (t < q_len) & (start + m < BQ)
                    place = (b * q_len + t) * heads + h
                    by = tl.load(factor + place, mask=rows, other=0.0)
                    e = tl.load(weight + place, mask=rows, other=0.0)
                    y = tile(dout + b * y_batch + h * y_head, t, rows & (by != 0), c, y_token, V_DIM)
                    phi_q = features(q + b * q_batch + h * q_head, t, rows, d, q_token, DIM, PHI)
                    keep = marginal(
                        bits, number, start + m, n, at, rows[:, None] & present[None, :], BQ, BK, BLOCK_N, COMPLEMENT
                    )
                    w = weights(phi_q, phi_k, keep, q.dtype.element_ty)
                    to_v = times(tl.trans(w * by[:, None]), y, to_v, PRECISION, True)
                    dw = _weight_gradients(y, value, by, e, keep, PRECISION)
                    to_k = product(tl.trans(dw), finite(phi_q, True), to_k, q.dtype.element_ty, 2)
    place = (b * k_len + key) * (heads // group) + g
    tl.store(dphi + place[:, None] * DIM + d[None, :], to_k, mask=present[:, None] & (d[None, :] < DIM))
    tl.store(dv + place[:, None] * V_DIM + c[None, :], to_v, mask=present[:, None] & (c[None, :] < V_DIM))


@triton.jit(do_not_specialize=["tokens", "blocks", "heads"])
def _gradients(
    x, y, factor, weight, kv, k_sum, dphi, dx,
    x_batch: tl.int64, x_token: tl.int64, x_head: tl.int64, y_batch: tl.int64, y_token: tl.int64, y_head: tl.int64,
    dx_batch: tl.int64, dx_token: tl.int64, dx_head: tl.int64,
    tokens: tl.int64, blocks: tl.int64, heads,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PHI: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of a block's tokens: of x = q, for y = dout times ``factor`` and the block's KV, and K times
    ``weight``; or of x = k, for y = v and the gradients of the block's KV and K. ``dphi`` is the parts' share, or
    None."""
    SUBS: tl.constexpr = (SIZE + BLOCK_T - 1) // BLOCK_T
    index, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, i, start = index // (blocks * SUBS), index // SUBS % blocks, (index % SUBS * BLOCK_T).to(tl.int32)
    m, d, c = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    t = i * SIZE + start + m
    rows = (t < tokens) & (start + m < SIZE)
    at, block = (b * tokens + t) * heads + h, (b * heads + h) * blocks + i
    inside = rows[:, None] & (d[None, :] < DIM)
    row = tile(x + b * x_batch + h * x_head, t, rows, d, x_token, DIM).to(tl.float32)
    keys = tl.load(k_sum + block * DIM + d, mask=d < DIM, other=0.0)
    used = rows
    if factor is not None:
        by = tl.load(factor + at, mask=rows, other=0.0)
        used = rows & (by != 0)  # others have no weights, whatever comes from upstream
    g = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for first in tl.static_range(0, V_DIM, BLOCK_V):
        column = first + c
        state = tl.load(kv + block * (DIM * V_DIM) + d[:, None] * V_DIM + column[None, :],
                        mask=(d[:, None] < DIM) & (column[None, :] < V_DIM), other=0.0)  # fmt: skip
        part = tile(y + b * y_batch + h * y_head, t, used, column, y_token, V_DIM).to(tl.float32)
        g = product(part, tl.trans(state), g, x.dtype.element_ty, 2)
    if factor is not None:
        e = tl.load(weight + at, mask=rows, other=0.0)
        g = g * by[:, None] + tl.where(used[:, None], e[:, None] * keys[None, :], 0.0)
    else:
        g += keys[None, :]
    if dphi is not None:
        g += tl.load(dphi + at[:, None] * DIM + d[None, :], mask=inside, other=0.0)
    dx_row = map_gradient(row, inside, g, PHI)
    tl.store(
        dx + b * dx_batch + h * dx_head + t[:, None] * dx_token + d[None, :],
        dx_row.to(dx.dtype.element_ty),
        mask=inside,
    )


def _part_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    factor: Tensor,
    weight: Tensor,
    pairs: Pairs,
    bits: Tensor,
    bk: int,
    phi: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What parts add to the gradients of φ(q), φ(k) and v, float32; None where the mask has no partial blocks."""
    if not pairs.columns.shape[3]:
        return None, None, None
    dphi_q, dphi_k, dv = (x.new_empty(x.shape, dtype=torch.float32) for x in (q, k, v))
    options: dict[str, Any] = part_options(q, v, bits.shape[1], bk)
    options |= {"PHI": phi, "COMPLEMENT": pairs.complement, "PRECISION": precision(q)}
    (batch, q_len, heads, _), bq = q.shape, bits.shape[1]
    masks, mask_heads, nq, width = pairs.columns.shape
    nk, rep = pairs.whole.shape[3], heads // k.shape[2]
    strides = [step for x in (q, k, v, dout) for step in x.stride()[:3]]
    _part_queries[(batch * nq * triton.cdiv(bq, options["BLOCK_M"]), heads)](
        q, k, v, dout, factor, weight, dphi_q, pairs.counts, pairs.columns, pairs.tiles, bits, *strides,
        q_len, k.shape[1], nq, nq * mask_heads if masks > 1 else 0, nq if mask_heads > 1 else 0, width, heads, rep,
        **options,
    )  # fmt: skip
    _part_keys[(batch * nk * triton.cdiv(bk, options["BLOCK_N"]), k.shape[2])](
        q, k, v, dout, factor, weight, dphi_k, dv, *pairs.columns_lists(), bits, *strides,
        q_len, k.shape[1], nk, mask_heads if masks > 1 else 0, 1 if mask_heads > 1 else 0, nq * width, heads, rep,
        **options,
    )  # fmt: skip
    return dphi_q, dphi_k, dv


def _launch_gradients(
    x: Tensor,
    y: Tensor,
    factor: Tensor | None,
    weight: Tensor | None,
    states: list[Tensor],
    dphi: Tensor | None,
    dx: Tensor,
    size: int,
    phi: int,
) -> None:
    (batch, tokens, heads, dim), v_dim = x.shape, y.shape[3]
    t, blocks = tiles_of(x, v_dim), triton.cdiv(tokens, size)
    rows, warps = rows_and_warps(x, t, size)
    _gradients[(batch * blocks * triton.cdiv(size, rows), heads)](
        x, y, factor, weight, *states, dphi, dx, *x.stride()[:3], *y.stride()[:3], *dx.stride()[:3],
        tokens, blocks, heads,
        DIM=dim, V_DIM=v_dim, PHI=phi, SIZE=size, BLOCK_T=rows, BLOCK_D=t.dim, BLOCK_V=t.v_dim,
        num_warps=warps,
    )  # fmt: skip


def sparse_linear_marginal_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    den: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    kv_tiles: Tensor,
    full_kv_num_blocks: Tensor,
    full_kv_indices: Tensor,
    tiles: Tensor,
    bk: int,
    complement: bool,
    phi: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; dout [B, Sq, H, Dv] with its last dim contiguous, out and den as the forward made them,
    the rest as for the forward."""
    (batch, q_len, _, _), v_dim, bq = q.shape, v.shape[3], tiles.shape[1]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if not q.numel():
        return dq, dk.zero_(), dv.zero_()
    lists = (kv_num_blocks, kv_indices, kv_tiles, full_kv_num_blocks, full_kv_indices, tiles)
    every = pairs_of(*lists, bk, q_len, k.shape[1], complement)
    for of_q, of_k in groups(q, k.shape[2], max(every.whole.shape[2:]), v_dim):
        pairs, some_q, some_dout, some_out, some_den = (
            every.of_heads(of_q.start, of_q.stop), q[:, :, of_q], dout[:, :, of_q], out[:, :, of_q], den[:, of_q],
        )  # fmt: skip
        some_k, some_v, heads, kv_heads = k[:, :, of_k], v[:, :, of_k], some_q.shape[2], of_k.stop - of_k.start
        factor, weight = (den.new_empty(batch, q_len, heads) for _ in range(2))
        _upstream[(batch * triton.cdiv(q_len, 32), heads)](
            some_dout, some_out, some_den, factor, weight, *some_dout.stride()[:3], *some_out.stride()[:3],
            *some_den.stride()[:2], q_len, heads, V_DIM=v_dim, BLOCK_T=32,
            BLOCK_V=max(16, triton.next_power_of_2(v_dim)), num_warps=4,
        )  # fmt: skip
        parts = _part_gradients(some_q, some_k, some_v, some_dout, factor, weight, pairs, tiles, bk, phi)
        sums = weighted_sums(some_k, some_v, None, None, None, None, bk, [], phi, phi)
        states = [add_up(pairs.whole, x, heads) for x in sums]
        _launch_gradients(some_q, some_dout, factor, weight, states, parts[0], dq[:, :, of_q], bq, phi)
        sums = weighted_sums(some_q, some_dout, factor, weight, None, None, bq, [], phi, phi)
        states = [add_up(pairs.whole, x, kv_heads, turned=True) for x in sums]
        _launch_gradients(some_k, some_v, None, None, states, parts[1], dk[:, :, of_k], bk, phi)
        outputs(some_k, states[0], None, parts[2], None, dv[:, :, of_k], None, bk, phi, 0.0)
    return dq, dk, dv
