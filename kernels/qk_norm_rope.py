"""Triton kernels of qk_norm_rope: a program holds heads of one token and reads and writes each once.

With n = norm(x), v = n·weight + bias, and for a pair (a, b) of dims:

    y_a = v_a·cos_a - v_b·sin_a,    y_b = v_b·cos_b + v_a·sin_b

and backwards, g being dy turned back by the angles, and u = g·weight:

    dx = rstd·(u - n·mean(u·n) - mean(u)),    dbias = Σ g,    dweight = Σ g·n
    dcos = Σ dy·v,    dsin_a = -Σ dy_a·v_b,    dsin_b = Σ dy_b·v_a    over heads, q and k, and a batch that shares them

Sums have a fixed order and no atomics: a program adds up the tokens of its run, and PyTorch the runs. Numbers of tokens
and strides are int64; the numbers are never specialised, so that one compilation serves every clip.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # most elements of a program whose heads are normed one by one
RUN = 32  # most tokens that a program of the backward adds up


@triton.jit
def _place(heads, dim, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """Heads, channels, and which of them there are. Pairs of neighbours are [HEADS, 2·PAIRS] in memory, where a thread
    moves many at once, and [HEADS, PAIRS, 2] only in registers; of two halves each is a run of its own anyway."""
    if INTERLEAVED:
        h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None]
        c = tl.arange(0, 2 * PAIRS)[None, :]
        inside = (h < heads) & (c < dim)
    else:
        h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[:, None, None]
        i = tl.arange(0, PAIRS)[None, :, None]
        c = i + tl.arange(0, 2)[None, None, :] * (dim // 2)
        inside = (h < heads) & (i < dim // 2) & (c < dim)
    return h, c, inside


@triton.jit
def _read(p, at, h, c, inside, head, other, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """Elements as float32 [HEADS, PAIRS, 2], or ``other`` where there is no tensor."""
    if p is None:
        row = other
    else:
        row = tl.load(p + at + h * head + c, mask=inside, other=other).to(tl.float32)
        row = tl.reshape(row, [HEADS, PAIRS, 2])
    return row


@triton.jit
def _write(p, at, h, c, inside, head, value):
    """The opposite, rounded to the tensor's dtype."""
    if p is not None:
        tl.store(p + at + h * head + c, tl.reshape(value, inside.shape).to(p.dtype.element_ty), mask=inside)


@triton.jit
def _total(x, ACROSS: tl.constexpr):
    """The sum over what shares a norm."""
    heads = tl.sum(tl.sum(x, 2), 1)
    if ACROSS:
        total = tl.sum(heads, 0)
    else:
        total = heads[:, None, None]
    return total


@triton.jit
def _normed(x, inside, count, eps, NORM: tl.constexpr, ACROSS: tl.constexpr):
    """norm(x) and 1 / its deviation; NORM is 0 (none), 1 (rms) or 2 (layer)."""
    if NORM == 0:
        rstd = 1.0
    else:
        if NORM == 2:
            x = tl.where(inside, x - _total(x, ACROSS) / count, 0.0)
        rstd = 1.0 / tl.sqrt_rn(_total(x * x, ACROSS) / count + eps)
    return x * rstd, rstd


@triton.jit
def _angles(
    p, at, heads, dim, head, rotates, other,
    BY_HEAD: tl.constexpr, INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """cos or sin of a token, ``other`` if it isn't rotated; one row for all heads unless BY_HEAD."""
    if BY_HEAD:
        h, c, inside = _place(heads, dim, INTERLEAVED, HEADS, PAIRS)
        row = _read(p, at, h, c, inside & rotates, head, other, HEADS, PAIRS)
    else:
        h, c, inside = _place(heads, dim, INTERLEAVED, 1, PAIRS)
        row = _read(p, at, h, c, inside & rotates, head, other, 1, PAIRS)
    return tl.split(row)


@triton.jit(do_not_specialize=["tokens", "start", "video"])
def _forward(
    x, y, cos, sin, weight, bias, order,
    x_batch: tl.int64, x_token: tl.int64, x_head: tl.int64,
    cos_batch: tl.int64, cos_token: tl.int64, cos_head: tl.int64,
    sin_batch: tl.int64, sin_token: tl.int64, sin_head: tl.int64,
    weight_head: tl.int64, tokens: tl.int64, start: tl.int64, video: tl.int64, heads, dim, eps,
    NORM: tl.constexpr, ACROSS: tl.constexpr, INTERLEAVED: tl.constexpr, BY_HEAD: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    b, s = index // tokens, index % tokens
    if order is not None:
        s = tl.load(order + s)
    h, c, inside = _place(heads, dim, INTERLEAVED, HEADS, PAIRS)
    there = tl.reshape(inside, [HEADS, PAIRS, 2])
    v = _read(x, b * x_batch + s * x_token, h, c, inside, x_head, 0.0, HEADS, PAIRS)
    v, _ = _normed(v, there, heads * dim if ACROSS else dim, eps, NORM, ACROSS)
    v = v * _read(weight, 0, h, c, inside, weight_head, 1.0, HEADS, PAIRS)
    v = v + _read(bias, 0, h, c, inside, weight_head, 0.0, HEADS, PAIRS)
    if cos is not None:
        at = s - start
        rotates = (at >= 0) & (at < video)
        first, second = tl.split(v)
        cos_at, sin_at = b * cos_batch + at * cos_token, b * sin_batch + at * sin_token
        cos_a, cos_b = _angles(cos, cos_at, heads, dim, cos_head, rotates, 1.0, BY_HEAD, INTERLEAVED, HEADS, PAIRS)
        sin_a, sin_b = _angles(sin, sin_at, heads, dim, sin_head, rotates, 0.0, BY_HEAD, INTERLEAVED, HEADS, PAIRS)
        v = tl.join(first * cos_a - second * sin_a, second * cos_b + first * sin_b)
    _write(y, index * heads * dim, h, c, inside, dim, v)


def _shape(x: Tensor, across: bool, rotates: bool, interleaved: bool) -> dict[str, Any]:
    """Compile-time choices, and the number of programs for the heads."""
    heads, dim = x.shape[2:]
    pairs = triton.next_power_of_2((dim + 1) // 2)
    every = triton.next_power_of_2(heads)
    block = every if across else min(every, max(1, TILE // (2 * pairs)))
    how = {"ACROSS": across, "INTERLEAVED": interleaved or not rotates, "HEADS": block, "PAIRS": pairs}
    return {"how": how, "groups": triton.cdiv(heads, block)}


def _table(t: Tensor | None) -> tuple[int, int, int]:
    """Strides of cos or sin [1 or B, S_video, 1 or H, D]: batch, token, head; 0 where it is shared."""
    if t is None:
        return 0, 0, 0
    return 0 if t.shape[0] == 1 else t.stride(0), t.stride(1), 0 if t.shape[2] == 1 else t.stride(2)


def _warps(how: dict[str, Any], most: int) -> int:
    """8 elements a thread; a block has 1,024 threads at most, of which AMD's warps have 64."""
    lanes = 32 if torch.version.hip is None else 64
    return min(most, 1024 // lanes, max(1, how["HEADS"] * how["PAIRS"] // (4 * lanes)))


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    norm: int,
    across_heads: bool,
    interleaved: bool,
    eps: float,
    start: int,
    order: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """q and k, normed, rotated and in order; arguments as the native operator takes them, last dims contiguous."""

    def one(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        if not y.numel():
            return y
        batch, tokens, heads, dim = x.shape
        shape = _shape(x, across_heads, cos is not None, interleaved)
        _forward[(batch * tokens, shape["groups"])](
            x, y, cos, sin, weight, bias, order, *x.stride()[:3], *_table(cos), *_table(sin),
            dim if across_heads else 0, tokens, start, 0 if cos is None else cos.shape[1], heads, dim, eps,
            NORM=norm, BY_HEAD=cos is not None and cos.shape[2] != 1, **shape["how"],
            num_warps=_warps(shape["how"], 32),
        )  # fmt: skip
        return y

    return one(q, q_weight, q_bias), one(k, k_weight, k_bias)


@triton.jit(do_not_specialize=["tokens", "run", "start", "video"])
def _backward(
    dy, x, dx, cos, sin, weight, bias, order, dcos, dsin, dweight, dbias,
    dy_batch: tl.int64, dy_token: tl.int64, dy_head: tl.int64, x_batch: tl.int64, x_token: tl.int64, x_head: tl.int64,
    cos_batch: tl.int64, cos_token: tl.int64, cos_head: tl.int64,
    sin_batch: tl.int64, sin_token: tl.int64, sin_head: tl.int64,
    weight_head: tl.int64, tokens: tl.int64, run: tl.int64, start: tl.int64, video: tl.int64, heads, dim, eps,
    NORM: tl.constexpr, ACROSS: tl.constexpr, INTERLEAVED: tl.constexpr, BY_HEAD: tl.constexpr,
    HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """A run of tokens, as they were written. dcos and dsin are float32 [groups, B, S, H or 1, D], dweight and dbias
    float32 [B·runs, H, D]."""
    index, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    runs = tl.cdiv(tokens, run)
    b, begin = index // runs, index % runs * run
    h, c, inside = _place(heads, dim, INTERLEAVED, HEADS, PAIRS)
    there = tl.reshape(inside, [HEADS, PAIRS, 2])
    w = _read(weight, 0, h, c, inside, weight_head, 1.0, HEADS, PAIRS)
    shifted = _read(bias, 0, h, c, inside, weight_head, 0.0, HEADS, PAIRS)
    to_weight = tl.zeros([HEADS, PAIRS, 2], tl.float32)
    to_bias = tl.zeros([HEADS, PAIRS, 2], tl.float32)
    for out in range(begin, tl.minimum(begin + run, tokens)):
        s = out
        if order is not None:
            s = tl.load(order + out)
        row = _read(x, b * x_batch + s * x_token, h, c, inside, x_head, 0.0, HEADS, PAIRS)
        g = _read(dy, b * dy_batch + out * dy_token, h, c, inside, dy_head, 0.0, HEADS, PAIRS)
        n, rstd = _normed(row, there, heads * dim if ACROSS else dim, eps, NORM, ACROSS)
        if cos is not None:
            at = s - start
            rotates = (at >= 0) & (at < video)
            cos_at, sin_at = b * cos_batch + at * cos_token, b * sin_batch + at * sin_token
            cos_a, cos_b = _angles(cos, cos_at, heads, dim, cos_head, rotates, 1.0, BY_HEAD, INTERLEAVED, HEADS, PAIRS)
            sin_a, sin_b = _angles(sin, sin_at, heads, dim, sin_head, rotates, 0.0, BY_HEAD, INTERLEAVED, HEADS, PAIRS)
            g_a, g_b = tl.split(g)
            if dcos is not None:
                v = n * w + shifted
                v_a, v_b = tl.split(v)
                to_cos, to_sin = g * v, tl.join(-g_a * v_b, g_b * v_a)
                if BY_HEAD:
                    row_at = (b * tokens + s) * heads * dim
                    _write(dcos, row_at, h, c, inside, dim, to_cos)
                    _write(dsin, row_at, h, c, inside, dim, to_sin)
                else:
                    row_at = ((group * (tl.num_programs(0) // runs) + b) * tokens + s) * dim
                    h_one, c_one, in_one = _place(heads, dim, INTERLEAVED, 1, PAIRS)
                    _write(dcos, row_at, h_one, c_one, in_one, 0, tl.sum(to_cos, 0))
                    _write(dsin, row_at, h_one, c_one, in_one, 0, tl.sum(to_sin, 0))
            g = tl.join(g_a * cos_a + g_b * sin_b, g_b * cos_b - g_a * sin_a)
        u = g * w
        if NORM == 0:
            d = u
        else:
            count = heads * dim if ACROSS else dim
            d = u - n * (_total(u * n, ACROSS) / count)
            if NORM == 2:
                d -= _total(u, ACROSS) / count
            d *= rstd
        _write(dx, (b * tokens + s) * heads * dim, h, c, inside, dim, d)
        to_bias += g
        to_weight += g * n
    _write(dweight, index * heads * dim, h, c, inside, dim, to_weight)
    _write(dbias, index * heads * dim, h, c, inside, dim, to_bias)


def qk_norm_rope_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    norm: int,
    across_heads: bool,
    interleaved: bool,
    eps: float,
    start: int,
    order: Tensor | None,
    tables: bool,
) -> tuple[Tensor, ...]:
    """The gradients in q, k, cos, sin, q_weight, k_weight, q_bias and k_bias, each empty where there is no such
    argument, and in cos and sin unless ``tables``."""
    by_head = cos is not None and cos.shape[2] != 1

    def one(dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, ...]:
        batch, tokens, heads, dim = x.shape
        dx = torch.empty_like(x, memory_format=torch.contiguous_format)
        shape = _shape(x, across_heads, cos is not None, interleaved)
        runs = triton.cdiv(tokens, RUN)
        sums = [
            None if t is None else x.new_empty(batch * runs, heads, dim, dtype=torch.float32) for t in (weight, bias)
        ]
        turned: list[Tensor | None] = [None, None]
        if tables and cos is not None:
            angles = (1, batch, tokens, heads, dim) if by_head else (shape["groups"], batch, tokens, 1, dim)
            turned = [x.new_empty(angles, dtype=torch.float32) for _ in range(2)]
        if dx.numel():
            _backward[(batch * runs, shape["groups"])](
                dy, x, dx, cos, sin, weight, bias, order, *turned, *sums,
                *dy.stride()[:3], *x.stride()[:3], *_table(cos), *_table(sin),
                dim if across_heads else 0, tokens, RUN, start, 0 if cos is None else cos.shape[1], heads, dim, eps,
                NORM=norm, BY_HEAD=by_head, **shape["how"], num_warps=_warps(shape["how"], 16),
            )  # fmt: skip
        over = 0 if across_heads else (0, 1)
        affine = (
            x.new_empty(0) if t is None or got is None else got.sum(over).view_as(t).to(t.dtype)
            for t, got in zip((weight, bias), sums, strict=True)
        )
        return dx, *turned, *affine

    dq, *q_turned, dq_weight, dq_bias = one(grad_q, q, q_weight, q_bias)
    dk, *k_turned, dk_weight, dk_bias = one(grad_k, k, k_weight, k_bias)

    def table(like: Tensor | None, ours: Tensor | None, theirs: Tensor | None) -> Tensor:
        if like is None or ours is None or theirs is None:
            return q.new_empty(0)
        out = (ours.sum(0) + theirs.sum(0))[:, start : start + like.shape[1]]
        return (out.sum(0, keepdim=True) if like.shape[0] == 1 else out).to(like.dtype)

    turned = (table(t, *pair) for t, pair in zip((cos, sin), zip(q_turned, k_turned, strict=True), strict=True))
    return (dq, dk, *turned, dq_weight, dk_weight, dq_bias, dk_bias)
