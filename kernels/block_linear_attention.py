"""Triton kernels of block_linear_attention: what is as long as the clip, on both sides of the prefix over chunks.

    sums of a chunk      KV = Σ_j g_j · R_j ψ(k_j) v_jᵀ        K = Σ_j φ(k_j)
    outputs of a chunk   out_p = (R_p ψ(q_p))ᵀ KV / (φ(q_p)ᵀ K + eps)

A chunk is thousands of tokens, so it is taken in pieces of ``PIECE``: a program adds up one piece of one head, and a
second kernel a chunk's pieces, one after another. Sums are the same bits every time, without atomics. In the outputs a
program keeps its chunk's state in registers and passes its piece's tokens by it.

k, v and q are read once while a head's values fit one tile (of 128 in bfloat16, half as many in other dtypes and for
D > 128), else once a tile. Head dims
are padded to powers of two in registers only: at D = 112 a quarter of the products is with zeros.

Numbers of tokens, chunks and pieces, and strides, are int64; the numbers are never specialised: one compilation serves
every clip.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hhattn.kernels.feature_map import angles, mapped, product, rotated

PIECE = 1024  # tokens that a program takes


class Chunks(NamedTuple):
    """Chunks as kernels take them: of ``length`` tokens, the last may be shorter, each in pieces of ``piece``; where
    lengths differ, ``table`` [pieces, 3] (chunk, first token, end) and ``firsts`` [chunks + 1], each chunk's first
    piece, int64 on the device, say it instead."""

    count: int
    pieces: int
    length: int
    piece: int
    table: Tensor | None
    firsts: Tensor | None


def chunks_of(x: Tensor, length: int, listed: list[int]) -> Chunks:
    """Chunks of ``length`` tokens of x [B, S, ...], S > 0, or, if there are any, of the lengths listed."""
    tokens = x.shape[1]
    if listed and all(n == listed[0] for n in listed[:-1]) and listed[-1] <= listed[0]:
        length, listed = listed[0], []
    if not listed:
        count = triton.cdiv(tokens, length)
        last = tokens - (count - 1) * length
        pieces = (count - 1) * triton.cdiv(length, PIECE) + triton.cdiv(last, PIECE)
        return Chunks(count, pieces, length, PIECE, None, None)
    make, stream = _tables, None
    if x.is_cuda:  # kept for the stream that they are copied on; not from a graph, whose copy comes when it is replayed
        stream = torch.cuda.current_stream(x.device)
        make = _tables.__wrapped__ if torch.cuda.is_current_stream_capturing() else _tables
    table, firsts = make(tuple(listed), PIECE, x.device, stream)
    return Chunks(len(listed), len(table), 0, PIECE, table, firsts)


@functools.lru_cache(maxsize=32)
def _tables(listed: tuple[int, ...], piece: int, device: torch.device, stream: object) -> tuple[Tensor, Tensor]:
    """``table`` and ``firsts`` of :class:`Chunks`, kept: every layer and step has the same chunks."""
    rows, firsts, begin = [], [0], 0
    for chunk, n in enumerate(listed):
        rows += [(chunk, at, min(at + piece, begin + n)) for at in range(begin, begin + n, piece)]
        firsts.append(len(rows))
        begin += n
    return _on_device(rows, device), _on_device(firsts, device)


def _on_device(numbers: list[int] | list[tuple[int, ...]], device: torch.device) -> Tensor:
    """Host integers as a tensor, without waiting for the device."""
    pinned = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.int64, device="cpu", pin_memory=pinned).to(device, non_blocking=True)


class Tiles(NamedTuple):
    """Tokens, channels and values of a program's tile, its warps, and how many tiles are on their way at once."""

    tokens: int
    dim: int
    v_dim: int
    warps: int
    stages: int


def tiles_of(x: Tensor, v_dim: int) -> Tiles:
    """By head dim and dtype of x [B, S, H, D]. A state of D x Dv float32 is in registers, 64 a thread at most; the two
    parts of one that takes part in products are 64 more, 128 in TF32."""
    dim, v = (max(16, triton.next_power_of_2(n)) for n in (x.shape[3], v_dim))
    v = min(v, (16384 if x.dtype == torch.bfloat16 else 8192) // dim, 128)
    return Tiles({256: 16, 128: 32}.get(dim, 64), dim, v, 4 if dim * v <= 4096 else 8, 3 if dim <= 64 else 2)


def parts_of(x: Tensor, psi: int, *changes: object) -> int:
    """Parts of a key in a product: one if ψ keeps its 16 bits and nothing changes them, else all 3."""
    return 1 if x.dtype != torch.float32 and psi <= 1 and all(change is None for change in changes) else 3


def halved(table: Tensor | None, dim: int) -> Tensor | None:
    """cos or sin [S, D], each number standing twice, or [S, D/2] already -> [S, D/2]: half the bytes a head reads."""
    if table is None:
        return None
    return (table if table.shape[1] == dim // 2 else table[:, ::2]).contiguous()


@triton.jit
def program(table, tokens, length, piece, pieces, heads):
    """b, h, the piece's number, its chunk, first token and end. Heads come first: they share rows of the tables."""
    index = tl.program_id(0).to(tl.int64)
    h, p, b = index % heads, index // heads % pieces, index // heads // pieces
    if table is None:
        each = (length + piece - 1) // piece
        chunk = p // each
        begin = chunk * length + p % each * piece
        end = tl.minimum(tl.minimum(begin + piece, chunk * length + length), tokens)
    else:
        chunk, begin, end = tl.load(table + 3 * p), tl.load(table + 3 * p + 1), tl.load(table + 3 * p + 2)
    return b, h, p, chunk, begin, end


@triton.jit
def tile(p, t, rows, c, token, WIDTH: tl.constexpr):
    """Tokens ``t`` and channels ``c`` of a head at ``p``, 0 where there are none."""
    return tl.load(p + t[:, None] * token + c[None, :], mask=rows[:, None] & (c[None, :] < WIDTH), other=0.0)


# Lengths are never specialised: not for being 1, not for what divides them. Strides are, so that loads are wide.
LENGTHS = ["tokens", "length", "piece", "pieces", "chunks"]


@triton.jit(do_not_specialize=LENGTHS[:-1])
def _sums(
    k, v, gate, weight, cos, sin, table, kv, k_sum,
    k_batch: tl.int64, k_token: tl.int64, k_head: tl.int64, v_batch: tl.int64, v_token: tl.int64, v_head: tl.int64,
    tokens: tl.int64, length: tl.int64, piece: tl.int64, pieces: tl.int64, heads,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PHI: tl.constexpr, PSI: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Sums of a piece, kv [B, H, pieces, D, Dv] and k_sum [B, H, pieces, D]. ``gate`` and ``weight`` [B, S, H] float32
    multiply ψ(k) and φ(k)."""
    b, h, p, _, begin, end = program(table, tokens, length, piece, pieces, heads)
    d, c = tl.arange(0, BLOCK_D), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    k += b * k_batch + h * k_head
    v += b * v_batch + h * v_head
    sums = tl.zeros([BLOCK_D, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for i in range(((end - begin + BLOCK_T - 1) // BLOCK_T).to(tl.int32)):
        t = begin + i * BLOCK_T + tl.arange(0, BLOCK_T)
        rows = t < end
        inside = rows[:, None] & (d[None, :] < DIM)
        x = tile(k, t, rows, d, k_token, DIM).to(tl.float32)
        y = tile(v, t, rows, c, v_token, V_DIM)
        phi = mapped(x, inside, PHI)
        psi = phi if PSI == PHI else mapped(x, inside, PSI)
        if weight is not None:
            phi *= tl.load(weight + (b * tokens + t) * heads + h, mask=rows, other=0.0)[:, None]
        total += phi
        if cos is not None:
            psi = rotated(psi, angles(cos, t, rows, DIM, BLOCK_D), angles(sin, t, rows, DIM, BLOCK_D))
        if gate is not None:
            psi *= tl.load(gate + (b * tokens + t) * heads + h, mask=rows, other=0.0)[:, None]
        sums = product(tl.trans(psi), y, sums, k.dtype.element_ty, PARTS)
    place = (b * heads + h) * pieces + p
    where = kv + place * (DIM * V_DIM) + d[:, None] * V_DIM + c[None, :]
    tl.store(where, sums, mask=(d[:, None] < DIM) & (c[None, :] < V_DIM))
    tl.store(k_sum + place * DIM + d, tl.sum(total, 0), mask=(d < DIM) & (tl.program_id(1) == 0))


@triton.jit(do_not_specialize=LENGTHS)
def _fold(
    x, y, firsts, tokens: tl.int64, length: tl.int64, piece: tl.int64, pieces: tl.int64, chunks: tl.int64, size,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """x [B·H, pieces, size] -> y [B·H, chunks, size], a chunk's pieces added up one after another."""
    index = tl.program_id(0).to(tl.int64)
    chunk = index % chunks
    if firsts is None:
        each = (length + piece - 1) // piece
        first = chunk * each
        count = (tl.minimum(length, tokens - chunk * length) + piece - 1) // piece
    else:
        first = tl.load(firsts + chunk)
        count = tl.load(firsts + chunk + 1) - first
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x += (index // chunks * pieces + first) * size
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(count.to(tl.int32)):
        total += tl.load(x + e, mask=e < size, other=0.0)
        x += size
    tl.store(y + index * size + e, total, mask=e < size)


def add_pieces(x: Tensor, chunks: Chunks, tokens: int) -> Tensor:
    """[B, H, pieces, ...] -> [B, H, chunks, ...]."""
    if chunks.pieces == chunks.count:
        return x
    y = x.new_empty(*x.shape[:2], chunks.count, *x.shape[3:])
    size = x[0, 0, 0].numel()
    _fold[(x.shape[0] * x.shape[1] * chunks.count, triton.cdiv(size, 1024))](
        x,
        y,
        chunks.firsts,
        tokens,
        chunks.length,
        chunks.piece,
        chunks.pieces,
        chunks.count,
        size,
        BLOCK=1024,
        num_warps=4,
    )
    return y


def weighted_sums(
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    length: int,
    listed: list[int],
    phi: int,
    psi: int,
) -> tuple[Tensor, Tensor]:
    """Σ gate · R ψ(k) vᵀ [B, H, chunks, D, Dv] and Σ weight · φ(k) [B, H, chunks, D], float32."""
    batch, tokens, heads, dim = k.shape
    v_dim = v.shape[3]
    if not k.numel():
        shape = (batch, heads, len(listed) or max(1, triton.cdiv(tokens, length)), dim)
        return k.new_zeros(*shape, v_dim, dtype=torch.float32), k.new_zeros(shape, dtype=torch.float32)
    chunks, t = chunks_of(k, length, listed), tiles_of(k, v_dim)
    kv, k_sum = (
        k.new_empty(batch, heads, chunks.pieces, *shape, dtype=torch.float32) for shape in ((dim, v_dim), (dim,))
    )
    cos, sin = halved(cos, dim), halved(sin, dim)
    _sums[(batch * heads * chunks.pieces, triton.cdiv(v_dim, t.v_dim))](
        k, v, gate, weight, cos, sin, chunks.table, kv, k_sum, *k.stride()[:3], *v.stride()[:3],
        tokens, chunks.length, chunks.piece, chunks.pieces, heads,
        DIM=dim, V_DIM=v_dim, PHI=phi, PSI=psi, PARTS=parts_of(k, psi, cos, gate),
        BLOCK_T=t.tokens, BLOCK_D=t.dim, BLOCK_V=t.v_dim, num_warps=t.warps, num_stages=t.stages,
    )  # fmt: skip
    return add_pieces(kv, chunks, tokens), add_pieces(k_sum, chunks, tokens)


def block_linear_sums(
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    length: int,
    listed: list[int],
    phi: int,
    psi: int,
) -> tuple[Tensor, Tensor]:
    """KV [B, H, chunks, D, Dv] and K [B, H, chunks, D] of each chunk alone, float32, for k [B, S, H, D] and
    v [B, S, H, Dv] of one dtype, gate [B, S, H] contiguous float32, cos and sin [S, D] (or [S, D/2], one a pair)."""
    return weighted_sums(k, v, gate, None, cos, sin, length, listed, phi, psi)


@triton.jit(do_not_specialize=LENGTHS)
def _outputs(
    q, gate, cos, sin, table, kv, k_sum, out, q_batch: tl.int64, q_token: tl.int64, q_head: tl.int64,
    tokens: tl.int64, length: tl.int64, piece: tl.int64, pieces: tl.int64, chunks: tl.int64, heads, eps,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PHI: tl.constexpr, PSI: tl.constexpr, NORMALIZE: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Outputs of a piece, from its chunk's kv and k_sum. The product is made transposed, KVᵀ by the queries' columns:
    so the state is what a warp has its rows of, in registers, for all tokens that pass."""
    b, h, _, chunk, begin, end = program(table, tokens, length, piece, pieces, heads)
    d, c = tl.arange(0, BLOCK_D), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    place = (b * heads + h) * chunks + chunk
    where = kv + place * (DIM * V_DIM) + d[:, None] * V_DIM + c[None, :]
    state = tl.trans(tl.load(where, mask=(d[:, None] < DIM) & (c[None, :] < V_DIM), other=0.0))
    if NORMALIZE:
        keys = tl.load(k_sum + place * DIM + d, mask=d < DIM, other=0.0)
    q += b * q_batch + h * q_head
    out += (b * tokens * heads + h) * V_DIM
    for i in range(((end - begin + BLOCK_T - 1) // BLOCK_T).to(tl.int32)):
        t = begin + i * BLOCK_T + tl.arange(0, BLOCK_T)
        rows = t < end
        inside = rows[:, None] & (d[None, :] < DIM)
        x = tile(q, t, rows, d, q_token, DIM).to(tl.float32)
        psi = mapped(x, inside, PSI)
        if cos is not None:
            psi = rotated(psi, angles(cos, t, rows, DIM, BLOCK_D), angles(sin, t, rows, DIM, BLOCK_D))
        if PARTS == 1:
            psi = psi.to(q.dtype.element_ty)
        columns = product(state, tl.trans(psi), tl.zeros([BLOCK_V, BLOCK_T], tl.float32), q.dtype.element_ty, 2)
        if NORMALIZE:
            columns /= (tl.sum(mapped(x, inside, PHI) * keys[None, :], 1) + eps)[None, :]
        if gate is not None:
            columns *= tl.load(gate + (b * tokens + t) * heads + h, mask=rows, other=0.0)[None, :]
        at = out + t[:, None] * (heads * V_DIM) + c[None, :]
        tl.store(at, tl.trans(columns).to(out.dtype.element_ty), mask=rows[:, None] & (c[None, :] < V_DIM))


def gated_outputs(
    q: Tensor,
    gate: Tensor | None,
    kv: Tensor,
    k_sum: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    length: int,
    listed: list[int],
    phi: int,
    psi: int,
    eps: float,
) -> Tensor:
    """gate · (R ψ(q))ᵀ KV [B, S, H, Dv], divided by φ(q)ᵀ K + eps if ``k_sum`` is given."""
    batch, tokens, heads, dim = q.shape
    v_dim = kv.shape[4]
    out = q.new_empty(batch, tokens, heads, v_dim)
    if out.numel():
        chunks, t = chunks_of(q, length, listed), tiles_of(q, v_dim)
        _outputs[(batch * heads * chunks.pieces, triton.cdiv(v_dim, t.v_dim))](
            q, gate, halved(cos, dim), halved(sin, dim), chunks.table, kv, k_sum, out, *q.stride()[:3],
            tokens, chunks.length, chunks.piece, chunks.pieces, chunks.count, heads, eps,
            DIM=dim, V_DIM=v_dim, PHI=phi, PSI=psi, NORMALIZE=k_sum is not None, PARTS=parts_of(q, psi, cos),
            BLOCK_T=t.tokens, BLOCK_D=t.dim, BLOCK_V=t.v_dim, num_warps=t.warps, num_stages=t.stages,
        )  # fmt: skip
    return out


def block_linear_outputs(
    q: Tensor,
    kv: Tensor,
    k_sum: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    length: int,
    listed: list[int],
    phi: int,
    psi: int,
    normalize: bool,
    eps: float,
) -> Tensor:
    """out [B, S, H, Dv] contiguous in q's dtype, from what each chunk sees: kv [B, H, chunks, D, Dv] and k_sum
    [B, H, chunks, D], contiguous float32; the rest as for the sums."""
    return gated_outputs(q, None, kv, k_sum if normalize else None, cos, sin, length, listed, phi, psi, eps)
