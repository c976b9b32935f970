"""Masks to and from other libraries' forms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex

from hhattn.masks import _bits, _blocks
from hhattn.masks._blocks import Blocks
from hhattn.masks.block_mask import BlockMask, assemble, make_shape


class Bsr(NamedTuple):
    """Block-sparse rows: key blocks of query block i are ``indices[indptr[i] : indptr[i + 1]]``, ascending.

    indptr: [nq + 1] int32; indices: [nnz] int32; mask: [nnz, bq, bk] bool, the pairs attended in each block.
    """

    indptr: Tensor
    indices: Tensor
    mask: Tensor


def to_bsr(mask: BlockMask, batch: int, head: int) -> Bsr:
    """See :meth:`BlockMask.to_bsr`."""
    blocks = mask._slice(batch, head)
    nq, nk = mask.num_blocks
    full = blocks.full.view(-1).nonzero().squeeze(1)
    key, order = torch.cat([full, blocks.partial]).sort()
    whole = torch.ones(len(full), *mask.block_size, dtype=torch.bool, device=mask.device)
    bits = torch.cat([whole, _bits.unpack(mask.tiles[blocks.tile], mask.block_size[1])])[order]
    edges = torch.arange(nq + 1, device=mask.device) * nk
    return Bsr(torch.searchsorted(key, edges, out_int32=True), (key % nk).int(), bits)


class Fa4(NamedTuple):
    """What ``flash_attn.cute`` takes: all but the last are fields of the same names of its ``BlockSparseTensorsTorch``;
    ``aux_tensors`` is for a ``mask_mod``, without which it can't tell the pairs of a partial block apart.

    mask_block_cnt, full_block_cnt: [Bm, Hm, nq] int32; mask_block_idx, full_block_idx: [Bm, Hm, nq, nk] int32.
    block_size: (bq, bk); its kernels want multiples of their own tiles.
    aux_tensors: (codes [Bm, Hm, nq, nk] int32, 0 for an empty block, 1 for a full one and 2 + i for tile i;
        tiles [T + 1, bq, ceil(bk / 8)] uint8, of which the last is empty).
    """

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]
    aux_tensors: tuple[Tensor, Tensor]


def to_fa4(mask: BlockMask) -> Fa4:
    """See :meth:`BlockMask.to_fa4`."""
    columns, full_columns = (_wide(x, mask.num_blocks[1]) for x in (mask.kv_indices, mask.full_kv_indices))
    return Fa4(mask.kv_num_blocks, columns, mask.full_kv_num_blocks, full_columns, mask.block_size, _look_up(mask))


def to_block_map(mask: BlockMask, partial: str | None) -> Tensor:
    """See :meth:`BlockMask.to_block_map`."""
    if partial not in (None, "full", "empty"):
        raise ValueError(f'partial={partial!r}: accepted are None, which refuses partial blocks, "full" and "empty"')
    kind, edges = mask._shape.edge(mask.device)
    whole = _bits.popcount(edges)[kind.view(-1)]
    bits = _bits.popcount(mask.tiles)
    maps = []
    for blocks in mask._slices():
        attended = blocks.full.clone()
        keep = bits[blocks.tile] == whole[blocks.partial]
        if partial is None and not keep.all():
            raise ValueError(
                f"mask has {int((~keep).sum())} blocks in which some pairs are attended and some not; a map of blocks "
                f'can not say which: accepted are masks of whole blocks, or partial="full" or "empty"'
            )
        attended.view(-1)[blocks.partial] = True if partial == "full" else keep
        maps.append(attended)
    return torch.stack(maps).unflatten(0, mask.kv_num_blocks.shape[:2])


def _look_up(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """``aux_tensors`` of :class:`Fa4`. One tile more than there are, so that there is always one to look at."""
    codes = torch.stack([_codes(s) for s in mask._slices()]).unflatten(0, mask.kv_num_blocks.shape[:2])
    return codes, torch.cat([mask.tiles, mask.tiles.new_zeros(1, *mask.tiles.shape[1:])])


def _wide(columns: Tensor, nk: int) -> Tensor:
    """Lists with room for every key block, as other libraries want them."""
    return torch.nn.functional.pad(columns, (0, nk - columns.shape[-1])).contiguous()


def to_flex(mask: BlockMask) -> flex.BlockMask:
    """See :meth:`BlockMask.to_flex`. The predicate looks the pair up: block number, then bit."""
    (bq, bk), nk = mask.block_size, mask.num_blocks[1]
    batch, heads = mask.kv_num_blocks.shape[:2]
    codes, tiles = _look_up(mask)

    def attends(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        code = codes[b * (batch > 1), h * (heads > 1), q // bq, k // bk]
        byte = tiles[(code - 2).clamp(min=0), q % bq, (k % bk) // 8]
        return (code == 1) | ((code > 1) & (((byte >> (k % bk % 8)) & 1) == 1))

    return flex.BlockMask.from_kv_blocks(
        mask.kv_num_blocks,
        _wide(mask.kv_indices, nk),
        mask.full_kv_num_blocks,
        _wide(mask.full_kv_indices, nk),
        BLOCK_SIZE=mask.block_size,
        mask_mod=attends,
        seq_lengths=(mask.q_len, mask.k_len),
    )


def _codes(blocks: Blocks) -> Tensor:
    codes = blocks.full.int()
    codes.view(-1)[blocks.partial] = blocks.tile.int() + 2
    return codes


def from_flex(mask: Any) -> BlockMask:
    """See :meth:`BlockMask.from_flex`."""
    if not isinstance(mask, flex.BlockMask):
        raise TypeError(f"mask is a {type(mask).__name__}; accepted is torch.nn.attention.flex_attention.BlockMask")
    shape = make_shape(*mask.seq_lengths, mask.BLOCK_SIZE)
    kind, edges = shape.edge(mask.kv_num_blocks.device)
    slices, tables, start = [], [edges], len(edges)
    batch, heads = mask.kv_num_blocks.shape[:2]
    for b, h in ((b, h) for b in range(batch) for h in range(heads)):
        partial = _listed(mask.kv_num_blocks[b, h], mask.kv_indices[b, h], shape.nk)
        full = torch.zeros_like(partial)
        if mask.full_kv_num_blocks is not None and mask.full_kv_indices is not None:
            full = _listed(mask.full_kv_num_blocks[b, h], mask.full_kv_indices[b, h], shape.nk)
        ragged = (full & (kind > 0)).view(-1).nonzero().squeeze(1)
        key = partial.view(-1).nonzero().squeeze(1)
        bits = _evaluate(mask.mask_mod, b, h, key, shape) & edges[kind.view(-1)[key]]
        tile = torch.cat([kind.view(-1)[ragged], torch.arange(len(key), device=key.device) + start])
        slices.append(Blocks(full & (kind == 0), torch.cat([ragged, key]), tile))
        tables.append(bits)
        start += len(bits)
    slices, table = _blocks.classify(slices, torch.cat(tables), shape)
    return assemble(slices, table, batch, shape, "raster")


def _listed(counts: Tensor, columns: Tensor, nk: int) -> Tensor:
    """[nq, nk] bool of padded lists."""
    beyond = torch.arange(columns.shape[-1], device=columns.device) >= counts[:, None]
    listed = torch.zeros(len(counts), nk + 1, dtype=torch.bool, device=columns.device)
    return listed.scatter_(1, columns.long().masked_fill(beyond, nk), True)[:, :-1].contiguous()


def _evaluate(mask_mod: Any, b: int, h: int, key: Tensor, shape: _blocks.Shape) -> Tensor:
    """Bits of the predicate on the blocks ``key``. Positions are clamped to the ends: a predicate may index tables."""
    on_block = torch.vmap(
        torch.vmap(torch.vmap(mask_mod, (None, None, None, 0)), (None, None, 0, None)), (None, None, 0, 0)
    )
    at = (torch.tensor(b, device=key.device), torch.tensor(h, device=key.device))
    tiles = [_blocks.empty_table(shape, key.device)]
    for part in key.split(max(1, (1 << 22) // (shape.bq * shape.bk))) if len(key) else ():
        q = (part // shape.nk)[:, None] * shape.bq + torch.arange(shape.bq, device=key.device)
        k = (part % shape.nk)[:, None] * shape.bk + torch.arange(shape.bk, device=key.device)
        tiles.append(_bits.pack(on_block(*at, q.clamp(max=shape.q_len - 1), k.clamp(max=shape.k_len - 1))))
    return torch.cat(tiles)
