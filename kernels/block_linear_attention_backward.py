"""Triton kernels of block_linear_attention's backward, on both sides of the prefix over chunks.

With u = dout / den and e = -(dout·out) / den, den = φ(q)ᵀ K + eps, of the outputs:

    dψ(q) = R⁻¹ KV u,    dφ(q) = e K,    dKV = Σ R ψ(q) uᵀ,    dK = Σ e φ(q)

and of the sums:

    dψ(k) = g R⁻¹ dKV v,    dφ(k) = dK,    dv = g (R ψ(k))ᵀ dKV,    dg = (R ψ(k))ᵀ dKV v

So the sums over tokens are the forward's with 1/den for a gate and e for a weight, the gradient of v is its outputs,
and one kernel more makes the gradients of q and of k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hhattn.kernels.block_linear_attention import (
    LENGTHS,
    chunks_of,
    gated_outputs,
    halved,
    program,
    tile,
    tiles_of,
    weighted_sums,
)
from hhattn.kernels.feature_map import angles, map_gradient, mapped, product, rotated


@triton.jit
def _state(p, d, c, DIM: tl.constexpr, V_DIM: tl.constexpr):
    return tl.load(p + d[:, None] * V_DIM + c[None, :], mask=(d[:, None] < DIM) & (c[None, :] < V_DIM), other=0.0)


@triton.jit(do_not_specialize=LENGTHS)
def _gradients(
    x, y, out, gate, cos, sin, table, kv, k_sum, dx, dgate, factor, weight,
    x_batch: tl.int64, x_token: tl.int64, x_head: tl.int64, y_batch: tl.int64, y_token: tl.int64, y_head: tl.int64,
    tokens: tl.int64, length: tl.int64, piece: tl.int64, pieces: tl.int64, chunks: tl.int64, heads, eps,
    DIM: tl.constexpr, V_DIM: tl.constexpr, PHI: tl.constexpr, PSI: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradient in x: k, with y = v and the gradients of its sums, or q, with y = dout and what it saw.

    For k, ``gate`` multiplies and ``dgate`` [B, S, H] is its gradient. For q, if ``out`` is given (the normalised one),
    1/den and e are left in ``factor`` and ``weight`` [B, S, H]. ``k_sum`` is None where there is no denominator.
    """
    b, h, _, chunk, begin, end = program(table, tokens, length, piece, pieces, heads)
    d, c = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    place = (b * heads + h) * chunks + chunk
    kv += place * (DIM * V_DIM)
    if V_DIM <= BLOCK_V:
        state = _state(kv, d, c, DIM, V_DIM)
    if k_sum is not None:
        keys = tl.load(k_sum + place * DIM + d, mask=d < DIM, other=0.0)[None, :]
    x += b * x_batch + h * x_head
    y += b * y_batch + h * y_head
    for i in range(((end - begin + BLOCK_T - 1) // BLOCK_T).to(tl.int32)):
        t = begin + i * BLOCK_T + tl.arange(0, BLOCK_T)
        rows = t < end
        inside = rows[:, None] & (d[None, :] < DIM)
        at = (b * tokens + t) * heads + h
        columns = tl.zeros([BLOCK_D, BLOCK_T], tl.float32)
        dot_out = tl.zeros([BLOCK_T], tl.float32)
        for v in tl.static_range(0, V_DIM, BLOCK_V):
            part = tile(y, t, rows, v + c, y_token, V_DIM)
            if V_DIM > BLOCK_V:
                state = _state(kv, d, v + c, DIM, V_DIM)
            columns = product(state, tl.trans(part), columns, x.dtype.element_ty, 2)
            if out is not None:
                o = tl.load(out + at[:, None] * V_DIM + v + c[None, :],
                            mask=rows[:, None] & (v + c[None, :] < V_DIM), other=0.0)  # fmt: skip
                dot_out += tl.sum(part.to(tl.float32) * o.to(tl.float32), 1)
        g = tl.trans(columns)
        row = tile(x, t, rows, d, x_token, DIM).to(tl.float32)
        if dgate is not None or cos is not None:
            turn_cos, turn_sin = 1.0, 0.0
        if cos is not None:
            turn_cos, turn_sin = angles(cos, t, rows, DIM, BLOCK_D), angles(sin, t, rows, DIM, BLOCK_D)
        if dgate is not None:
            psi = mapped(row, inside, PSI)
            if cos is not None:
                psi = rotated(psi, turn_cos, turn_sin)
            tl.store(dgate + at, tl.sum(psi * g, 1), mask=rows)
            g *= tl.load(gate + at, mask=rows, other=0.0)[:, None]
        if out is not None:
            den = tl.sum(mapped(row, inside, PHI) * keys, 1) + eps
            e = -dot_out / den
            tl.store(factor + at, 1.0 / den, mask=rows)
            tl.store(weight + at, e, mask=rows)
            g /= den[:, None]
            to_phi = e[:, None] * keys
        elif k_sum is not None:
            to_phi = tl.broadcast_to(keys, [BLOCK_T, BLOCK_D])
        if cos is not None:
            g = rotated(g, turn_cos, -turn_sin)
        if k_sum is None:
            to_x = map_gradient(row, inside, g, PSI)
        elif PHI == PSI:
            to_x = map_gradient(row, inside, g + to_phi, PSI)
        else:
            to_x = map_gradient(row, inside, g, PSI) + map_gradient(row, inside, to_phi, PHI)
        tl.store(dx + at[:, None] * DIM + d[None, :], to_x.to(dx.dtype.element_ty), mask=inside)


def _gradient(
    x: Tensor,
    y: Tensor,
    out: Tensor | None,
    gate: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    kv: Tensor,
    k_sum: Tensor | None,
    length: int,
    listed: list[int],
    phi: int,
    psi: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dgate, 1/den and e of :func:`_gradients`, the last three empty unless made."""
    batch, tokens, heads, dim = x.shape
    v_dim = y.shape[3]
    dx, none = x.new_empty(x.shape), x.new_empty(0, dtype=torch.float32)
    dgate = none if gate is None else torch.empty_like(gate)
    factor, weight = (none if out is None else none.new_empty(batch, tokens, heads) for _ in range(2))
    if dx.numel():
        chunks, t = chunks_of(x, length, listed), tiles_of(x, v_dim)
        _gradients[(batch * heads * chunks.pieces,)](
            x, y, out, gate, halved(cos, dim), halved(sin, dim), chunks.table, kv, k_sum, dx,
            None if gate is None else dgate, *((None, None) if out is None else (factor, weight)),
            *x.stride()[:3], *y.stride()[:3],
            tokens, chunks.length, chunks.piece, chunks.pieces, chunks.count, heads, eps,
            DIM=dim, V_DIM=v_dim, PHI=phi, PSI=psi, BLOCK_T=t.tokens, BLOCK_D=t.dim, BLOCK_V=t.v_dim,
            # a state of several tiles is read anew each time, and would be on its way as a whole
            num_warps=t.warps, num_stages=t.stages if v_dim <= t.v_dim else 1,
        )  # fmt: skip
    return dx, dgate, factor, weight


def block_linear_sums_backward(
    dkv: Tensor,
    dk_sum: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    length: int,
    listed: list[int],
    phi: int,
    psi: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in k, v and gate (empty if there is none), for those of the sums, contiguous float32."""
    how = (length, listed, phi, psi)
    dv = gated_outputs(k, gate, dkv, None, cos, sin, *how, 0.0)
    dk, dgate, *_ = _gradient(k, v, None, gate, cos, sin, dkv, dk_sum, *how, 0.0)
    return dk, dv, dgate if gate is not None else k.new_empty(0)


def block_linear_outputs_backward(
    dout: Tensor,
    q: Tensor,
    kv: Tensor,
    k_sum: Tensor,
    out: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    length: int,
    listed: list[int],
    phi: int,
    psi: int,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in q, kv and k_sum; dout [B, S, H, Dv] with its last dim contiguous, out contiguous."""
    how = (length, listed, phi, psi)
    if not normalize:
        dq, *_ = _gradient(q, dout, None, None, cos, sin, kv, None, *how, eps)
        dkv, dk_sum = weighted_sums(q, dout, None, None, cos, sin, *how)
        return dq, dkv, dk_sum.zero_()
    dq, _, factor, weight = _gradient(q, dout, out, None, cos, sin, kv, k_sum, *how, eps)
    return dq, *weighted_sums(q, dout, factor, weight, cos, sin, *how)
