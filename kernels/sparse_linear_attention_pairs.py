"""What the kernels of sparse_linear_attention's linear branch share: which blocks are marginal as a whole, sums of
blocks' states, and weights of the pairs of the other blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hhattn.kernels.block_linear_attention import Tiles, tile, tiles_of
from hhattn.kernels.block_sparse_attention_tiles import kept
from hhattn.kernels.feature_map import mapped, product, tf32
from hhattn.masks._bits import popcount
from hhattn.masks.block_mask import by_column

# Of kernels that follow lists. Never specialised: not for being 1, not for what divides them. Strides are, so that
# loads are wide.
LENGTHS = ["q_len", "k_len", "blocks", "mask_batch", "mask_head", "width", "heads", "group"]
STATES = 1 << 28  # bytes of states at once


class Pairs(NamedTuple):
    """``whole`` [Bm, Hm, nq, nk] uint8: blocks of which every pair within the lengths is marginal. The others that have
    any are parts: partial blocks of the mask, ``counts`` [Bm, Hm, nq], ``columns`` and ``tiles`` [Bm, Hm, nq, width],
    int32, tile -1 for entries that aren't parts after all."""

    whole: Tensor
    counts: Tensor
    columns: Tensor
    tiles: Tensor
    complement: bool

    def of_heads(self, first: int, last: int) -> Pairs:
        """Those of query heads first ... last - 1."""
        if self.whole.shape[1] == 1:
            return self
        return Pairs(*(x[:, first:last].contiguous() for x in self[:4]), self.complement)

    def columns_lists(self) -> tuple[Tensor, Tensor, Tensor]:
        """The parts by key block: offsets [Bm, Hm, nk + 1], query blocks and tiles [Bm, Hm, nq * width]."""
        offsets, rows, tiles = by_column(self.counts, self.columns, self.whole.shape[3], self.tiles)
        return offsets, rows.contiguous(), tiles.contiguous()


def pairs_of(
    counts: Tensor,
    columns: Tensor,
    tiles: Tensor,
    full_counts: Tensor,
    full_columns: Tensor,
    bits: Tensor,
    bk: int,
    q_len: int,
    k_len: int,
    complement: bool,
) -> Pairs:
    """From a BlockMask's tensors, on their device, without waiting for it."""
    bq, nk, device = bits.shape[1], triton.cdiv(k_len, bk), counts.device
    queries, keys = (
        (length - size * torch.arange(n, device=device)).clamp(max=size)
        for length, size, n in ((q_len, bq, counts.shape[2]), (k_len, bk, nk))
    )
    inside = torch.arange(columns.shape[3], device=device) < counts[..., None]
    at = columns.long()
    pairs = queries[:, None] * keys[at]
    held = torch.nn.functional.pad(popcount(bits), (0, 1))[tiles.long()]
    held = pairs - held if complement else held
    beyond = torch.arange(full_columns.shape[3], device=device) >= full_counts[..., None]
    listed = torch.zeros(*counts.shape, nk + 1, dtype=torch.uint8, device=device)
    listed.scatter_(3, full_columns.long().masked_fill(beyond, nk), 1)
    listed.scatter_(3, at.masked_fill(~inside if complement else ~inside | (held < pairs), nk), 1)
    whole = 1 - listed[..., :nk] if complement else listed[..., :nk].contiguous()
    part = inside & (held > 0) & (held < pairs)
    return Pairs(whole, counts, columns, tiles.masked_fill(~part, -1), complement)


def groups(q: Tensor, kv_heads: int, blocks: int, v_dim: int) -> Iterator[tuple[slice, slice]]:
    """Query heads and the key heads that they share, as many together as have states of :data:`STATES` bytes."""
    rep = q.shape[2] // kv_heads
    each = 4 * q.shape[0] * rep * blocks * q.shape[3] * (v_dim + 1)
    together = max(1, STATES // each)
    for first in range(0, kv_heads, together):
        last = min(first + together, kv_heads)
        yield slice(first * rep, last * rep), slice(first, last)


@triton.jit(do_not_specialize=["one_batch", "one_head", "rows", "n", "heads", "reps", "share", "size"])
def _add_up(
    ones, x, y, one_batch: tl.int64, one_head: tl.int64, rows, n, heads, reps, share, size,
    TURNED: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """y[b, g] = Σ ones[b, h] x[b, h // share] over the ``reps`` heads h of g, ones [rows, n], or that TURNED, and x
    [n, size]; what isn't finite meets ones only."""
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    e = tl.program_id(1).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    b, g = tl.program_id(2).to(tl.int64) // heads, tl.program_id(2).to(tl.int64) % heads
    j = tl.arange(0, BLOCK_J)
    total = tl.zeros([BLOCK_I, BLOCK_E], tl.float32)
    for r in range(reps):
        h = g * reps + r
        of_head = ones + b * one_batch + h * one_head
        state = x + (b * (heads * reps // share) + h // share) * n * size + j[:, None] * size.to(tl.int64) + e[None, :]
        for first in range(0, n, BLOCK_J):
            column = (first + j[None, :]).to(tl.int64)
            at = column * rows + i[:, None] if TURNED else i[:, None] * n.to(tl.int64) + column
            one = tl.load(of_head + at, mask=(i[:, None] < rows) & (column < n), other=0).to(tl.float32)
            s = tl.load(state, mask=(first + j[:, None] < n) & (e[None, :] < size), other=0.0)
            finite = tl.abs(s) < float("inf")
            clean = tl.where(finite, s, 0.0)
            high = tf32(clean)
            total = tl.dot(one, tf32(clean - high), total, input_precision="tf32")
            total = tl.dot(one, high, total, input_precision="tf32")
            if tl.max(tl.where(finite, 0, 1)) > 0:
                zero = tl.zeros([BLOCK_I, BLOCK_E], tl.float32)
                up = tl.dot(one, tl.where(finite | (s < 0), 0.0, 1.0), zero, input_precision="tf32")
                down = tl.dot(one, tl.where(finite | (s > 0), 0.0, 1.0), zero, input_precision="tf32")
                total += tl.where(up > 0, float("inf"), 0.0) + tl.where(down > 0, float("-inf"), 0.0)
            state += BLOCK_J * size.to(tl.int64)
    where = y + ((b * heads + g) * rows + i[:, None]) * size.to(tl.int64) + e[None, :]
    tl.store(where, total, mask=(i[:, None] < rows) & (e[None, :] < size))


def add_up(whole: Tensor, x: Tensor, heads: int, turned: bool = False) -> Tensor:
    """Sums of blocks' states x [B, heads of x, blocks, ...] over the lists that ``whole`` [Bm, Hm, nq, nk] has of each
    query block or, ``turned``, of each key block: [B, heads, blocks, ...]. Heads are those of q, each of which sums its
    key head's states; turned, those of k, of which each sums its query heads' states."""
    batch, given = x.shape[:2]
    rows, n = whole.shape[:1:-1] if turned else whole.shape[2:]
    reps, share = (given // heads, 1) if turned else (1, heads // given)
    y = x.new_empty(batch, heads, rows, *x.shape[3:])
    size = x[0, 0, 0].numel()
    steps = (whole.stride(0) if whole.shape[0] > 1 else 0, whole.stride(1) if whole.shape[1] > 1 else 0)
    _add_up[(triton.cdiv(rows, 64), triton.cdiv(size, 128), batch * heads)](
        whole, x, y, *steps, rows, n, heads, reps, share, size,
        TURNED=turned, BLOCK_I=64, BLOCK_J=16, BLOCK_E=128, num_warps=8, num_stages=2,
    )  # fmt: skip
    return y


def part_options(q: Tensor, v: Tensor, bq: int, bk: int) -> dict[str, Any]:
    """Constants and options of a kernel that computes parts: a tile of pairs and whole rows of q, k and v at once."""
    dim, v_dim = (max(16, triton.next_power_of_2(x.shape[3])) for x in (q, v))
    most = 16 if max(dim, v_dim) > 128 or q.dtype == torch.float32 else 32
    m, n = (min(most, max(16, triton.next_power_of_2(size))) for size in (bq, bk))
    return {
        "DIM": q.shape[3], "V_DIM": v.shape[3], "BQ": bq, "BK": bk, "BLOCK_M": m, "BLOCK_N": n,
        "BLOCK_D": dim, "BLOCK_V": v_dim, "num_warps": 4, "num_stages": 1,
    }  # fmt: skip


@triton.jit
def features(p, t, rows, d, token, DIM: tl.constexpr, PHI: tl.constexpr):
    """φ of the rows ``t`` of the head at ``p``, float32; 0 outside."""
    x = tile(p, t, rows, d, token, DIM).to(tl.float32)
    return mapped(x, rows[:, None] & (d[None, :] < DIM), PHI)


@triton.jit
def marginal(bits, number, row, column, start, inside, BQ: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
             COMPLEMENT: tl.constexpr):  # fmt: skip
    """Which pairs of a part are marginal; see ``kept``. ``inside`` says which are within the lengths."""
    keep = kept(bits, number, row[:, None], column[None, :], start, BQ, BK, BLOCK)
    if COMPLEMENT:
        keep = inside & (keep == 0)
    return keep


@triton.jit
def weights(phi_q, phi_k, keep, like: tl.constexpr):
    """φ(q)·φ(k) [queries, keys], 0 where ``keep`` says so, whatever is there."""
    zero = tl.zeros([phi_q.shape[0], phi_k.shape[0]], tl.float32)
    return tl.where(keep, product(phi_q, tl.trans(phi_k), zero, like, 2), 0.0)


@triton.jit(do_not_specialize=["den_batch", "den_head", "q_len", "blocks", "heads", "eps"])
def _outputs(
    q, kv, k_sum, sums, total, out, den, q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64,
    out_batch: tl.int64, out_token: tl.int64, out_head: tl.int64, den_batch: tl.int64, den_head: tl.int64,
    q_len: tl.int64, blocks: tl.int64, heads, eps: tl.float32,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PHI: tl.constexpr, BQ: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """φ(q)ᵀ KV of a tile of a block's rows, with its parts' share, or None; divided by the weights if ``k_sum`` is
    given."""
    SUBS: tl.constexpr = (BQ + BLOCK_T - 1) // BLOCK_T
    index, h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, i, start = index // (blocks * SUBS), index // SUBS % blocks, (index % SUBS * BLOCK_T).to(tl.int32)
    m, d, c = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    t = i * BQ + start + m
    rows = (t < q_len) & (start + m < BQ)
    place = (b * heads + h) * blocks + i
    state = tl.load(kv + place * (DIM * V_DIM) + d[:, None] * V_DIM + c[None, :],
                    mask=(d[:, None] < DIM) & (c[None, :] < V_DIM), other=0.0)  # fmt: skip
    phi = features(q + b * q_batch + h * q_head, t, rows, d, q_token, DIM, PHI)
    acc = product(phi, state, tl.zeros([BLOCK_T, BLOCK_V], tl.float32), q.dtype.element_ty, 2)
    inside = rows[:, None] & (c[None, :] < V_DIM)
    at = (b * q_len + t) * heads + h
    if sums is not None:
        acc += tl.load(sums + at[:, None] * V_DIM + c[None, :], mask=inside, other=0.0)
    if k_sum is not None:
        weight = tl.sum(phi * tl.load(k_sum + place * DIM + d, mask=d < DIM, other=0.0)[None, :], 1)
        if total is not None:
            weight += tl.load(total + at, mask=rows, other=0.0)
        weight = tl.where(weight == 0, float("inf"), weight + eps)
        tl.store(den + b * den_batch + h * den_head + t, weight, mask=rows & (tl.program_id(2) == 0))
        acc /= weight[:, None]
    to = out + b * out_batch + h * out_head + t[:, None] * out_token + c[None, :]
    tl.store(to, acc.to(out.dtype.element_ty), mask=inside)


def rows_and_warps(x: Tensor, t: Tiles, size: int) -> tuple[int, int]:
    """Of a program that holds a state and rows of ``x`` of a block of ``size``. The parts of TF32 that float32 goes in
    take twice the registers of others."""
    most, warps = (min(t.tokens, 32), 8) if x.dtype == torch.float32 else (t.tokens, t.warps)
    return min(most, max(16, triton.next_power_of_2(size))), warps


def outputs(
    q: Tensor,
    kv: Tensor,
    k_sum: Tensor | None,
    sums: Tensor | None,
    total: Tensor | None,
    out: Tensor,
    den: Tensor | None,
    size: int,
    phi: int,
    eps: float,
) -> None:
    """Writes out [B, S, H, Dv] and den [B, H, S], from states of blocks of ``size`` rows of q and sums over parts."""
    (batch, tokens, heads, dim), v_dim = q.shape, out.shape[3]
    t, blocks = tiles_of(q, v_dim), triton.cdiv(tokens, size)
    rows, warps = rows_and_warps(q, t, size)
    _outputs[(batch * blocks * triton.cdiv(size, rows), heads, triton.cdiv(v_dim, t.v_dim))](
        q, kv, k_sum, sums, total, out, den, *q.stride()[:3], *out.stride()[:3],
        *((0, 0) if den is None else den.stride()[:2]), tokens, blocks, heads, eps,
        DIM=dim, V_DIM=v_dim, PHI=phi, BQ=size, BLOCK_T=rows, BLOCK_D=t.dim, BLOCK_V=t.v_dim,
        num_warps=warps,
    )  # fmt: skip
