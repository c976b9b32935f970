"""The blocks of a mask in coordinates, the form in which masks are built and combined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hhattn.masks import _bits

_ROWS = 32  # block rows listed at once: int64 coordinates of a whole dense mask would take 16 bytes a block


class Shape(NamedTuple):
    """Lengths in tokens, and the block size; ``nq x nk`` blocks cover them, the last ones ragged."""

    q_len: int
    k_len: int
    bq: int
    bk: int

    @property
    def nq(self) -> int:
        return -(-self.q_len // self.bq)

    @property
    def nk(self) -> int:
        return -(-self.k_len // self.bk)

    def edge(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(kind [nq, nk] int64, tiles [4, bq, w]): ``tiles[kind[i, j]]`` has a bit for every real token pair of block
        (i, j); kind 0 is a whole block."""
        q_ragged = (torch.arange(1, self.nq + 1, device=device) * self.bq > self.q_len).long()
        k_ragged = (torch.arange(1, self.nk + 1, device=device) * self.bk > self.k_len).long()
        return 2 * q_ragged[:, None] + k_ragged, self.edge_tiles(device)

    def edge_tiles(self, device: torch.device) -> Tensor:
        """[4, bq, w]: the bits of a block that no end cuts, one cut by the keys' end, by the queries', and by both."""
        whole = torch.ones(4, self.bq, self.bk, dtype=torch.bool, device=device)
        whole[2:, self.q_len - (self.nq - 1) * self.bq :] = False
        whole[1::2, :, self.k_len - (self.nk - 1) * self.bk :] = False
        return _bits.pack(whole)


def make_shape(q_len: int, k_len: int, block_size: tuple[int, int]) -> Shape:
    """Check lengths and block size, which raises ValueError below 1."""
    if len(block_size) != 2 or min(block_size) < 1:
        raise ValueError(f"block_size={block_size}: accepted are two sizes (bq, bk) of at least 1")
    if min(q_len, k_len) < 1:
        raise ValueError(f"q_len={q_len}, k_len={k_len}: accepted are lengths of at least 1")
    return Shape(q_len, k_len, *block_size)


class Blocks(NamedTuple):
    """The blocks of one batch entry and head.

    full: [nq, nk] bool, blocks whose every bq x bk token pair is real and attended.
    partial: [P] int64, ``row * nk + column`` of every other block with at least one pair, ascending.
    tile: [P] int64, each one's place in a table of bit tiles.
    """

    full: Tensor
    partial: Tensor
    tile: Tensor


# of one batch entry and head: partial counts [nq], columns and tiles [nq, P], full counts [nq] and columns [nq, F]
Lists = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Pairs(NamedTuple):
    """Blocks still to be settled: block ``key`` gets the tile ``op(table[left], table[right])``."""

    full: Tensor
    key: Tensor
    left: Tensor
    right: Tensor


def settle(
    slices: Sequence[Pairs], left: Tensor, right: Tensor, op: Callable[[Tensor, Tensor], Tensor], shape: Shape
) -> tuple[list[Blocks], Tensor]:
    """Compute each distinct (left, right) pair of tiles once; blocks that come out empty are dropped and blocks that
    come out whole join ``full``. ``left``, ``right`` are the tables that the pairs point into. Returns the slices and
    their table of distinct tiles."""
    pair = torch.cat([s.left * len(right) + s.right for s in slices])
    distinct, inverse = _bits.unique_numbers(pair, len(left) * len(right))
    table, place = _bits.unique_tiles(op(left[distinct // max(1, len(right))], right[distinct % max(1, len(right))]))
    bits = _bits.popcount(table)
    keep = (bits > 0) & (bits < shape.bq * shape.bk)
    renumbered = keep.cumsum(0) - 1
    result = []
    for s, tile in zip(slices, place[inverse].split([len(s.key) for s in slices]), strict=True):
        full = s.full.clone()
        full.view(-1)[s.key[bits[tile] == shape.bq * shape.bk]] = True
        result.append(ordered(full, s.key[keep[tile]], renumbered[tile[keep[tile]]]))
    return result, table[keep]


def ordered(full: Tensor, key: Tensor, tile: Tensor) -> Blocks:
    """Blocks whose partial ones may come in any order."""
    if (key.diff() < 0).any():  # most come in order, and sorting takes the longest of all
        key, order = key.sort()
        tile = tile[order]
    return Blocks(full, key, tile)


def share(parts: Sequence[tuple[Sequence[Blocks], Tensor]]) -> tuple[list[Blocks], Tensor]:
    """Slices that point into a table of distinct tiles each, in one such table."""
    if len(parts) == 1:
        return list(parts[0][0]), parts[0][1]
    table, place = _bits.unique_tiles(torch.cat([table for _, table in parts]))
    places = place.split([len(table) for _, table in parts])
    return [s._replace(tile=at[s.tile]) for (slices, _), at in zip(parts, places, strict=True) for s in slices], table


def classify(slices: Sequence[Blocks], table: Tensor, shape: Shape) -> tuple[list[Blocks], Tensor]:
    """The same blocks with empty ones dropped, whole ones in ``full`` and the table free of duplicates."""
    pairs = [Pairs(s.full, s.partial, s.tile, torch.zeros_like(s.tile)) for s in slices]
    return settle(pairs, table, table[:1], lambda left, _: left, shape)


def from_whole(blocks: Tensor, shape: Shape) -> tuple[list[Blocks], Tensor]:
    """Slices of ``blocks`` [N, nq, nk] bool, each attended in whole; ragged ones become partial."""
    kind, tiles = shape.edge(blocks.device)
    slices = []
    for attended in blocks:
        ragged = (attended & (kind > 0)).view(-1).nonzero().squeeze(1)
        slices.append(Blocks(attended & (kind == 0), ragged, kind.view(-1)[ragged]))
    return classify(slices, tiles, shape)


def from_dense(dense: Tensor, shape: Shape) -> tuple[list[Blocks], Tensor]:
    """Slices of ``dense`` [N, q_len, k_len] bool."""
    nq, nk, bq, bk = shape.nq, shape.nk, shape.bq, shape.bk
    slices, tables, start = [], [], 0
    for attended in dense:
        padded = torch.nn.functional.pad(attended, (0, nk * bk - shape.k_len, 0, nq * bq - shape.q_len))
        blocks = padded.view(nq, bq, nk, bk).transpose(1, 2)
        full = blocks.all(-1).all(-1)
        partial = (blocks.any(-1).any(-1) & ~full).view(-1).nonzero().squeeze(1)
        packed = [_bits.pack(blocks[key // nk, key % nk]) for key in partial.split(1024)]
        table, tile = _bits.unique_tiles(torch.cat(packed) if packed else empty_table(shape, dense.device))
        slices.append(Blocks(full, partial, tile + start))
        tables.append(table)
        start += len(table)
    return classify(slices, torch.cat(tables), shape)


def empty_table(shape: Shape, device: torch.device) -> Tensor:
    """A table of no tiles."""
    return torch.zeros(0, shape.bq, -(-shape.bk // 8), dtype=torch.uint8, device=device)


def to_dense(blocks: Blocks, table: Tensor, shape: Shape) -> Tensor:
    """[q_len, k_len] bool."""
    nq, nk, bq, bk = shape.nq, shape.nk, shape.bq, shape.bk
    dense = blocks.full[:, None, :, None].expand(nq, bq, nk, bk).clone()
    for key, tile in zip(blocks.partial.split(1024), blocks.tile.split(1024), strict=True):
        dense[key // nk, :, key % nk] = _bits.unpack(table[tile], bk)
    return dense.view(nq * bq, nk * bk)[: shape.q_len, : shape.k_len]


def to_lists(full: Tensor) -> tuple[Tensor, Tensor]:
    """bool [nq, nk] -> (counts [nq] int32, indices [nq, max count] int32, ascending, 0 beyond the count)."""
    counts = torch.cat([part.sum(-1, dtype=torch.int32) for part in full.split(_ROWS)])  # the sum widens its input
    width = int(counts.max()) if counts.numel() else 0
    indices = torch.zeros(len(full), width, dtype=torch.int32, device=full.device)
    column = torch.arange(full.shape[1], dtype=torch.int32, device=full.device)
    for part, filled, count in zip(full.split(_ROWS), indices.split(_ROWS), counts.split(_ROWS), strict=True):
        filled.masked_scatter_(within(count, width), column.expand_as(part)[part])
    return counts, indices


def partial_lists(blocks: Blocks, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Partial blocks as (counts [nq], columns [nq, max count], tiles [nq, max count]), int32, 0 beyond the count."""
    edges = torch.arange(shape.nq + 1, device=blocks.partial.device) * shape.nk
    counts = torch.searchsorted(blocks.partial, edges, out_int32=True).diff()
    listed = within(counts, int(counts.max()) if counts.numel() else 0)
    columns, tiles = torch.zeros(2, *listed.shape, dtype=torch.int32, device=listed.device)
    columns.masked_scatter_(listed, (blocks.partial % shape.nk).int())
    return counts, columns, tiles.masked_scatter_(listed, blocks.tile.int())


def within(counts: Tensor, width: int) -> Tensor:
    """[n, width] bool: the first ``counts[i]`` of each row i. Sorted entries fill these, row by row."""
    return torch.arange(width, device=counts.device) < counts[:, None]


def from_lists(lists: Sequence[Tensor], shape: Shape) -> Blocks:
    """The inverse of :func:`partial_lists` and :func:`to_lists`: ``lists`` are theirs of one batch entry and head."""
    counts, columns, tiles, full_counts, full_columns = lists
    device = counts.device
    row, place = within(counts, columns.shape[1]).nonzero(as_tuple=True)
    full = torch.zeros(shape.nq, shape.nk + 1, dtype=torch.bool, device=device)
    beyond = torch.arange(full_columns.shape[1], device=device) >= full_counts[:, None]
    full.scatter_(1, full_columns.long().masked_fill(beyond, shape.nk), True)
    return Blocks(full[:, :-1].contiguous(), row * shape.nk + columns[row, place], tiles[row, place].long())


def check_bool(name: str, value: Tensor) -> None:
    """Four dims of bool, or an error that names the argument."""
    if value.dtype != torch.bool:
        raise TypeError(f"{name} is {value.dtype}; accepted is torch.bool")
    if value.ndim != 4:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; accepted are four dims [B|1, H|1, queries, keys]")
