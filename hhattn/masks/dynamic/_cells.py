"""A mask's blocks laid out as a grid, a few rows at a time, and the union of a selection with static masks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hhattn.masks import _lists
from hhattn.masks._blocks import Shape
from hhattn.masks.block_mask import BlockMask

_PAIRS = 4096  # unions of two masks' tiles that are made beforehand


class Cells(NamedTuple):
    """Blocks [B|1, H|1, n, nk]: ``full``, bool, and of partial ones the ``tile``, int32; -1 elsewhere."""

    full: Tensor
    tile: Tensor

    @property
    def touched(self) -> Tensor:
        return self.full | (self.tile >= 0)


def whole(shape: Shape, rows: slice, device: torch.device) -> Cells:
    """Every block, with the bits of :meth:`Shape.edge_tiles` where an end cuts it."""
    kind = _lists.edge_kinds(shape, rows, device)[None, None]
    return Cells(kind == 0, kind.where(kind > 0, -1))


def cells_of(mask: BlockMask, heads: slice, rows: slice) -> Cells:
    """The blocks that ``mask`` lists, without a look at its counts on the host."""
    nk = mask.num_blocks[1]
    heads = slice(None) if mask.kv_num_blocks.shape[1] == 1 else heads

    def grid(counts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
        counts, columns, values = (x[:, heads, rows] for x in (counts, columns, values))
        beyond = torch.arange(columns.shape[-1], device=columns.device) >= counts[..., None]
        empty = torch.full((*counts.shape, nk + 1), -1, dtype=torch.int32, device=columns.device)
        return empty.scatter_(-1, columns.masked_fill(beyond, nk).long(), values)[..., :nk]

    full = grid(mask.full_kv_num_blocks, mask.full_kv_indices, torch.ones_like(mask.full_kv_indices))
    return Cells(full > 0, grid(mask.kv_num_blocks, mask.kv_indices, mask.kv_tiles))


class Frame:
    """What a selection may take (``within``; None: everything) and what is attended in any case (``keep``): where their
    blocks are, and the table of tiles that the selection's partial blocks point into."""

    def __init__(self, shape: Shape, device: torch.device, keep: BlockMask | None, within: BlockMask | None) -> None:
        self.shape, self.device, self.keep, self.within = shape, device, keep, within
        tables = [shape.edge_tiles(device) if within is None else within.tiles]
        self.kept_from, self.kept = len(tables[0]), 0
        if keep is not None:
            tables.append(keep.tiles)
            self.kept = len(keep.tiles)
        if keep is not None and within is not None:
            if len(within.tiles) * self.kept > _PAIRS:
                raise ValueError(
                    f"keep has {self.kept} bit tiles and within {len(within.tiles)}: accepted are {_PAIRS} pairs of "
                    "them; masks with fewer edges inside blocks have fewer"
                )
            tables.append((within.tiles[:, None] | keep.tiles).flatten(0, 1))
        self.table = torch.cat(tables)

    def allowed(self, heads: slice, rows: slice) -> Cells:
        """Blocks that may be selected."""
        if self.within is None:
            return whole(self.shape, rows, self.device)
        return cells_of(self.within, heads, rows)

    def widths(self, selected: int) -> tuple[int, int]:
        """(partial, full): bounds on a row's blocks, of which up to ``selected`` are selected."""
        nk = self.shape.nk
        if self.within is None:
            partial = _lists.edge_width(self.shape, selected)
        else:
            partial = min(selected, self.within.kv_indices.shape[-1])
        full = min(selected, nk if self.within is None else self.within.full_kv_indices.shape[-1])
        if self.keep is not None:
            partial += self.keep.kv_indices.shape[-1]
            full += self.keep.full_kv_indices.shape[-1]
        return min(partial, nk), min(full, nk)

    def attended(self, selected: Tensor, allowed: Cells, heads: slice, rows: slice) -> Cells:
        """The union of ``selected`` (bool, of ``allowed`` ones) with what is kept; tiles are places in the table."""
        full, tile = selected & allowed.full, allowed.tile.where(selected, -1)
        if self.keep is not None:
            keep = cells_of(self.keep, heads, rows)
            full = full | keep.full
            ours, both = keep.tile + self.kept_from, (tile >= 0) & (keep.tile >= 0)
            if self.within is not None:
                tile = (self.kept_from + self.kept + tile * self.kept + keep.tile).where(both, tile)
            tile = ours.where((keep.tile >= 0) & ~both, tile)  # a block that an end cuts holds whatever is kept of it
        return Cells(full, tile.where(~full, -1))
