"""Lists of blocks made on the device, their widths known beforehand: nothing is read back, so nothing waits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hhattn.masks._blocks import Shape

Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # the first fields of a BlockMask, its table the last


class QLists(NamedTuple):
    """The same blocks listed by key block, for the gradients of k and v. Queries of key block j are
    ``indices[..., offsets[..., j] : offsets[..., j + 1]]``, ascending; int32.

    offsets, full_offsets: [Bm, Hm, nk + 1]; indices, tiles, full_indices: [Bm, Hm, nq * width of the kv list].
    """

    offsets: Tensor
    indices: Tensor
    tiles: Tensor
    full_offsets: Tensor
    full_indices: Tensor


def listed(flags: Tensor, width: int, *values: Tensor) -> tuple[Tensor, ...]:
    """The columns of ``flags`` [..., nk] that are True, as (counts [...], columns [..., width], and of each of
    ``values`` [..., nk] what stands there), int32, ascending, 0 beyond the count. ``width`` bounds the counts: of a row
    with more, the first ``width`` are listed.
    """
    nk = flags.shape[-1]
    place = flags.cumsum(-1, dtype=torch.int32) - 1
    place = place.where(flags & (place < width), width).long()  # what isn't listed goes to a slot that is cut off
    columns = torch.arange(nk, dtype=torch.int32, device=flags.device)
    rows = []
    for value in (columns, *values):
        row = torch.zeros(*flags.shape[:-1], width + 1, dtype=torch.int32, device=flags.device)
        rows.append(row.scatter_(-1, place, value.int().expand(flags.shape))[..., :width])
    return (flags.sum(-1, dtype=torch.int32).clamp(max=width), *rows)


def edge_kinds(shape: Shape, rows: slice, device: torch.device) -> Tensor:
    """[n, nk] int32 of the block rows ``rows``: each block's place in the table that :meth:`Shape.edge` makes."""
    q_ragged = torch.arange(shape.nq, device=device)[rows] * shape.bq + shape.bq > shape.q_len
    k_ragged = torch.arange(shape.nk, device=device) * shape.bk + shape.bk > shape.k_len
    return 2 * q_ragged[:, None].int() + k_ragged.int()


def edge_width(shape: Shape, width: int) -> int:
    """How many of a row's ``width`` blocks the ends of the sequences can cut."""
    if shape.q_len % shape.bq:
        return width  # the last row is cut in all of its blocks
    return min(width, 1) if shape.k_len % shape.bk else 0


def whole_blocks(kept: Tensor, shape: Shape, width: int) -> Lists:
    """``kept`` [B, H, nq, nk] bool, of each row the first ``width``, attended in whole."""
    kept = kept & (kept.cumsum(-1, dtype=torch.int32) <= width)
    kind = edge_kinds(shape, slice(None), kept.device)
    full_counts, full_columns = listed(kept & (kind == 0), width)
    counts, columns, tiles = listed(kept & (kind > 0), edge_width(shape, width), kind)
    return counts, columns, tiles, full_counts, full_columns, shape.edge_tiles(kept.device)


def by_column(counts: Tensor, columns: Tensor, nk: int, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row lists [Bm, Hm, nq, width] to column lists (offsets, rows, values), by a stable sort of their entries."""
    width = columns.shape[-1]
    beyond = torch.arange(width, device=columns.device) >= counts[..., None]
    column, entry = columns.masked_fill(beyond, nk).flatten(-2).sort(dim=-1, stable=True)
    edges = torch.arange(nk + 1, dtype=column.dtype, device=column.device).expand(*column.shape[:-1], -1)
    offsets = torch.searchsorted(column, edges.contiguous(), out_int32=True)
    return offsets, (entry // max(1, width)).int(), values.flatten(-2).gather(-1, entry)
