"""Masks that depend on a token only through a group it is in: its frame, its tile, its chunk.

A relation between groups, with a few thousand groups at most, says it all. Blocks are classified from the few groups
that each one holds, and bits are drawn only for blocks that turn out partial, once for each distinct pattern; no S x S
array and no loop over blocks anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hhattn.layout import Order, VideoLayout, check_order
from hhattn.masks import _bits, _blocks
from hhattn.masks._blocks import Blocks, Shape
from hhattn.masks.block_mask import BlockMask, assemble, make_shape

_ROWS = 128  # query blocks handled at once, and
_PART = 1 << 15  # partial blocks among them: few enough for the cache


class _Side(NamedTuple):
    """The queries or the keys, by blocks.

    groups: [n, c] int32, the groups present in each block; shorter lists repeat their first.
    label: [n, b] int64, each token's group as a place in its block's list.
    pattern: [n] int64, equal for blocks with equal labels.
    """

    groups: Tensor
    label: Tensor
    pattern: Tensor


def _side(group: Tensor, size: int, padding: int) -> _Side:
    blocks = torch.nn.functional.pad(group, (0, -len(group) % size), value=padding).view(-1, size)
    ordered, order = blocks.sort(dim=-1)
    place = torch.nn.functional.pad((ordered.diff(dim=-1) != 0).long().cumsum(-1), (1, 0))
    groups = ordered[:, :1].expand(-1, int(place.max()) + 1).clone().scatter_(1, place, ordered)
    label = torch.empty_like(place).scatter_(1, order, place)
    return _Side(groups.int(), label, _bits.unique_rows(label.int().view(torch.uint8))[1])


def _codes(relation: Tensor, groups: Tensor) -> Tensor:
    """uint8 [planes, n, columns]: for each block and each group of the other side, which of the block's groups [n, c]
    are related to it, a bit each, eight to a plane."""
    planes = []
    for eight in groups.T.split(8):
        plane = relation.index_select(0, eight[0])  # many times faster than relation[...]
        for bit, column in enumerate(eight[1:], 1):
            plane.add_(relation.index_select(0, column), alpha=1 << bit)
        planes.append(plane)
    return torch.stack(planes)


def _reduce(rows: Tensor, groups: Tensor, op: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``op`` (in place) over the ``rows[g]`` of the groups g of each block: [n, columns]."""
    result = rows.index_select(0, groups[:, 0])
    for column in groups.T[1:]:
        op(result, rows.index_select(0, column))
    return result


def _classify(codes: Tensor, c: int, k: _Side) -> tuple[Tensor, Tensor]:
    """bool [n, nk] each: (blocks whose every pair of groups is related, blocks with some that are and some that not),
    from ``codes`` of query blocks of ``c`` groups."""
    all_set = torch.tensor([(1 << min(c - first, 8)) - 1 for first in range(0, c, 8)], dtype=torch.uint8)
    some, short = codes.any(0), (codes ^ all_set[:, None, None]).any(0)
    some, short = (_reduce(x.T.contiguous(), k.groups, Tensor.bitwise_or_).view(torch.bool) for x in (some, short))
    return ~short.T, (some & short).T


def _signatures(codes: Tensor, q_pattern: Tensor, k: _Side, row: Tensor, column: Tensor) -> Tensor:
    """uint8 [P, w]: what the bits of the blocks (row, column) depend on, and nothing else."""
    patterns = torch.stack([q_pattern[row], k.pattern[column]], dim=-1).view(torch.uint8)
    at = (row.int() * codes.shape[2])[:, None] + k.groups[column]
    return torch.cat([patterns, *(plane.view(-1).index_select(0, at.view(-1)).view(at.shape) for plane in codes)], -1)


def _bits_of(relation: Tensor, q: _Side, k: _Side, key: Tensor, nk: int) -> Tensor:
    """bool [P, bq, bk] of the blocks ``key``."""
    row, column = key // nk, key % nk
    related = relation[q.groups[row, :, None], k.groups[column, None, :]].bool()
    rows = related.gather(1, q.label[row][:, :, None].expand(-1, -1, related.shape[2]))
    return rows.gather(2, k.label[column][:, None, :].expand(-1, rows.shape[1], -1))


def _blocks_of(relation: Tensor, q: _Side, k: _Side, shape: Shape) -> tuple[Blocks, Tensor]:
    """The blocks of one head, and the table that they point into. ``relation`` [G, G] is 0 or 1, uint8."""
    nk = shape.nk
    full = torch.empty(shape.nq, nk, dtype=torch.bool)
    partial, signatures, stand_for, inverse, found = [], [], [], [], 0
    for start in range(0, shape.nq, _ROWS):
        groups, pattern = q.groups[start : start + _ROWS], q.pattern[start : start + _ROWS]
        codes = _codes(relation, groups)
        full[start : start + _ROWS], mixed = _classify(codes, groups.shape[1], k)
        for row, column in zip(*(x.split(_PART) for x in mixed.nonzero(as_tuple=True)), strict=True):
            signature = _signatures(codes, pattern, k, row, column)
            first, place = _bits.unique_rows(signature)
            partial.append((row + start) * nk + column)
            signatures.append(signature[first])
            stand_for.append(partial[-1][first])
            inverse.append(place + found)
            found += len(first)
    first, place = _bits.unique_rows(torch.cat(signatures))
    table = [_bits.pack(_bits_of(relation, q, k, key, nk)) for key in torch.cat(stand_for)[first].split(1024)]
    return Blocks(full, torch.cat(partial), place[torch.cat(inverse)]), torch.cat(table)


def from_groups(q_group: Tensor, k_group: Tensor, relation: Tensor, shape: Shape) -> tuple[list[Blocks], Tensor]:
    """Blocks of the mask ``relation[h, q_group[i], k_group[j]]``, one slice a head.

    q_group [q_len], k_group [k_len]: int64, -1 for a token that attends and is attended by nothing.
    relation: [Hm, G, G] bool.
    """
    # one more group, related to nothing: for tokens outside every group and for the padding of the last block
    relation = torch.nn.functional.pad(relation, (0, 1, 0, 1)).view(torch.uint8)
    nothing = relation.shape[-1] - 1
    q = _side(q_group.where(q_group >= 0, nothing), shape.bq, nothing)
    k = _side(k_group.where(k_group >= 0, nothing), shape.bk, nothing)
    slices, tables, start = [], [], 0
    for related in relation:
        blocks, table = _blocks_of(related, q, k, shape)
        slices.append(blocks._replace(tile=blocks.tile + start))
        tables.append(table)
        start += len(table)
    return _blocks.classify(slices, torch.cat(tables), shape)


def static_mask(
    layout: VideoLayout,
    group: Callable[[Tensor], Tensor],
    relation: Tensor,
    block_size: tuple[int, int],
    order: Order,
    q_frames: Sequence[int] | None,
    k_frames: Sequence[int] | None,
) -> BlockMask:
    """What builders share: ``group`` maps token positions [S, 3] (frame, row, column; -1 for text) to groups [S]."""
    check_order("order", order)
    sides = [_frames(layout, name, frames) for name, frames in (("q_frames", q_frames), ("k_frames", k_frames))]
    groups: list[Tensor] = []
    for side, frames in sides:
        position = side.positions(order)
        video = position[:, 0] >= 0
        position[video, 0] = frames[position[video, 0]]
        groups.append(group(position))
    shape = make_shape(len(groups[0]), len(groups[1]), block_size)
    slices, table = from_groups(groups[0], groups[1], relation if relation.ndim == 3 else relation[None], shape)
    return assemble(slices, table, 1, shape, order, sides[0][0], sides[1][0])


def _frames(layout: VideoLayout, name: str, frames: Sequence[int] | None) -> tuple[VideoLayout, Tensor]:
    """The layout of the given frames of ``layout`` (default: all of it) and their numbers."""
    numbers = list(range(layout.frames)) if frames is None else [int(f) for f in frames]
    if not numbers or not all(0 <= f < layout.frames for f in numbers):
        raise ValueError(f"{name}={frames}: accepted are one or more frames of 0 ... {layout.frames - 1}")
    return replace(layout, frames=len(numbers)), torch.tensor(numbers)


def frame_of(position: Tensor) -> Tensor:
    """Group by frame; text is in no group."""
    return position[:, 0]
