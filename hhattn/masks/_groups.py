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

_CHUNK = 1 << 20  # elements of a temporary, few enough for the cache


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


def _reduce(relation: Tensor, groups: Tensor, op: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """``op`` (in place) over the rows ``relation[g]`` of the groups g of each block: bool [n, columns]."""
    result = relation[groups[:, 0]]
    for column in groups.T[1:]:
        op(result, relation[column])
    return result


def _classify(relation: Tensor, q: _Side, k: _Side) -> tuple[Tensor, Tensor]:
    """(full [nq, nk] bool, partial [P] block numbers, ascending)."""
    some, every = (
        _reduce(_reduce(relation, q.groups, op).T.contiguous(), k.groups, op).T.contiguous()
        for op in (Tensor.logical_or_, Tensor.logical_and_)
    )
    return every, (some & ~every).view(-1).nonzero().squeeze(1)


def _related(relation: Tensor, q: _Side, k: _Side, key: Tensor, nk: int) -> Tensor:
    """[P, cq, ck] bool: the relation between the groups of the two sides of each block."""
    index = q.groups[key // nk, :, None] * relation.shape[1] + k.groups[key % nk, None, :]
    return relation.view(-1).index_select(0, index.view(-1)).view(index.shape)


def _draw(relation: Tensor, q: _Side, k: _Side, partial: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Bit tiles of the partial blocks: (table, place of each block's tile in it)."""
    nk, cq, ck = shape.nk, q.groups.shape[1], k.groups.shape[1]
    signatures, blocks, inverse, start = [], [], [], 0
    for part in partial.split(max(1, _CHUNK // (cq * ck))):
        row, column = part // nk, part % nk
        related = _related(relation, q, k, part, nk).view(-1, cq * ck)
        patterns = torch.stack([q.pattern[row], k.pattern[column]], dim=-1).view(torch.uint8)
        signature = torch.cat([patterns, related.view(torch.uint8)], dim=-1)
        first, place = _bits.unique_rows(signature)
        signatures.append(signature[first])
        blocks.append(part[first])
        inverse.append(place + start)
        start += len(first)
    if not blocks:
        return _blocks.empty_table(shape, partial.device), partial
    first, place = _bits.unique_rows(torch.cat(signatures))
    table = [_bits.pack(_bits_of(relation, q, k, part, nk)) for part in torch.cat(blocks)[first].split(1024)]
    return torch.cat(table), place[torch.cat(inverse)]


def _bits_of(relation: Tensor, q: _Side, k: _Side, part: Tensor, nk: int) -> Tensor:
    """[P, bq, bk] bool."""
    related = _related(relation, q, k, part, nk)
    rows = related.gather(1, q.label[part // nk][:, :, None].expand(-1, -1, related.shape[2]))
    return rows.gather(2, k.label[part % nk][:, None, :].expand(-1, rows.shape[1], -1))


def from_groups(q_group: Tensor, k_group: Tensor, relation: Tensor, shape: Shape) -> tuple[list[Blocks], Tensor]:
    """Blocks of the mask ``relation[h, q_group[i], k_group[j]]``, one slice a head.

    q_group [q_len], k_group [k_len]: int64, -1 for a token that attends and is attended by nothing.
    relation: [Hm, G, G] bool.
    """
    # one more group, related to nothing: for tokens outside every group and for the padding of the last block
    relation = torch.nn.functional.pad(relation, (0, 1, 0, 1))
    nothing = relation.shape[-1] - 1
    q = _side(q_group.where(q_group >= 0, nothing), shape.bq, nothing)
    k = _side(k_group.where(k_group >= 0, nothing), shape.bk, nothing)
    slices, tables, start = [], [], 0
    for related in relation:
        full, partial = _classify(related, q, k)
        table, tile = _draw(related, q, k, partial, shape)
        slices.append(Blocks(full, partial, tile + start))
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
