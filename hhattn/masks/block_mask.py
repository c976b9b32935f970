"""Which keys each query attends, by blocks, exact to the token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hhattn.layout import Order, VideoLayout, check_order
from hhattn.masks import _algebra, _bits, _blocks, _lists
from hhattn.masks._blocks import Blocks, Pairs, Shape, check_bool, make_shape
from hhattn.masks._lists import QLists, by_column

if TYPE_CHECKING:
    from hhattn.masks._convert import Bsr, Fa4


@dataclass(eq=False)
class BlockMask:
    """A mask of ``q_len x k_len`` token pairs, cut into blocks of ``block_size = (bq, bk)``.

    Block (i, j) holds queries ``i bq ... (i + 1) bq - 1`` and keys ``j bk ... (j + 1) bk - 1``: runs of consecutive
    tokens in the order that the tokens are stored in (``order``). Blocks know nothing of video tiles: with
    ``order="tile"`` a block as long as a tile is a tile until an edge cuts one short, and straddles two from there on.
    Nothing depends on it, because every block is one of

    - empty: in no list;
    - full: every one of its bq x bk pairs is real (inside q_len x k_len) and attended;
    - partial: anything else. It points to a tile of bq x bk bits in ``tiles``; pairs outside q_len x k_len are 0.

    So a kernel that follows the lists and the bits needs no predicate and no bounds check on scores. ``tiles`` holds
    every distinct tile once: a window moving over a video repeats the same few.

    Attributes (``Bm`` is the batch size or 1, ``Hm`` the number of query heads or 1; nq, nk the number of blocks):
        kv_num_blocks: [Bm, Hm, nq] int32, partial key blocks of each query block.
        kv_indices: [Bm, Hm, nq, P] int32, their numbers, ascending; entries beyond the count are 0.
        kv_tiles: [Bm, Hm, nq, P] int32, their tiles' places in ``tiles``.
        full_kv_num_blocks, full_kv_indices: [Bm, Hm, nq] and [Bm, Hm, nq, F] int32, the same for full blocks.
        tiles: [T, bq, ceil(bk / 8)] uint8; bit j of byte i is key 8 i + j of the block.
        block_size: (bq, bk).
        q_len, k_len: tokens.
        order: the order of the tokens, "raster" or "tile".
        layout, k_layout: the :class:`VideoLayout` of the queries and of the keys where there is one; needed only to
            convert between orders.

    Made by the builders of :mod:`hhattn.masks`, or by :meth:`from_dense`, :meth:`from_blocks`, :meth:`from_flex`;
    combined with ``&``, ``|`` and ``~``, which are exact. Building reads sizes on the host; using a mask doesn't.

    Raises:
        ValueError: tensors whose shapes don't fit one another, lengths or block sizes below 1, an unknown order, a
            layout of another length.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    kv_tiles: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    tiles: Tensor
    block_size: tuple[int, int]
    q_len: int
    k_len: int
    order: str = "raster"
    layout: VideoLayout | None = None
    k_layout: VideoLayout | None = None
    _q_lists: QLists | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        shape = self._shape
        check_order("order", self.order)
        rows = (*self.kv_num_blocks.shape[:2], shape.nq)
        partial, full = (*rows, self.kv_indices.shape[-1]), (*rows, self.full_kv_indices.shape[-1])
        expected = {
            "kv_num_blocks": rows,
            "kv_indices": partial,
            "kv_tiles": partial,
            "full_kv_num_blocks": rows,
            "full_kv_indices": full,
            "tiles": (len(self.tiles), shape.bq, -(-shape.bk // 8)),
        }
        for name, size in expected.items():
            if tuple(getattr(self, name).shape) != size:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}; accepted is {size}")
        for name, layout, length in (("layout", self.layout, self.q_len), ("k_layout", self.k_layout, self.k_len)):
            if layout is not None and layout.seq_len != length:
                raise ValueError(f"{name} has {layout.seq_len} tokens, the mask {length}")

    # ---- making one ----

    @classmethod
    def from_dense(
        cls,
        dense: Tensor,
        block_size: tuple[int, int] = (64, 64),
        *,
        order: Order = "raster",
        layout: VideoLayout | None = None,
        k_layout: VideoLayout | None = None,
    ) -> BlockMask:
        """The mask whose :meth:`to_dense` is ``dense``, bool [B|1, H|1, Sq, Sk], True where a query attends a key."""
        check_bool("dense", dense)
        shape = make_shape(dense.shape[2], dense.shape[3], block_size)
        slices, table = _blocks.from_dense(dense.flatten(0, 1), shape)
        return assemble(slices, table, dense.shape[0], shape, order, layout, k_layout)

    @classmethod
    def from_blocks(
        cls,
        blocks: Tensor,
        block_size: tuple[int, int] = (64, 64),
        q_len: int | None = None,
        k_len: int | None = None,
        *,
        max_blocks: int | None = None,
        order: Order = "raster",
        layout: VideoLayout | None = None,
        k_layout: VideoLayout | None = None,
    ) -> BlockMask:
        """Whole blocks: ``blocks`` bool [B|1, H|1, nq, nk], True where every query of a block attends every key.

        ``q_len``, ``k_len`` (default nq bq and nk bk) end inside the last block. With ``max_blocks``, a bound on the
        blocks of a row, the lists are made that wide and nothing is read from the device: for masks computed as the
        model runs. Of a row with more blocks the first ``max_blocks`` are taken."""
        check_bool("blocks", blocks)
        nq, nk = blocks.shape[2:]
        q_len, k_len = nq * block_size[0] if q_len is None else q_len, nk * block_size[1] if k_len is None else k_len
        shape = make_shape(q_len, k_len, block_size)
        if (shape.nq, shape.nk) != (nq, nk):
            raise ValueError(
                f"blocks has {nq}x{nk} blocks; q_len={q_len} and k_len={k_len} in blocks of {block_size} "
                f"make {shape.nq}x{shape.nk}"
            )
        if max_blocks is not None:
            if max_blocks < 1:
                raise ValueError(f"max_blocks={max_blocks}: accepted is None, or 1 or more")
            lists = _lists.whole_blocks(blocks, shape, min(max_blocks, nk))
            return cls(*lists, (shape.bq, shape.bk), q_len, k_len, order, layout, k_layout)
        slices, table = _blocks.from_whole(blocks.flatten(0, 1), shape)
        return assemble(slices, table, blocks.shape[0], shape, order, layout, k_layout)

    @classmethod
    def from_flex(cls, mask: Any) -> BlockMask:
        """From a FlexAttention ``BlockMask``: its predicate is evaluated on its partial blocks, and only there."""
        from hhattn.masks import _convert

        return _convert.from_flex(mask)

    @classmethod
    def cat(cls, masks: Sequence[BlockMask], dim: str = "head") -> BlockMask:
        """Masks side by side: a pattern for each head, ``dim="head"``, or for each batch entry, ``dim="batch"``. Along
        the other of the two each has the same size, or 1. They share one table of tiles.

        >>> BlockMask.cat([masks.radial(layout)] * 2 + [masks.spatial(layout), masks.temporal(layout)])  # 4 heads

        Raises ValueError for no masks, another ``dim``, or masks that differ in size, block size, order or device."""
        if dim not in ("batch", "head") or not masks:
            raise ValueError(f'{len(masks)} masks, dim={dim!r}: accepted are one or more, and "batch" or "head"')
        first, axis = masks[0], ("batch", "head").index(dim)
        for other in masks[1:]:
            first._check_alike(other)
        sizes = [list(m.kv_num_blocks.shape[:2]) for m in masks]
        across = max(size[1 - axis] for size in sizes)
        for m, size in zip(masks, sizes, strict=True):
            if size[1 - axis] not in (1, across):
                raise ValueError(f"dim={dim!r}: along the other dim masks have {across} and {size[1 - axis]}: {m}")
            size[1 - axis] = across
        slices, table = _blocks.share([(m._slices(size), m.tiles) for m, size in zip(masks, sizes, strict=True)])
        rows, batch = [slices[i] for i in _algebra.beside(sizes, axis)], across if axis else sum(s[0] for s in sizes)
        return assemble(rows, table, batch, first._shape, first.order, first.layout, first.k_layout)

    # ---- other forms ----

    def to_dense(self, order: Order | None = None) -> Tensor:
        """bool [Bm, Hm, q_len, k_len], in ``order`` (default: the mask's own). For tests and small masks."""
        dense = torch.stack([_blocks.to_dense(s, self.tiles, self._shape) for s in self._slices()])
        dense = dense.unflatten(0, self.kv_num_blocks.shape[:2])
        if order is None or check_order("order", order) == self.order:
            return dense
        q_layout, k_layout = self.layouts()
        if order == "tile":
            return k_layout.to_tiles(q_layout.to_tiles(dense, 2), 3)
        return k_layout.from_tiles(q_layout.from_tiles(dense, 2), 3)

    def to_flex(self) -> Any:
        """The same mask as a ``torch.nn.attention.flex_attention.BlockMask``, for tokens in the mask's order."""
        from hhattn.masks import _convert

        return _convert.to_flex(self)

    def to_bsr(self, batch: int = 0, head: int = 0) -> Bsr:
        """One batch entry and head as block-sparse rows, as flashinfer's ``BlockSparseAttentionWrapper.plan`` takes
        them: (indptr [nq + 1] int32, indices [nnz] int32, mask [nnz, bq, bk] bool)."""
        from hhattn.masks import _convert

        return _convert.to_bsr(self, batch, head)

    def to_fa4(self) -> Fa4:
        """The lists as FlashAttention 4 takes them, with what a ``mask_mod`` for partial blocks looks up."""
        from hhattn.masks import _convert

        return _convert.to_fa4(self)

    def to_block_map(self, partial: str | None = None) -> Tensor:
        """bool [Bm, Hm, nq, nk], the blocks attended in whole, as SpargeAttn takes them (``mask_id``). Partial blocks
        that attend all their real pairs are whole; others are refused, or taken for ``partial``, "full" or "empty"."""
        from hhattn.masks import _convert

        return _convert.to_block_map(self, partial)

    def to(self, device: torch.device | str) -> BlockMask:
        """The same mask on ``device``."""
        moved: dict[str, Any] = {n: t.to(device) for n, t in vars(self).items() if isinstance(t, Tensor)}
        return replace(self, **moved, _q_lists=None)

    def q_lists(self) -> QLists:
        """The blocks by key block, derived on the mask's device at the first call, without a host sync."""
        if self._q_lists is None:
            offsets, indices, tiles = by_column(self.kv_num_blocks, self.kv_indices, self.num_blocks[1], self.kv_tiles)
            full_offsets, full_indices, _ = by_column(
                self.full_kv_num_blocks, self.full_kv_indices, self.num_blocks[1], self.full_kv_indices
            )
            self._q_lists = QLists(offsets, indices, tiles, full_offsets, full_indices)
        return self._q_lists

    def plot(self, batch: int = 0, head: int = 0, ax: Any = None) -> Any:
        """Draw the share of attended pairs of every block with matplotlib; returns the axes."""
        from hhattn.masks import _draw

        return _draw.plot(self, batch, head, ax)

    # ---- algebra ----

    def __and__(self, other: BlockMask) -> BlockMask:
        """Pairs in both masks."""
        return self._combine(other, _algebra.intersection, torch.bitwise_and)

    def __or__(self, other: BlockMask) -> BlockMask:
        """Pairs in either mask."""
        return self._combine(other, _algebra.union, torch.bitwise_or)

    def __invert__(self) -> BlockMask:
        """Pairs that aren't in this mask."""
        shape = self._shape
        empty = self.tiles.new_zeros(1, *self.tiles.shape[1:])
        left = torch.cat([self.tiles, empty])
        pairs = [_algebra.complement(s, shape) for s in self._slices()]
        pairs = [p._replace(left=p.left.where(p.left >= 0, len(self.tiles))) for p in pairs]
        slices, table = _blocks.settle(pairs, left, shape.edge(self.device)[1], lambda a, b: ~a & b, shape)
        return assemble(slices, table, len(self.kv_num_blocks), shape, self.order, self.layout, self.k_layout)

    def _combine(
        self, other: BlockMask, blocks: Callable[[Blocks, Blocks], Pairs], bits: Callable[[Tensor, Tensor], Tensor]
    ) -> BlockMask:
        if not isinstance(other, BlockMask):
            return NotImplemented
        self._check_alike(other)
        size = torch.broadcast_shapes(self.kv_num_blocks.shape[:2], other.kv_num_blocks.shape[:2])
        table = torch.cat([self.tiles, other.tiles])
        ours, theirs = self._slices(size), other._slices(size)
        pairs = [blocks(a, b._replace(tile=b.tile + len(self.tiles))) for a, b in zip(ours, theirs, strict=True)]
        slices, table = _blocks.settle(pairs, table, table, bits, self._shape)
        layout, k_layout = self.layout or other.layout, self.k_layout or other.k_layout
        return assemble(slices, table, size[0], self._shape, self.order, layout, k_layout)

    def _check_alike(self, other: BlockMask) -> None:
        for name in ("q_len", "k_len", "block_size", "order", "device"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(f"masks differ in {name}: {getattr(self, name)} and {getattr(other, name)}")
        for name in ("layout", "k_layout"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if not same_tokens(ours, theirs, self.order):
                raise ValueError(f"masks differ in {name}, and so in what their tokens are: {ours} and {theirs}")

    # ---- figures ----

    @property
    def device(self) -> torch.device:
        """Where the lists are."""
        return self.kv_num_blocks.device

    @property
    def num_blocks(self) -> tuple[int, int]:
        """(nq, nk): query blocks and key blocks."""
        return (self._shape.nq, self._shape.nk)

    @property
    def nbytes(self) -> int:
        """Bytes of the lists and the table."""
        return sum(t.nbytes for t in vars(self).values() if isinstance(t, Tensor))

    @property
    def density(self) -> float:
        """Share of the q_len x k_len token pairs that are attended, averaged over batch and heads."""
        return self._pairs() / (self.kv_num_blocks[..., 0].numel() * self.q_len * self.k_len)

    @property
    def block_density(self) -> float:
        """Share of the blocks that are touched, full or partial: what a kernel executes."""
        return self._touched() / (self.kv_num_blocks.numel() * self.num_blocks[1])

    def flops(
        self,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        batch: int = 1,
        heads: int = 1,
        backward: bool = False,
        executed: bool = False,
    ) -> int:
        """Floating point operations of attention under this mask, for ``batch`` sequences of ``heads`` query heads.

        A token pair costs ``2 (D + Dv)`` forward and ``2 (3 D + 2 Dv)`` backward (scores are computed again). Pairs are
        those attended; with ``executed=True`` all bq x bk of every touched block, which is what kernels compute."""
        pairs = self._touched() * self.block_size[0] * self.block_size[1] if executed else self._pairs()
        v_head_dim = head_dim if v_head_dim is None else v_head_dim
        each = 2 * (3 * head_dim + 2 * v_head_dim) if backward else 2 * (head_dim + v_head_dim)
        return pairs * each * batch * heads // self.kv_num_blocks[..., 0].numel()

    def layouts(self) -> tuple[VideoLayout, VideoLayout]:
        """Layouts of queries and keys, or ValueError where the mask was made without one."""
        q_layout = self.layout
        k_layout = self.k_layout or (self.layout if self.k_len == self.q_len else None)
        if q_layout is None or k_layout is None:
            raise ValueError(f"this mask's tokens are in {self.order} order and it has no layout to convert them with")
        return q_layout, k_layout

    def __repr__(self) -> str:
        bm, hm, nq = self.kv_num_blocks.shape
        return (
            f"BlockMask({self.q_len}x{self.k_len} tokens in {nq}x{self.num_blocks[1]} blocks of {self.block_size}, "
            f"batch {bm}, heads {hm}, {self.order} order, {len(self.tiles)} bit tiles, {self.nbytes / 2**20:.1f} MiB)"
        )

    @property
    def _shape(self) -> Shape:
        return make_shape(self.q_len, self.k_len, self.block_size)

    def _touched(self) -> int:
        return int(self.kv_num_blocks.sum() + self.full_kv_num_blocks.sum())

    def _pairs(self) -> int:
        bits = torch.cat([_bits.popcount(self.tiles), self.tiles.new_zeros(1, dtype=torch.int64)])
        beyond = torch.arange(self.kv_tiles.shape[-1], device=self.device) >= self.kv_num_blocks[..., None]
        full = self.full_kv_num_blocks.sum() * self.block_size[0] * self.block_size[1]
        return int(bits[self.kv_tiles.long().masked_fill(beyond, -1)].sum() + full)

    def _slice(self, batch: int, head: int) -> Blocks:
        """The blocks of one batch entry and head; what the mask has one of serves all."""
        sizes = self.kv_num_blocks.shape[:2]
        for name, at, size in (("batch", batch, sizes[0]), ("head", head, sizes[1])):
            if at < 0 or (at >= size and size > 1):
                raise ValueError(f"{name}={at}: accepted are 0 ... {size - 1}")
        return self._slices()[min(batch, sizes[0] - 1) * sizes[1] + min(head, sizes[1] - 1)]

    def _slices(self, size: Sequence[int] | None = None) -> list[Blocks]:
        """Blocks in coordinates of every (batch, head) of ``size``, which the mask broadcasts to."""
        lists = (self.kv_num_blocks, self.kv_indices, self.kv_tiles, self.full_kv_num_blocks, self.full_kv_indices)
        batch, heads = self.kv_num_blocks.shape[:2]
        made = [[_blocks.from_lists([x[b, h] for x in lists], self._shape) for h in range(heads)] for b in range(batch)]
        size = size or (batch, heads)
        return [made[b % batch][h % heads] for b in range(size[0]) for h in range(size[1])]


def same_tokens(ours: VideoLayout | None, theirs: VideoLayout | None, order: str) -> bool:
    """Whether a token's place means the same in both layouts, as far as they are known: tiles matter in tile order."""
    if ours is None or theirs is None:
        return True
    if (ours.grid, ours.text_len, ours.text_first) != (theirs.grid, theirs.text_len, theirs.text_first):
        return False
    return order == "raster" or ours.tile == theirs.tile


def assemble(
    slices: Sequence[Blocks],
    table: Tensor,
    batch: int,
    shape: Shape,
    order: str,
    layout: VideoLayout | None = None,
    k_layout: VideoLayout | None = None,
) -> BlockMask:
    """The mask of ``slices``, one for each (batch, head), heads running fastest."""
    lists = [(*_blocks.partial_lists(s, shape), *_blocks.to_lists(s.full)) for s in slices]
    return stack(lists, table, batch, shape, order, layout, k_layout)


def stack(
    lists: Sequence[_blocks.Lists],
    table: Tensor,
    batch: int,
    shape: Shape,
    order: str,
    layout: VideoLayout | None = None,
    k_layout: VideoLayout | None = None,
) -> BlockMask:
    """The mask of these lists, one for each (batch, head), heads running fastest."""

    def stacked(rows: Sequence[Tensor]) -> Tensor:
        if len(rows) == 1:
            return rows[0][None, None]  # a dense minute's lists take 45 MB, once
        width = max(r.shape[-1] for r in rows) if rows[0].ndim == 2 else 0
        same = [torch.nn.functional.pad(r, (0, width - r.shape[-1])) if r.ndim == 2 else r for r in rows]
        return torch.stack(same).unflatten(0, (batch, -1))

    size = (shape.bq, shape.bk)
    counts, columns, tiles, full_counts, full_columns = (stacked(rows) for rows in zip(*lists, strict=True))
    partial, full = (counts, columns, tiles), (full_counts, full_columns)
    return BlockMask(*partial, *full, table, size, shape.q_len, shape.k_len, order, layout, k_layout)
