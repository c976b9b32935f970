"""Lists of blocks made on the device, their widths known beforehand: nothing is read back, so nothing waits."""

from __future__ import annotations

import torch
from torch import Tensor

from hhattn.masks._blocks import Shape

Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # the first fields of a BlockMask, its table the last


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
