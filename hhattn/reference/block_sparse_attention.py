"""Block-sparse softmax attention in plain PyTorch: the formula, computed for a few query blocks at a time.

For query i, over the keys j that the mask lets it attend::

    s_ij = scale · q_i·k_j      lse_i = log Σ_j exp(s_ij)      p_ij = exp(s_ij - lse_i)      out_i = Σ_j p_ij v_j

and backward, with o = out_i, do = ∂L/∂out_i, dl = ∂L/∂lse_i::

    ds_ij = p_ij (do_i·v_j - do_i·o_i + dl_i)
    dq_i = scale Σ_j ds_ij k_j      dk_j = scale Σ_i ds_ij q_i      dv_j = Σ_i p_ij do_i

Only touched blocks are computed. Query blocks with about as many key blocks are taken together: their keys are
gathered, and two batched matrix products with a running softmax between them do the rest. Scores in flight are
bounded by :data:`SCORES`, whatever the length; nothing is expanded over heads that share a mask, nor keys over the
heads of a group.

Scores are kept times log2(e) and raised from base 2, the exponential that torch computes fastest on a CPU. Masked
scores are overwritten by bitwise operations, ten times faster there than a conditional store.

A masked pair has weight exactly 0 and never meets what stands at the other end: infinities and NaNs are taken out of
every product that such a pair is part of, and put back where the weight isn't 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
SCORES = 1 << 20  # scores computed at once: enough work for a matrix product, few enough for the cache
_PADDING = 8  # lists of up to n blocks are padded by n / 8 at most


class Lists(NamedTuple):
    """The tensors of a :class:`hhattn.BlockMask`."""

    kv_num_blocks: Tensor
    kv_indices: Tensor
    kv_tiles: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    tiles: Tensor


class _Chunk(NamedTuple):
    """Query blocks ``rows`` [G] and the key blocks ``columns`` [G, n] that they meet in one step. Of the first m keys,
    ``kept`` [G, bq, m] says which pairs are attended: all bits set, or 0 where masked; integers as wide as a score."""

    rows: Tensor
    columns: Tensor
    kept: Tensor | None


class _Head(NamedTuple):
    """Where in [B, H_kv, ..., rep] the heads are that share one entry of the mask."""

    batch: slice
    kv: slice
    rep: slice
    lists: Lists


def forward(q: Tensor, k: Tensor, v: Tensor, lists: Lists, bk: int, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, Sq, H, D], k [B, Sk, H_kv, D], v [B, Sk, H_kv, Dv] -> (out [B, Sq, H, Dv], lse [B, H, Sq])."""
    bq, nq = lists.tiles.shape[1], lists.kv_num_blocks.shape[2]
    qs, ks, vs = _query_blocks(q, k.shape[2], bq) * (scale * LOG2_E), _key_blocks(k, bk), _key_blocks(v, bk)
    out = qs.new_zeros(*qs.shape[:-1], v.shape[-1])
    lse = qs.new_empty(qs.shape[:-1])
    product = _product(vs)
    for head in _heads(lists, q.shape[0], qs.shape[3], k.shape[2]):
        at, here = (head.batch, head.kv), (head.batch, head.kv, slice(None), head.rep)
        query, key, value = _join(qs[here]), ks[at].flatten(0, 1), vs[at].flatten(0, 1)
        o, total, top = query.new_zeros(*query.shape[:-1], v.shape[-1]), *_running(query)
        for chunk in _chunks(head.lists, query, bk):
            s = _scores(query, key, chunk)
            before = top[:, chunk.rows]
            now = torch.maximum(before, s.amax(-1))
            shift = now.masked_fill(now == -math.inf, 0)
            p = s.sub_(shift[..., None]).exp2_()
            keep = (before - shift).exp2()
            total[:, chunk.rows] = total[:, chunk.rows] * keep + p.sum(-1)
            o[:, chunk.rows] = o[:, chunk.rows] * keep[..., None] + product(p, _gather(value, chunk.columns))
            top[:, chunk.rows] = now
        empty = top == -math.inf
        o.div_(total.masked_fill(empty, 1)[..., None])
        out[here] = o.view_as(out[here])
        lse[here] = ((top + total.log2()) / LOG2_E).masked_fill(empty, -math.inf).view_as(lse[here])
    lse = lse.permute(0, 1, 3, 2, 4).reshape(q.shape[0], q.shape[2], nq * bq)[..., : q.shape[1]]
    return _from_query_blocks(out, q.shape[1]).to(q.dtype).contiguous(), lse.contiguous()


def backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lists: Lists,
    bk: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Scores are computed again, block by block, from ``lse``; sums run in a fixed order."""
    bq = lists.tiles.shape[1]
    n_kv = k.shape[2]
    qs, ks, vs = _query_blocks(q, n_kv, bq) * (scale * LOG2_E), _key_blocks(k, bk), _key_blocks(v, bk)
    douts = _query_blocks(dout, n_kv, bq)
    delta = _query_blocks((dout.to(qs.dtype) * out).sum(-1, keepdim=True) - dlse.transpose(1, 2)[..., None], n_kv, bq)
    lses = _query_blocks(lse.masked_fill(lse == -math.inf, 0).transpose(1, 2)[..., None] * LOG2_E, n_kv, bq)
    dq, dk, dv = torch.zeros_like(qs), torch.zeros_like(ks), torch.zeros_like(vs)
    finite_qs, finite_ks, finite_vs, product = _finite(qs), _finite(ks), _finite(vs), _product(douts)
    for head in _heads(lists, q.shape[0], qs.shape[3], n_kv):
        at, here = (head.batch, head.kv), (head.batch, head.kv, slice(None), head.rep)
        query, finite_query, grad, row_delta, row_lse = (_join(x[here]) for x in (qs, finite_qs, douts, delta, lses))
        key, finite_key, value = (x[at].flatten(0, 1) for x in (ks, finite_ks, finite_vs))
        dquery, dkey, dvalue = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for chunk in _chunks(head.lists, query, bk):
            rows, columns = chunk.rows, chunk.columns
            p = _scores(query, key, chunk).sub_(row_lse[:, rows]).exp2_()
            do = grad[:, rows]
            _add_blocks(dvalue, columns, product(p.transpose(-1, -2), do))
            ds = (do @ _gather(value, columns).transpose(-1, -2)).sub_(row_delta[:, rows]).mul_(p)
            _mask(ds, chunk, 0)
            dquery[:, rows] += ds @ _gather(finite_key, columns)
            _add_blocks(dkey, columns, ds.transpose(-1, -2) @ finite_query[:, rows])
        dq[here] = dquery.view_as(dq[here])
        dk[at] += dkey.div_(LOG2_E).view_as(dk[at])
        dv[at] += dvalue.view_as(dv[at])
    dq = _from_query_blocks(dq.mul_(scale), q.shape[1])
    dk, dv = (x.flatten(2, 3)[:, :, : k.shape[1]].transpose(1, 2) for x in (dk, dv))
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


# ---- layout ----


def _wide(x: Tensor) -> Tensor:
    """In the dtype that is computed in."""
    return x if x.dtype == torch.float64 else x.float()


def _query_blocks(x: Tensor, n_kv: int, bq: int) -> Tensor:
    """[B, Sq, H, D] -> [B, H_kv, nq, rep, bq, D], zeros beyond Sq."""
    x = torch.nn.functional.pad(_wide(x), (0, 0, 0, 0, 0, -x.shape[1] % bq))
    return x.unflatten(1, (-1, bq)).unflatten(3, (n_kv, -1)).permute(0, 3, 1, 4, 2, 5).contiguous()


def _from_query_blocks(x: Tensor, q_len: int) -> Tensor:
    """The inverse of :func:`_query_blocks`."""
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3, 4).flatten(1, 2)[:, :q_len]


def _key_blocks(x: Tensor, bk: int) -> Tensor:
    """[B, Sk, H_kv, D] -> [B, H_kv, nk, bk, D], zeros beyond Sk."""
    x = torch.nn.functional.pad(_wide(x), (0, 0, 0, 0, 0, -x.shape[1] % bk))
    return x.unflatten(1, (-1, bk)).permute(0, 3, 1, 2, 4).contiguous()


def _join(x: Tensor) -> Tensor:
    """[B, H_kv, nq, rep, bq, D] -> [B H_kv, nq, rep bq, D]: heads of a group are more rows of the same product."""
    return x.flatten(3, 4).flatten(0, 1)


def _running(query: Tensor) -> tuple[Tensor, Tensor]:
    """The sum and the largest score so far, of no scores."""
    return query.new_zeros(query.shape[:-1]), query.new_full(query.shape[:-1], -math.inf)


def _gather(x: Tensor, columns: Tensor) -> Tensor:
    """[N, nk, bk, D] -> [N, G, n bk, D]."""
    return x.index_select(1, columns.reshape(-1)).view(x.shape[0], len(columns), -1, x.shape[-1])


def _add_blocks(total: Tensor, columns: Tensor, x: Tensor) -> None:
    """``total[:, columns] += x``, the inverse of :func:`_gather`, in an order that is the same every time."""
    x = x.view(total.shape[0], columns.numel(), *total.shape[2:])
    if total.device.type == "cpu":
        total.index_add_(1, columns.reshape(-1), x)
    else:  # here index_add_ adds atomically, in any order; this sorts first
        total.transpose(0, 1).index_put_((columns.reshape(-1),), x.transpose(0, 1), accumulate=True)


# ---- scores ----


def _scores(query: Tensor, key: Tensor, chunk: _Chunk) -> Tensor:
    """[N, G, rep bq, n bk], -inf where masked."""
    s = query[:, chunk.rows] @ _gather(key, chunk.columns).transpose(-1, -2)
    _mask(s, chunk, -math.inf)
    return s


def _mask(x: Tensor, chunk: _Chunk, value: float) -> None:
    """Write ``value`` over the masked pairs of ``x`` [N, G, rep bq, n bk], whatever is there."""
    if chunk.kept is None:
        return
    bq, m = chunk.kept.shape[1:]
    words = x.view(chunk.kept.dtype).unflatten(2, (-1, bq))[..., :m]
    words.bitwise_and_(chunk.kept[:, None])
    if value != 0:
        word = torch.tensor(value, dtype=x.dtype, device="cpu").view(chunk.kept.dtype).item()
        words.bitwise_or_((~chunk.kept & word)[:, None])


def _finite(x: Tensor) -> Tensor:
    """``x`` with 0 for what isn't finite."""
    return x if x.isfinite().all() else x.nan_to_num(0, 0, 0)


def _product(x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The matrix product for right-hand sides taken from ``x``: the usual one if all of it is finite."""
    return torch.matmul if x.isfinite().all() else _product_past_zeros


def _product_past_zeros(weights: Tensor, x: Tensor) -> Tensor:
    """``weights @ x`` with 0 · inf = 0 · nan = 0, for weights ≥ 0."""
    result = weights @ x.nan_to_num(0, 0, 0)
    used = (weights != 0).to(x.dtype)
    for value, found in ((math.inf, x == math.inf), (-math.inf, x == -math.inf), (math.nan, x.isnan())):
        met = (used @ found.to(x.dtype)) > 0
        result += torch.zeros_like(result).masked_fill_(met, value)
    return result


# ---- which blocks ----


def _heads(lists: Lists, batch: int, rep: int, n_kv: int) -> Iterator[_Head]:
    """One item for each batch entry and head of the mask; a mask for all of them comes once."""
    masks, heads = lists.kv_num_blocks.shape[:2]
    # beyond the table: a tile of zeros, for padding, and one of ones, for full blocks that a neighbour's bits cover
    ends = lists.tiles.new_tensor([0, 255])[:, None, None].expand(-1, *lists.tiles.shape[1:])
    tiles = torch.cat([lists.tiles, ends])
    for b in range(masks):
        for h in range(heads):
            yield _Head(
                slice(b, b + 1) if masks > 1 else slice(0, batch),
                slice(h // rep, h // rep + 1) if heads > 1 else slice(0, n_kv),
                slice(h % rep, h % rep + 1) if heads > 1 else slice(0, rep),
                lists._replace(tiles=tiles, **{name: getattr(lists, name)[b, h] for name in Lists._fields[:5]}),
            )


def _chunks(lists: Lists, query: Tensor, bk: int) -> Iterator[_Chunk]:
    """Cut one entry of the mask into steps, for ``query`` [N, nq, rep bq, D]: query blocks by length of their lists, as
    many together as :data:`SCORES` allows, shorter lists padded to the longest one. Reads the lengths on the host."""
    lengths, rows = (lists.kv_num_blocks + lists.full_kv_num_blocks).sort(descending=True, stable=True)
    limit = max(1, SCORES // (query.shape[0] * query.shape[2] * bk))
    word = torch.int64 if query.dtype == torch.float64 else torch.int32
    left = [n for n in lengths.tolist() if n]
    while left:
        width = left[0]
        least = width - max(1, width // _PADDING)
        count = sum(n >= least for n in left[: max(1, limit // width)])
        yield from _steps(lists, rows[:count], width, limit, bk, word)
        rows, left = rows[count:], left[count:]


def _steps(lists: Lists, rows: Tensor, width: int, limit: int, bk: int, word: torch.dtype) -> Iterator[_Chunk]:
    """``rows`` with lists of at most ``width`` key blocks, ``limit`` of them at a time. Each list is written as
    padding, partial blocks, full blocks; so bits are needed for its beginning only."""
    zeros, ones, n_partial = len(lists.tiles) - 2, len(lists.tiles) - 1, lists.kv_indices.shape[1]
    partial, full = lists.kv_num_blocks[rows, None], lists.full_kv_num_blocks[rows, None]
    place = torch.arange(width, device=rows.device) - (width - partial - full)
    entry = torch.where(place < partial, place, place - partial + n_partial).clamp(min=0)
    columns = torch.cat([lists.kv_indices[rows], lists.full_kv_indices[rows]], 1).gather(1, entry)
    tiles = torch.nn.functional.pad(lists.kv_tiles[rows], (0, lists.full_kv_indices.shape[1]), value=ones)
    tiles = tiles.gather(1, entry).masked_fill(place < 0, zeros)
    columns = columns.masked_fill(place < 0, 0)
    with_bits = width - int(full.min())
    for start in range(0, width, limit):
        bits = tiles[:, start : min(start + limit, with_bits)]
        kept = _words(lists.tiles[bits], bk, word) if bits.shape[1] else None
        yield _Chunk(rows, columns[:, start : start + limit], kept)


def _words(tiles: Tensor, bk: int, word: torch.dtype) -> Tensor:
    """Bit tiles [G, m, bq, bk / 8] -> [G, bq, m bk] words, -1 (all bits set) for a 1 and 0 for a 0."""
    shifts = torch.arange(8, device=tiles.device)
    of_byte = -(torch.arange(256, device=tiles.device)[:, None] >> shifts & 1).to(word)
    words = torch.nn.functional.embedding(tiles.transpose(1, 2).int(), of_byte)
    return words.flatten(-2)[..., :bk].flatten(-2)
