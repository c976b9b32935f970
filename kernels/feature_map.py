"""What linear attention's Triton kernels do to a tile: feature maps, rotations by rotary tables, and products of
float32 that keep their accuracy on tensor cores.

A map is a number, as the operators take it: 0 relu, 1 identity, 2 elu + 1, 3 squared relu, 4 softmax over the row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

AMD = tl.constexpr(torch.version.hip is not None)


@triton.jit
def mapped(x, inside, MAP: tl.constexpr):
    """The map of the rows of ``x`` [T, D] float32; 0 outside, where x is 0."""
    if MAP == 1:
        y = x
    elif MAP == 2:
        y = tl.where(inside, tl.where(x > 0, x + 1.0, tl.exp(tl.minimum(x, 0.0))), 0.0)
    elif MAP == 4:
        e = tl.exp(x - tl.max(tl.where(inside, x, float("-inf")), 1, keep_dims=True))
        e = tl.where(inside, e, 0.0)
        y = e / tl.maximum(tl.sum(e, 1, keep_dims=True), 1.0)  # the sum is less in rows outside only
    else:
        y = tl.where(x <= 0, 0.0, x)  # a NaN stays one
        if MAP == 3:
            y = y * y
    return y


@triton.jit
def map_gradient(x, inside, g, MAP: tl.constexpr):
    """The gradient in x, for ``g``, that in the mapped rows."""
    if MAP == 1:
        dx = g
    elif MAP == 2:
        dx = tl.where(x > 0, g, g * tl.exp(tl.minimum(x, 0.0)))
    elif MAP == 4:
        p = mapped(x, inside, MAP)
        dx = p * (g - tl.sum(p * g, 1, keep_dims=True))
    elif MAP == 3:
        dx = g * (2.0 * tl.where(x <= 0, 0.0, x))
    else:
        dx = tl.where(x > 0, g, 0.0)
    return dx


@triton.jit
def angles(p, t, rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Tokens ``t`` of a table [S, D/2] of cosines or sines, one a pair: [T, BLOCK_D/2]."""
    i = tl.arange(0, BLOCK_D // 2)[None, :]
    return tl.load(p + t[:, None] * (DIM // 2) + i, mask=rows[:, None] & (i < DIM // 2), other=0.0).to(tl.float32)


@triton.jit
def rotated(x, cos, sin):
    """The pairs (x_0, x_1), (x_2, x_3), … of the rows, turned by their angles. A thread holds whole pairs, so nothing
    moves between threads."""
    a, b = tl.split(tl.reshape(x, [x.shape[0], x.shape[1] // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), x.shape)


@triton.jit
def tf32(x):
    """Rounded to the 10 bits of mantissa that tensor cores take of a float32. A NaN stays one: a GPU's own, 0x7fffffff,
    would be rounded to -0."""
    x = x.to(tl.float32)
    rounded = ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)


@triton.jit
def product(a, b, total, like: tl.constexpr, parts: tl.constexpr):
    """total + a b, ``a`` float32, on tensor cores, for inputs of the dtype ``like``.

    One of ``parts`` will do where a has like's bits anyway. Else 2 or 3 of bfloat16 hold 16 or all 24 bits of it, and 2
    of TF32, for other inputs, 22. ``b`` has like's bits, or is float32 and goes in as two parts. Parts of float16 are
    TF32: sums of many tokens, and what is divided by such a sum, leave float16's range. float32 in three products of
    TF32 is as good as in its own but for an ulp or two, and there are no tensor cores for it. AMD has such, and no
    TF32.
    """
    if parts == 1:
        total = tl.dot(a.to(like), b.to(like), total)
    elif like == tl.bfloat16:
        high, b_high = a.to(like), b.to(like)
        if b.dtype == tl.float32:
            total = tl.dot(high, (b - b_high.to(tl.float32)).to(like), total)
        b = b_high
        total = tl.dot(high, b, total)
        rest = a - high.to(tl.float32)
        low = rest.to(like)
        total = tl.dot(low, b, total)
        if parts == 3:
            total = tl.dot((rest - low.to(tl.float32)).to(like), b, total)
    elif AMD:
        total = tl.dot(a, b.to(tl.float32), total, input_precision="ieee")
    else:
        high, b_high = tf32(a), tf32(b)
        if b.dtype == tl.float32:
            total = tl.dot(high, tf32(b - b_high), total, input_precision="tf32")
        total = tl.dot(tf32(a - high), b_high, total, input_precision="tf32")
        total = tl.dot(high, b_high, total, input_precision="tf32")
    return total
