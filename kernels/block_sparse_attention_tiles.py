"""What the kernels of block_sparse_attention share: tile sizes, rows of a head, and bits of a partial block."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Never specialised: not for being 1, not for what divides them. Strides are, so that loads are wide.
LENGTHS = ["q_len", "k_len", "blocks", "mask_batch", "mask_head", "width", "full_width", "heads", "scale"]
LOG2_E = tl.constexpr(1.4426950408889634)


class Tile(NamedTuple):
    """Queries and keys that a program holds at once, its warps, and the stages of its loop: loads under way + 1."""

    m: int
    n: int
    warps: int
    stages: int


# By what is computed, architecture (see below) and the largest head dim served, for inputs of 16 bits. Dims that aren't
# powers of two are masked, which takes registers.
_HALF: dict[str, dict[int, dict[int, Tile]]] = {
    "forward": {
        80: {64: Tile(128, 64, 4, 3), 127: Tile(128, 32, 8, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 32, 8, 2)},
        86: {64: Tile(128, 64, 4, 3), 128: Tile(128, 32, 8, 3), 256: Tile(64, 32, 8, 2)},
        90: {64: Tile(128, 128, 8, 3), 127: Tile(128, 64, 8, 3), 128: Tile(128, 128, 8, 2), 256: Tile(128, 32, 8, 2)},
        100: {64: Tile(128, 128, 8, 3), 128: Tile(128, 128, 8, 2), 256: Tile(128, 32, 8, 2)},
        0: {64: Tile(128, 64, 4, 2), 128: Tile(128, 64, 4, 2), 256: Tile(64, 32, 4, 1)},
    },
    "dq": {
        80: {64: Tile(128, 64, 8, 3), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2)},
        86: {64: Tile(128, 64, 8, 2), 128: Tile(64, 32, 4, 2), 256: Tile(32, 32, 4, 1)},
        90: {64: Tile(128, 64, 8, 3), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
        100: {64: Tile(128, 64, 8, 3), 127: Tile(64, 64, 8, 2), 128: Tile(128, 32, 8, 2), 256: Tile(64, 32, 8, 2)},
        0: {64: Tile(64, 64, 4, 1), 128: Tile(64, 32, 4, 1), 256: Tile(32, 32, 4, 1)},
    },
    "dkv": {
        80: {64: Tile(64, 128, 8, 3), 128: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 2)},
        86: {64: Tile(64, 64, 4, 2), 128: Tile(32, 64, 4, 2), 256: Tile(32, 32, 4, 1)},
        90: {64: Tile(64, 128, 8, 3), 128: Tile(32, 128, 8, 2), 256: Tile(16, 64, 8, 2)},
        100: {32: Tile(64, 128, 8, 3), 64: Tile(32, 128, 8, 3), 128: Tile(32, 128, 8, 2), 256: Tile(32, 64, 8, 2)},
        0: {64: Tile(64, 64, 4, 1), 128: Tile(32, 64, 4, 1), 256: Tile(32, 32, 4, 1)},
    },
}
# float32 is multiplied without tensor cores: what counts is that tiles fit registers and shared memory.
_SINGLE = {
    "forward": {64: Tile(64, 32, 8, 2), 127: Tile(32, 16, 8, 1), 128: Tile(32, 16, 8, 2), 256: Tile(32, 16, 8, 2)},
    "dq": {64: Tile(64, 32, 8, 2), 128: Tile(32, 32, 8, 2), 256: Tile(32, 16, 8, 1)},
    "dkv": {64: Tile(32, 64, 8, 2), 128: Tile(32, 32, 8, 2), 256: Tile(16, 32, 8, 1)},
}


def architecture(x: Tensor) -> int:
    """The row of the table that serves ``x``'s device: 80, 86 (sm_86, sm_89), 90, 100 (and later), or 0 for AMD."""
    if torch.version.hip is not None:
        return 0
    if x.device.type != "cuda":
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    if major == 12:
        return 86  # like sm_86: mma.sync, and 99 KiB of shared memory
    return {8: 86 if minor else 80, 9: 90}.get(major, 100 if major > 9 else 80)


def fit(block: int, most: int, least: int = 16) -> int:
    """Tokens of a tile, a power of two, for mask blocks of ``block`` tokens: what pads the block least, from ``most``
    down to 64 or to the block's own size, since smaller tiles lose more than padding costs."""
    sizes = [most]
    while sizes[-1] // 2 >= min(64, triton.next_power_of_2(block), most) and sizes[-1] > least:
        sizes.append(sizes[-1] // 2)
    return min(sizes, key=lambda size: (-(-block // size) * size, -size))


def _keys(arch: int, m: int, n: int, bq: int, bk: int) -> int:
    """Keys of a forward's tile m x n for more than 64 dims: fewer where it isn't a whole block, since where it begins
    and ends takes registers; as few as it takes not to spill."""
    if arch == 100 and (m, n) != (bq, bk):
        return min(n, 64)
    if arch == 90 and m < 64 and (bq % m or bk % n):
        return min(n, 32)
    return n


def positive(q: Tensor, scale: float) -> tuple[Tensor, float, int]:
    """(q', scale', sign) with scale' > 0, the same scores, and q' = sign · q: the largest product is then the largest
    score. A scale that isn't positive is rare, and costs a pass over q here instead of registers in the kernels."""
    sign = (scale > 0) - (scale < 0)
    return (q, scale, 1) if sign > 0 else (q * sign, abs(scale) or 1.0, sign)


def precision(q: Tensor) -> str:
    """How products are made: float32 as "tf32" where torch's own are (``torch.set_float32_matmul_precision``), else and
    elsewhere in full ("ieee")."""
    single = q.dtype == torch.float32 and torch.version.hip is None
    return "tf32" if single and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def tile_options(kind: str, q: Tensor, v: Tensor, bq: int, bk: int) -> dict[str, Any]:
    """Constants and options of a kernel ("forward", "dq" or "dkv") for these tensors and mask blocks."""
    dims = [max(16, triton.next_power_of_2(x.shape[-1])) for x in (q, v)]
    table = _SINGLE[kind] if q.dtype == torch.float32 else _HALF[kind][architecture(q)]
    tile = next(tile for most, tile in table.items() if max(q.shape[-1], v.shape[-1]) <= most)
    m, n = fit(bq, tile.m), fit(bk, tile.n)
    warps = max(min(4, tile.warps), tile.warps * m * n // (tile.m * tile.n))
    if kind == "forward" and q.dtype != torch.float32 and max(dims) > 64:
        n = _keys(architecture(q), m, n, bq, bk)
    return {
        "DIM": q.shape[-1], "V_DIM": v.shape[-1], "BLOCK_D": dims[0], "BLOCK_V": dims[1],
        "BQ": bq, "BK": bk, "BLOCK_M": m, "BLOCK_N": n, "PRECISION": precision(q),
        "num_warps": warps, "num_stages": tile.stages,
    }  # fmt: skip


@triton.jit
def rows(p, n, d, token, limit, BOUND: tl.constexpr, DIM: tl.constexpr):
    """Rows ``n`` of the head at ``p``, [n, d]; 0 beyond ``limit`` rows, which BOUND says to look at, and beyond DIM."""
    at = p + n[:, None] * token + d[None, :]
    if BOUND:
        x = tl.load(at, mask=(n[:, None] < limit) & (d[None, :] < DIM), other=0.0)
    elif d.shape[0] == DIM:
        x = tl.load(at)
    else:
        x = tl.load(at, mask=d[None, :] < DIM, other=0.0)
    return x


@triton.jit
def kept(bits, tile, row, column, start, BQ: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr):
    """Which pairs a partial block attends, of rows ``row`` of its tile of bits and columns ``start + column``, where
    ``column`` counts to BLOCK; one is [x, 1] and the other [1, y]. A row's bits are read 32 at a time where they are
    aligned to that, and as bytes elsewhere; beyond the tile they are 0."""
    WIDTH: tl.constexpr = (BK + 7) // 8
    at = bits + (tile.to(tl.int64) * BQ + row) * WIDTH + start // 8
    left = WIDTH - start // 8
    words = tl.zeros_like(row)
    for j in tl.static_range((BLOCK + 31) // 32):
        if BK % 32 == 0 and BLOCK % 32 == 0:
            word = tl.load(at.to(tl.pointer_type(tl.int32)) + j, mask=(row < BQ) & (4 * j < left), other=0)
        else:
            word = tl.zeros_like(row)
            for i in tl.static_range(4):
                if 32 * j + 8 * i < BLOCK:
                    byte = tl.load(at + (4 * j + i), mask=(row < BQ) & (4 * j + i < left), other=0)
                    word |= byte.to(tl.int32) << (8 * i)
        words = word if j == 0 else tl.where(column // 32 == j, word, words)
    return words & (1 << (column % 32)) != 0


@triton.jit
def times(weights, x, total, PRECISION: tl.constexpr, EXACT: tl.constexpr):
    """total + weights · x; if EXACT, a weight of 0 takes nothing of an x that isn't finite."""
    w = weights.to(x.dtype)
    if EXACT:
        finite = tl.abs(x.to(tl.float32)) < float("inf")
        total = tl.dot(w, tl.where(finite, x, 0.0).to(x.dtype), total, input_precision=PRECISION)
        used = (weights != 0).to(x.dtype)
        up, down = ~finite & ~(x < 0), ~finite & ~(x > 0)  # NaN is in both, and their sum is NaN
        zero = tl.zeros_like(total)
        up = tl.dot(used, up.to(x.dtype), zero, input_precision=PRECISION)
        down = tl.dot(used, down.to(x.dtype), zero, input_precision=PRECISION)
        total += tl.where(up > 0, float("inf"), 0.0) + tl.where(down > 0, float("-inf"), 0.0)
    else:
        total = tl.dot(w, x, total, input_precision=PRECISION)
    return total


@triton.jit
def finite(x, EXACT: tl.constexpr):
    """x, if EXACT with 0 for what isn't finite."""
    if EXACT:
        x = tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0).to(x.dtype)
    return x


@triton.jit
def any_infinite(x):
    """1 if an element of x [m, n] is infinite or NaN, else 0."""
    return tl.max(tl.where(tl.abs(x) < float("inf"), 0, 1))
