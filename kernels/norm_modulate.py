"""Triton kernels of norm_modulate: a program holds whole rows in registers and reads and writes each once.

With n = norm(r), g the gradient in y, and u = g·weight·(1 + scale):

    y  = (n·weight + bias)·(1 + scale) + shift,    r = residual + gate·x
    dr += rstd·(u - n·mean(u·n) - mean(u)),        dx = gate·dr
    dshift = Σ g,    dscale = Σ g·(n·weight + bias),    dgate = Σ dr·x    over the tokens that a row of them serves
    dweight = Σ g·n·(1 + scale),    dbias = Σ g·(1 + scale)               over all tokens

Sums are made in two steps, each in a fixed order: a program adds up the tokens of its run, one after another, and the
runs are added up afterwards. So gradients are the same bits every time, without atomics.

Numbers of tokens, rows and strides are int64 and never specialised: one compilation serves every clip.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

RUN = 64  # most tokens that a program of the backward adds up


class Modulation(NamedTuple):
    """Scale, shift or gate as kernels take it: elements from batch to batch (0 if shared) and from row to row, and the
    tokens that a row serves."""

    data: Tensor | None
    batch: int
    row: int
    each: int


def modulation(m: Tensor | None, x: Tensor) -> Modulation:
    """``m [B or 1, F, C]`` for ``x [B, S, C]``."""
    if m is None:
        return Modulation(None, 0, 0, 1)
    return Modulation(m, 0 if m.shape[0] == 1 else m.stride(0), m.stride(1), max(1, x.shape[1] // max(1, m.shape[1])))


def warps(channels: int, each: int) -> int:
    """Warps a program of ``each`` channels a thread."""
    return min(16, max(1, triton.next_power_of_2(channels) // (32 * each)))


@triton.jit
def _load(p, at, c, inside, other):
    """A row as float32, or ``other`` where there is no tensor."""
    if p is None:
        row = other
    else:
        row = tl.load(p + at + c, mask=inside, other=0.0).to(tl.float32)
    return row


@triton.jit
def _normed(r, inside, channels, eps, LAYER: tl.constexpr):
    """norm(r) and 1 / its deviation."""
    if LAYER:
        r = tl.where(inside, r - tl.sum(r, 0) / channels, 0.0)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(r * r, 0) / channels + eps)
    return r * rstd, rstd


# Lengths are never specialised: not for being 1, not for what divides them. Strides are, so that loads are wide.
_LENGTHS = ["tokens", "segment", "run", "scale_each", "shift_each", "gate_each"]


@triton.jit(do_not_specialize=_LENGTHS[:1] + _LENGTHS[3:])
def _forward(
    x, scale, shift, weight, bias, residual, gate, y, r_out,
    x_batch: tl.int64, x_token: tl.int64, residual_batch: tl.int64, residual_token: tl.int64,
    scale_batch: tl.int64, scale_row: tl.int64, scale_each: tl.int64,
    shift_batch: tl.int64, shift_row: tl.int64, shift_each: tl.int64,
    gate_batch: tl.int64, gate_row: tl.int64, gate_each: tl.int64,
    tokens: tl.int64, channels, eps,
    LAYER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64)
    b, s = index // tokens, index % tokens
    c = tl.arange(0, BLOCK)
    inside = c < channels
    r = _load(x, b * x_batch + s * x_token, c, inside, 0.0)
    if residual is not None:
        r *= _load(gate, b * gate_batch + s // gate_each * gate_row, c, inside, 1.0)
        r += _load(residual, b * residual_batch + s * residual_token, c, inside, 0.0)
        tl.store(r_out + index * channels + c, r.to(r_out.dtype.element_ty), mask=inside)
    n, _ = _normed(r, inside, channels, eps, LAYER)
    out = n * _load(weight, 0, c, inside, 1.0) + _load(bias, 0, c, inside, 0.0)
    out *= 1.0 + _load(scale, b * scale_batch + s // scale_each * scale_row, c, inside, 0.0)
    out += _load(shift, b * shift_batch + s // shift_each * shift_row, c, inside, 0.0)
    tl.store(y + index * channels + c, out.to(y.dtype.element_ty), mask=inside)


def norm_modulate(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    layer: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """y, and r (empty without a residual); shapes and meaning as in :func:`hhattn.norm_modulate`, last dims
    contiguous."""
    batch, tokens, channels = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    r = x.new_empty(0) if residual is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
    if y.numel():
        where = x if residual is None else residual
        scale, *scale_at = modulation(scale, x)
        shift, *shift_at = modulation(shift, x)
        gate, *gate_at = modulation(gate, x)
        _forward[(batch * tokens,)](
            x, scale, shift, weight, bias, residual, gate, y, r,
            x.stride(0), x.stride(1), where.stride(0), where.stride(1), *scale_at, *shift_at, *gate_at,
            tokens, channels, eps, LAYER=layer, BLOCK=triton.next_power_of_2(channels),
            num_warps=warps(channels, 32 // x.element_size()),
        )  # fmt: skip
    return y, r


@triton.jit
def _store(p, at, c, inside, value):
    if p is not None:
        tl.store(p + at + c, value.to(p.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[name for name in _LENGTHS if name != "shift_each"])
def _backward(
    dy, dr, x, scale, weight, bias, residual, gate, dx, dresidual, dscale, dshift, dgate, dweight, dbias,
    dy_batch: tl.int64, dy_token: tl.int64, dr_batch: tl.int64, dr_token: tl.int64,
    x_batch: tl.int64, x_token: tl.int64, residual_batch: tl.int64, residual_token: tl.int64,
    scale_batch: tl.int64, scale_row: tl.int64, scale_each: tl.int64,
    gate_batch: tl.int64, gate_row: tl.int64, gate_each: tl.int64,
    tokens: tl.int64, segment: tl.int64, run: tl.int64, channels, eps,
    LAYER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program adds up a run of tokens within a segment; the sums are float32 rows [B, segments, runs, C]."""
    index = tl.program_id(0).to(tl.int64)
    runs = tl.cdiv(segment, run)
    first = index // runs * segment  # of the segment, counted over the batch
    b = first // tokens
    begin = first % tokens + index % runs * run
    end = tl.minimum(begin + run, first % tokens + segment)
    c = tl.arange(0, BLOCK)
    inside = c < channels
    w, shifted = _load(weight, 0, c, inside, 1.0), _load(bias, 0, c, inside, 0.0)
    zero = tl.zeros([BLOCK], tl.float32)
    to_scale, to_shift, to_gate, to_weight, to_bias = zero, zero, zero, zero, zero
    for s in range(begin, end):
        x_row = _load(x, b * x_batch + s * x_token, c, inside, 0.0)
        opening = _load(gate, b * gate_batch + s // gate_each * gate_row, c, inside, 1.0)
        r = x_row
        if residual is not None:
            r = x_row * opening + _load(residual, b * residual_batch + s * residual_token, c, inside, 0.0)
        n, rstd = _normed(r, inside, channels, eps, LAYER)
        g = _load(dy, b * dy_batch + s * dy_token, c, inside, 0.0)
        factor = 1.0 + _load(scale, b * scale_batch + s // scale_each * scale_row, c, inside, 0.0)
        u = g * w * factor
        d = u - n * (tl.sum(u * n, 0) / channels)
        if LAYER:
            d -= tl.sum(u, 0) / channels
        d *= rstd
        at = (b * tokens + s) * channels
        if residual is not None:
            d += _load(dr, b * dr_batch + s * dr_token, c, inside, 0.0)
            _store(dresidual, at, c, inside, d)
            to_gate += d * x_row
            d *= opening
        _store(dx, at, c, inside, d)
        to_shift += g
        to_scale += g * (n * w + shifted)
        to_weight += g * n * factor
        to_bias += g * factor
    _store(dscale, index * channels, c, inside, to_scale)
    _store(dshift, index * channels, c, inside, to_shift)
    _store(dgate, index * channels, c, inside, to_gate)
    _store(dweight, index * channels, c, inside, to_weight)
    _store(dbias, index * channels, c, inside, to_bias)


def norm_modulate_backward(
    dy: Tensor,
    dr: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    layer: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    """The gradients in x, scale, shift, weight, bias, residual and gate, each empty where there is no such argument."""
    batch, tokens, channels = x.shape
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dresidual = x.new_empty(0) if residual is None else residual.new_empty(residual.shape)
    modulations = {"scale": scale, "shift": shift, "gate": gate}
    each = {name: modulation(m, x).each for name, m in modulations.items() if m is not None}
    segment = math.gcd(tokens, *each.values())  # tokens that share every row of modulation
    runs = max(1, triton.cdiv(segment, RUN))
    pieces = (batch, tokens // max(1, segment), runs, channels)
    sums = {
        name: x.new_empty(pieces, dtype=torch.float32)
        for name, t in {**modulations, "weight": weight, "bias": bias}.items()
        if t is not None
    }
    if x.numel():
        where, upstream = (x, dy) if residual is None else (residual, dy if dr is None else dr)
        scale_data, *scale_at = modulation(scale, x)
        gate_data, *gate_at = modulation(gate, x)
        _backward[(math.prod(pieces[:3]),)](
            dy, dr, x, scale_data, weight, bias, residual, gate_data, dx, None if residual is None else dresidual,
            *(sums.get(name) for name in ("scale", "shift", "gate", "weight", "bias")),
            dy.stride(0), dy.stride(1), upstream.stride(0), upstream.stride(1),
            x.stride(0), x.stride(1), where.stride(0), where.stride(1), *scale_at, *gate_at,
            tokens, segment, RUN, channels, eps,
            LAYER=layer, BLOCK=triton.next_power_of_2(channels),
            num_warps=warps(channels, 8),  # three sums or more are kept beside a row
        )  # fmt: skip

    def total(name: str, like: Tensor | None) -> Tensor:
        if like is None:
            return x.new_empty(0)
        if not x.numel():
            return torch.zeros_like(like)
        rows = sums[name]
        if like.ndim == 1:
            return rows.sum((0, 1, 2)).to(like.dtype)
        out = rows.view(batch, like.shape[1], -1, channels).sum(2)
        return (out.sum(0, keepdim=True) if like.shape[0] == 1 else out).to(like.dtype)

    affine = [total(name, t) for name, t in (("scale", scale), ("shift", shift), ("weight", weight), ("bias", bias))]
    return (dx, *affine, dresidual, total("gate", gate))
