"""Tokens in a row attend a window along it: causal and sliding-window attention, without a video."""

from __future__ import annotations

import math

import torch

from hhattn.masks import _bits, _blocks
from hhattn.masks.block_mask import BlockMask, assemble, make_shape


def band(
    q_len: int,
    k_len: int | None = None,
    *,
    left: int | None = None,
    right: int | None = None,
    block_size: tuple[int, int] = (64, 64),
) -> BlockMask:
    """Query i attends the keys ``i + s - left ... i + s + right``, with ``s = k_len - q_len``: the last query stands at
    the last key, as in flash-attn and as a cache of past keys needs it. Without ``left`` or ``right`` that side has no
    limit.

    ::

        causal: right=0      window: left=1, right=1
          # . . .              # # . .
          # # . .              # # # .
          # # # .              . # # #
          # # # #              . . # #

    Args:
        q_len, k_len: tokens; k_len defaults to q_len.
        left, right: keys before and after the query's own, 0 or more.
        block_size: as in :mod:`hhattn.masks`. Every diagonal of blocks has one tile of bits.

    Raises ValueError for lengths or block sizes below 1, or a negative ``left`` or ``right``.
    """
    for name, side in (("left", left), ("right", right)):
        if side is not None and side < 0:
            raise ValueError(f"{name}={side}: accepted is 0 or more, or None for no limit")
    shape = make_shape(q_len, q_len if k_len is None else k_len, block_size)
    left = shape.q_len + shape.k_len if left is None else left
    right = shape.q_len + shape.k_len if right is None else right
    # what a block attends depends on how far its first key is from its first query alone, a multiple of the step
    step = math.gcd(shape.bq, shape.bk)
    rows, columns = (torch.arange(n, dtype=torch.int32) for n in (shape.nq, shape.nk))
    distance = columns * shape.bk - (rows * shape.bq)[:, None]
    distance -= shape.k_len - shape.q_len
    lowest = int(distance[-1, 0])
    diagonal = (distance - lowest) // step
    apart = torch.arange(int(diagonal[0, -1]) + 1) * step + lowest
    inside = torch.arange(shape.bk) - torch.arange(shape.bq)[:, None]
    table = torch.cat(
        [_bits.pack((d := part[:, None, None] + inside).ge(-left) & d.le(right)) for part in apart.split(1024)]
    )
    kind, edges = shape.edge(torch.device("cpu"))
    bits = _bits.popcount(table)
    full = (bits == shape.bq * shape.bk)[diagonal] & (kind == 0)
    partial = ((bits > 0)[diagonal] & ~full).view(-1).nonzero().squeeze(1)
    pairs = _blocks.Pairs(full, partial, diagonal.view(-1)[partial], kind.view(-1)[partial])
    slices, tiles = _blocks.settle([pairs], table, edges, torch.bitwise_and, shape)
    return assemble(slices, tiles, 1, shape, "raster")
