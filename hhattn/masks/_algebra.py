"""``&``, ``|`` and ``~`` of masks, block by block: only blocks that are partial in both operands look at their bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hhattn.masks._blocks import Blocks, Pairs, Shape


def _common(a: Blocks, b: Blocks) -> tuple[Tensor, Tensor]:
    """For every partial block of ``a``: whether it is partial in ``b`` too, and its place among those of ``b``."""
    if not len(b.partial):
        return torch.zeros_like(a.partial, dtype=torch.bool), torch.zeros_like(a.partial)
    place = torch.searchsorted(b.partial, a.partial).clamp(max=len(b.partial) - 1)
    return b.partial[place] == a.partial, place


def _join(full: Tensor, a: Blocks, b: Blocks, keep_a: Tensor, keep_b: Tensor) -> Pairs:
    """Partial blocks of ``a`` and ``b`` that are kept as they are (a tile paired with itself), and those in both,
    paired. The tiles of ``a`` and ``b`` are numbered in one table."""
    both, place = _common(a, b)
    parts = (
        (a.partial[keep_a], a.tile[keep_a], a.tile[keep_a]),
        (b.partial[keep_b], b.tile[keep_b], b.tile[keep_b]),
        (a.partial[both], a.tile[both], b.tile[place[both]]),
    )
    key, left, right = (torch.cat(column) for column in zip(*parts, strict=True))
    return Pairs(full, key, left, right)


def intersection(a: Blocks, b: Blocks) -> Pairs:
    """Blocks of ``a & b``: a partial block lives on where the other mask has a full one, or is met bit by bit."""
    return _join(a.full & b.full, a, b, b.full.view(-1)[a.partial], a.full.view(-1)[b.partial])


def union(a: Blocks, b: Blocks) -> Pairs:
    """Blocks of ``a | b``: full wins; a partial block alone stays as it is; two are joined bit by bit."""
    full = a.full | b.full
    in_b, in_a = _common(a, b)[0], _common(b, a)[0]
    covered = full.view(-1)
    a_left = Blocks(full, a.partial[~covered[a.partial]], a.tile[~covered[a.partial]])
    b_left = Blocks(full, b.partial[~covered[b.partial]], b.tile[~covered[b.partial]])
    return _join(full, a_left, b_left, ~in_b[~covered[a.partial]], ~in_a[~covered[b.partial]])


def complement(a: Blocks, shape: Shape) -> Pairs:
    """Blocks of ``~a`` as pairs (tile, kind of edge), to be settled by ``~tile & edge``; tile -1 is the empty one."""
    kind = shape.edge(a.full.device)[0]
    touched = a.full.clone().view(-1)
    touched[a.partial] = True
    free = ~touched.view_as(a.full)
    ragged = (free & (kind > 0)).view(-1).nonzero().squeeze(1)
    key = torch.cat([a.partial, ragged])
    tile = torch.cat([a.tile, torch.full_like(ragged, -1)])
    return Pairs(free & (kind == 0), key, tile, kind.view(-1)[key])


def beside(sizes: Sequence[Sequence[int]], axis: int) -> list[int]:
    """Order of the slices of grids [batch, heads] of ``sizes``, listed one grid after the other, in the grid that they
    make side by side along ``axis``; along the other axis sizes are equal."""
    start, grids = 0, []
    for batch, heads in sizes:
        grids.append(torch.arange(start, start + batch * heads).view(batch, heads))
        start += batch * heads
    return torch.cat(grids, axis).flatten().tolist()
