"""Masks of frames and places: which frames a frame attends, and, in each of those, which places a place attends.

A token is a place (row and column) in a frame. Frames count by the hundred and places by the thousand, so a relation of
each kind is small where one between all tokens, or all tiles, would not be. Blocks come in few kinds: a block's
*outline* is where its tokens stand, in frames counted from its first one, and outlines repeat along a video. A block of
the mask is settled by the outlines of its queries and keys and the *window*, the classes of the pairs of frames they
lie in; each such triple is counted and drawn once. No array of tokens x tokens, no loop over blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hhattn.layout import Order, VideoLayout, check_order
from hhattn.masks import _bits, _blocks
from hhattn.masks._arguments import frame_numbers, part_of, text_lengths
from hhattn.masks._blocks import Lists, Shape, make_shape
from hhattn.masks.block_mask import BlockMask, stack

_ROWS = 64  # block rows handled at once,
_TABLE = 1 << 20  # entries of a table of triples or of counts,
_BITS = 1 << 26  # bytes of the keys' bits; a frame of a thousand places takes a few MB,
_BYTES = 1 << 22  # bytes of bits drawn: few enough for caches, and for a peak of some 10 MB

Places = Callable[[], Tensor]


class Pattern(NamedTuple):
    """What one head attends: place p of frame f attends place r of frame g where ``places[c - 1]()[p, r]`` with
    ``c = frames[f, g]``, and nothing of g where c is 0.

    frames: [T, T] uint8 classes, or [T + 1, T + 1] where text is one frame more, all of whose tokens are at place 0.
    places: a function a class, which returns [n, n] bool for the n places of a frame, row by row.
    """

    frames: Tensor
    places: Sequence[Places]


def everywhere(layout: VideoLayout) -> Places:
    """Every place attends every place."""
    return lambda: torch.ones(layout.frame_len, layout.frame_len, dtype=torch.bool)


def by_axis(rows: Tensor, columns: Tensor) -> Places:
    """Places whose rows are related, [height, height] bool, and whose columns are, [width, width]."""
    n = len(rows) * len(columns)
    return lambda: (rows[:, None, :, None] & columns[None, :, None, :]).reshape(n, n)


class _Side(NamedTuple):
    """The queries, or the keys, in blocks of b tokens, of which U outlines are distinct.

    place: [U, b] int64; 0 where there is no token.
    depth: [U, b] int64, frames from the block's base; ``depths`` where there is no token.
    outline: [n] int64, which of them each block has.
    base: [n] int64, each block's first frame as a place in ``bases``.
    bases: [m] int64, distinct frames.
    depths: frames that the longest outline reaches over.
    """

    place: Tensor
    depth: Tensor
    outline: Tensor
    base: Tensor
    bases: Tensor
    depths: int


def _side(layout: VideoLayout, order: Order, size: int, text_len: int) -> _Side:
    """Sides of ``layout`` with ``text_len`` text tokens that are no padding. Text is one frame more, before the video's
    or after them as its tokens are, so that a block over their border is short. A base is where the tiles that a block
    begins in begin: outlines repeat from one row of tiles to the next."""
    token = layout.tile_index() if order == "tile" else torch.arange(layout.seq_len)
    token = token.int() - layout.video_slice.start
    frame, place = token // layout.frame_len, token % layout.frame_len
    step = layout.tile[0] if order == "tile" else 1
    start = frame // step * step
    place[layout.text_slice] = 0
    for number in (frame, start):
        number[layout.text_slice] = -1 if layout.text_first else layout.frames
        number += int(layout.text_first)
    frame[layout.text_slice][text_len:] = -1

    def blocks(x: Tensor, absent: int) -> Tensor:
        return F.pad(x, (0, -len(x) % size), value=absent).view(-1, size)

    frame, start, place = blocks(frame, -1), blocks(start, -1), blocks(place, 0)
    there = frame >= 0
    base = start.where(there, layout.frames + 1).amin(1)
    depth = (frame - base[:, None]).where(there, -1)
    depths = max(1, int(depth.max()) + 1)
    outlines = (depth * layout.frame_len + place).where(there, -1)
    first, outline = _bits.unique_rows(outlines.view(torch.uint8))
    bases, base = torch.unique(base.long(), return_inverse=True)
    there, place, depth = there[first], place[first].long(), depth[first].long()
    return _Side(place.where(there, 0), depth.where(there, depths), outline, base, bases, depths)


def _windows(frames: Tensor, q: _Side, k: _Side) -> tuple[Tensor, Tensor]:
    """(distinct windows [W, depths of q, depths of k], [bases of q, bases of k] int64: which window a pair has)."""
    padded = F.pad(frames, (0, k.depths + 1, 0, q.depths + 1))
    rows, columns = (s.bases[:, None] + torch.arange(s.depths) for s in (q, k))
    every = padded[rows[:, None, :, None], columns[None, :, None, :]].flatten(0, 1)
    first, window = _bits.unique_rows(every.flatten(1))
    return every[first], window.view(len(q.bases), len(k.bases))


class _Bags(NamedTuple):
    """Tokens by (depth, outline) pair: pairs that have any, int64 [R] as depth * outlines + outline; places of their
    tokens, one pair after the other; where each pair's begin."""

    pairs: Tensor
    places: Tensor
    offsets: Tensor

    def sum(self, rows: Tensor) -> Tensor:
        """[R, c]: the sum of ``rows`` [n, c] over each pair's places."""
        return F.embedding_bag(self.places, rows, self.offsets, mode="sum")


def _bags(side: _Side, outlines: slice) -> _Bags:
    place, depth = side.place[outlines], side.depth[outlines]
    there = (depth < side.depths).flatten()
    pair = (depth * len(place) + torch.arange(len(place))[:, None]).flatten()[there]
    pair, order = pair.sort(stable=True)
    pairs, counts = torch.unique_consecutive(pair, return_counts=True)
    return _Bags(pairs, place.flatten()[there][order], counts.cumsum(0) - counts)


def _seen(places: Sequence[Places], keys: _Bags, n: int, exact: torch.dtype) -> list[Tensor]:
    """For each class, [n, R]: how many keys of each (depth, outline) pair a place attends."""
    seen = []
    for related in places:
        parts = related().split(max(1, (1 << 18) // n))
        seen.append(torch.cat([keys.sum(part.T.to(exact, memory_format=torch.contiguous_format)) for part in parts], 1))
    return [x.T.contiguous() for x in seen]


def _count(windows: Tensor, seen: list[Tensor], keys: _Bags, q: _Side, k: _Side, outlines: slice) -> Tensor:
    """float64 [W, outlines of q, outlines of k]: pairs attended. Summed over pairs of depths, each of the class that
    the window says. Sums of whole numbers, and a product that neither autocast nor a setting makes less exact."""
    queries, size = _bags(q, outlines), (len(q.place[outlines]), len(k.place))
    pairs = torch.zeros(len(seen), q.depths, size[0], k.depths, size[1], dtype=torch.float64)
    for c, rows in enumerate(seen):
        pairs[c].view(q.depths * size[0], -1)[queries.pairs[:, None], keys.pairs] = queries.sum(rows).double()
    of_class = torch.stack([windows == c for c in range(1, len(seen) + 1)], 1).flatten(1).double()
    return (of_class @ pairs.transpose(2, 3).reshape(of_class.shape[1], -1)).view(len(windows), *size)


def _canonical(windows: Tensor, q: _Side, k: _Side, outlines: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Windows with what an outline's depths don't reach cleared, so that triples that draw the same are the same:
    (distinct cleared windows, [W, x, y] int64 which each is, kinds x of q's outlines and y of k's)."""
    kinds = []
    for side, part in ((q, outlines), (k, slice(None))):
        reached = torch.zeros(len(side.depth[part]), side.depths + 1, dtype=torch.uint8)
        reached = reached.scatter_(1, side.depth[part], 1)[:, :-1]
        first, kind = _bits.unique_rows(reached)
        kinds.append((reached[first], kind))
    (rows, row_kind), (columns, column_kind) = kinds
    cleared = windows[:, None, None] * rows[None, :, None, :, None] * columns[None, None, :, None, :]
    first, which = _bits.unique_rows(cleared.flatten(0, 2).flatten(1))
    distinct = cleared.flatten(0, 2)[first]
    return distinct, which.view(cleared.shape[:3]), row_kind, column_kind


class _Triples(NamedTuple):
    """Kinds of blocks, int64 [P] each: a window, an outline of queries and one of keys."""

    window: Tensor
    queries: Tensor
    keys: Tensor


class _Rows(NamedTuple):
    """Partial blocks of some rows of blocks, one row after the other: rows [r] int64, counts [r], and of each block its
    column and its tile (while tiles aren't drawn, its triple), int32."""

    rows: Tensor
    counts: Tensor
    columns: Tensor
    tiles: Tensor


class _Keys(NamedTuple):
    """Bits of some outlines of keys: ``of_place`` [classes][outlines, n, w] uint8, keys that a place attends, whatever
    their depth; ``at_depth`` [outlines, depths, w] uint8, keys of each depth."""

    of_place: list[Tensor]
    at_depth: Tensor


def _keys(places: Sequence[Places], k: _Side, outlines: slice) -> _Keys:
    place, depth = k.place[outlines], k.depth[outlines]
    place = F.pad(place, (0, -place.shape[1] % 8)).unflatten(1, (-1, 8))
    of_place = []
    for related in places:
        attended_by = related().T.contiguous().view(torch.uint8)  # rows are keys: eight of them make a row of bytes
        byte = attended_by.index_select(0, place[:, :, 0].flatten())
        for bit in range(1, 8):
            byte |= attended_by.index_select(0, place[:, :, bit].flatten()) << bit
        of_place.append(byte.view(*place.shape[:2], -1).transpose(1, 2).contiguous())
    return _Keys(of_place, _bits.pack(depth[:, None] == torch.arange(k.depths)[:, None]))


def _draw(windows: Tensor, triples: _Triples, q: _Side, bits: _Keys) -> Tensor:
    """uint8 [P, bq, w] of the triples, whose ``keys`` count from the first of ``bits``."""
    n_keys = len(bits.at_depth)
    pair, of_pair = torch.unique(triples.window * n_keys + triples.keys, return_inverse=True)
    window, key = windows[pair // n_keys], pair % n_keys
    at = (of_pair * (q.depths + 1))[:, None] + q.depth[triples.queries]
    tiles = torch.zeros(*at.shape, bits.at_depth.shape[-1], dtype=torch.uint8)
    for c, of_place in enumerate(bits.of_place, 1):
        chosen = (window == c).flatten(1).any(1)[of_pair].nonzero().squeeze(1)
        if not len(chosen):
            continue
        reach = torch.zeros(
            len(pair), q.depths + 1, tiles.shape[2], dtype=torch.uint8
        )  # keys in c by depth of the query
        for depth, in_class in enumerate((window == c).unbind(2)):
            reach[:, :-1] |= bits.at_depth[key, depth, None] * in_class[:, :, None]
        row = (triples.keys * of_place.shape[1])[chosen, None] + q.place[triples.queries[chosen]]
        drawn = of_place.flatten(0, 1).index_select(0, row.flatten())
        drawn &= reach.flatten(0, 1).index_select(0, at[chosen].flatten())
        tiles.index_add_(0, chosen, drawn.view(-1, *tiles.shape[1:]))  # each pair is in one class
    return tiles


def _draw_distinct(
    windows: Tensor, triples: _Triples, places: Sequence[Places], n: int, q: _Side, k: _Side, whole: _Keys | None
) -> tuple[Tensor, Tensor]:
    """(table of the triples' tiles, int64 [P] each one's place in it), with bits of all keys where there is room."""
    width, step = -(-k.place.shape[1] // 8), len(k.place) if whole else _step(places, n, k)
    count = max(1, _BYTES // (4 * q.place.shape[1] * width))
    tables, place, found = [], torch.empty_like(triples.keys), 0
    for first in range(0, len(k.place), step):
        bits = whole or _keys(places, k, slice(first, first + step))
        for some in ((triples.keys >= first) & (triples.keys < first + step)).nonzero().squeeze(1).split(count):
            part = _Triples(*(x[some] for x in triples))
            table, at = _bits.unique_tiles(_draw(windows, part._replace(keys=part.keys - first), q, bits))
            place[some] = at + found
            tables.append(table)
            found += len(table)
    table, at = _bits.unique_tiles(torch.cat(tables))
    return table, at[place]


def _step(places: Sequence[Places], n: int, k: _Side) -> int:
    """Outlines of keys whose bits are made at once."""
    return max(1, _BITS // (len(places) * n * -(-k.place.shape[1] // 8)))


def _parts(n_windows: int, n_classes: int, q: _Side, k: _Side) -> Iterator[slice]:
    """Outlines of q in parts whose tables are small; one part, mostly."""
    entries = len(k.place) * max(n_windows, n_classes * q.depths * k.depths)
    step = max(1, _TABLE // entries)
    return (slice(first, first + step) for first in range(0, len(q.place), step))


def _lists_of(pattern: Pattern, q: _Side, k: _Side, n: int, shape: Shape) -> tuple[Lists, Tensor]:
    """The lists of one head, and the table that they point into."""
    windows, window = _windows(pattern.frames, q, k)
    full = torch.zeros(shape.nq, shape.nk, dtype=torch.bool)
    rows: list[_Rows] = []
    tables = [torch.zeros(0, shape.bq, -(-shape.bk // 8), dtype=torch.uint8)]
    keys = _bags(k, slice(None))
    seen = _seen(pattern.places, keys, n, torch.float32 if shape.bq * shape.bk < 1 << 24 else torch.float64)
    whole = _keys(pattern.places, k, slice(None)) if _step(pattern.places, n, k) >= len(k.place) else None
    for part in _parts(len(windows), len(pattern.places), q, k):
        pairs = _count(windows, seen, keys, q, k, part)
        code = (pairs == shape.bq * shape.bk).int()  # 0 is empty, 1 full, 2 + i triple i
        cleared, triples = _number(windows, (pairs > 0) & (code == 0), code, q, k, part)
        found = list(_look_up(code, window, part, q, k, full))
        occurs = torch.zeros(len(triples.keys), dtype=torch.bool)  # draw these only
        for some in found:
            occurs[some.tiles] = True
        occurring = _Triples(*(x[occurs] for x in triples))
        table, place = _draw_distinct(cleared, occurring, pattern.places, n, q, k, whole)
        tile = torch.zeros(len(occurs), dtype=torch.int32).masked_scatter_(occurs, place.int() + sum(map(len, tables)))
        while found:
            some = found.pop()
            rows.append(some._replace(tiles=tile.index_select(0, some.tiles)))
        tables.append(table)
    table, place = _bits.unique_tiles(torch.cat(tables))  # two parts may have drawn the same
    return (*_filled(rows, place.int(), shape), *_blocks.to_lists(full)), table


def _filled(found: list[_Rows], tile: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Padded lists (counts, columns, tiles) of all rows; empties ``found``."""
    counts = torch.zeros(shape.nq, dtype=torch.int32)
    for some in found:
        counts[some.rows] = some.counts
    width = int(counts.max())
    columns, tiles = torch.zeros(2, shape.nq, width, dtype=torch.int32)
    while found:
        some = found.pop()
        listed = _blocks.within(some.counts, width)
        for lists, values in ((columns, some.columns), (tiles, tile.index_select(0, some.tiles))):
            lists.index_copy_(
                0, some.rows, torch.zeros(listed.shape, dtype=torch.int32).masked_scatter_(listed, values)
            )
    return counts, columns, tiles


def _number(windows: Tensor, partial: Tensor, code: Tensor, q: _Side, k: _Side, part: slice) -> tuple[Tensor, _Triples]:
    """Number the triples [W, outlines of q, outlines of k] that are ``partial``, those that draw the same alike, in
    ``code``: (windows, the numbered triples)."""
    w, u, v = partial.nonzero(as_tuple=True)
    cleared, which, row_kind, column_kind = _canonical(windows, q, k, part)
    rows, columns = partial.shape[1:]
    triple = (which[w, row_kind[u], column_kind[v]] * rows + u) * columns + v
    distinct, number = _bits.unique_numbers(triple, len(cleared) * rows * columns)
    code[w, u, v] = number.int() + 2
    rest = distinct // columns
    return cleared, _Triples(rest // rows, rest % rows + part.start, distinct % columns)


def _look_up(code: Tensor, window: Tensor, part: slice, q: _Side, k: _Side, full: Tensor) -> Iterator[_Rows]:
    """Every block whose queries have an outline of ``part``: full ones are marked in ``full`` [nq, nk], partial ones
    come with the numbers of their triples."""
    size, n_keys = code.shape[1:]
    at = (window * (size * n_keys)).index_select(1, k.base).add_(k.outline).int()
    touched = (code > 0).flatten(1).any(1)[window].index_select(1, k.base)
    table, number = code.flatten(), torch.arange(full.shape[1], dtype=torch.int32)
    here = ((q.outline >= part.start) & (q.outline < part.start + size)).nonzero().squeeze(1)
    for rows in here.split(_ROWS):
        base = q.base[rows]
        columns = touched[torch.unique_consecutive(base)].any(0).nonzero().squeeze(1)
        some = at if len(columns) == at.shape[1] else at.index_select(1, columns)
        place = some.index_select(0, base).add_(((q.outline[rows] - part.start) * n_keys).int()[:, None])
        found = table.index_select(0, place.flatten()).view_as(place)
        full_here = torch.zeros(len(rows), full.shape[1], dtype=torch.bool)
        full.index_copy_(0, rows, full_here.index_copy_(1, columns, found == 1))
        partial = found > 1
        counts = partial.sum(1, dtype=torch.int32)
        yield _Rows(rows, counts, number[columns].expand_as(partial)[partial], found[partial] - 2)


def static_mask(
    layout: VideoLayout,
    patterns: Sequence[Pattern],
    block_size: tuple[int, int],
    order: Order,
    q_frames: Sequence[int] | None,
    k_frames: Sequence[int] | None,
    text_lens: Sequence[int] | None = None,
) -> BlockMask:
    """What builders share: the mask of ``patterns``, one a head, of those frames of ``layout`` that are there; with
    ``text_lens``, one for each batch entry, of whose text only so many tokens are no padding."""
    check_order("order", order)
    q_layout, k_layout = (part_of(layout, name, f) for name, f in (("q_frames", q_frames), ("k_frames", k_frames)))
    shape = make_shape(q_layout.seq_len, k_layout.seq_len, block_size)
    numbers = [frame_numbers(layout, frames) for frames in (q_frames, k_frames)]
    made = []
    for text_len in text_lengths(layout, text_lens):
        q = k = _side(q_layout, order, shape.bq, text_len)
        if (q_layout, shape.bq) != (k_layout, shape.bk):
            k = _side(k_layout, order, shape.bk, text_len)
        for frames, places in patterns:
            missing = layout.frames + 1 - len(frames)
            ours = F.pad(frames, (0, missing, 0, missing))[numbers[0]][:, numbers[1]]
            made.append(_lists_of(Pattern(ours, places), q, k, layout.frame_len, shape))
    lists, table = _shared(made)
    return stack(lists, table, len(text_lens or [0]), shape, order, q_layout, k_layout)


def _shared(made: Sequence[tuple[Lists, Tensor]]) -> tuple[list[Lists], Tensor]:
    """Lists that point into a table each, in one."""
    if len(made) == 1:
        return [made[0][0]], made[0][1]
    table, place = _bits.unique_tiles(torch.cat([table for _, table in made]))
    places = place.int().split([len(table) for _, table in made])
    shared: list[Lists] = []
    for ((counts, columns, tiles, full_counts, full_columns), _), at in zip(made, places, strict=True):
        listed = _blocks.within(counts, tiles.shape[1])
        tiles = torch.zeros_like(tiles).masked_scatter_(listed, at[tiles[listed]])
        shared.append((counts, columns, tiles, full_counts, full_columns))
    return shared, table
