"""Linear attention over the pairs that a mask holds, in plain PyTorch: the marginal branch of sparse-linear attention.

For query i, over the keys j that are marginal to it, with features φ(q), φ(k) that are not negative::

    w_ij = φ(q_i)·φ(k_j)      den_i = Σ_j w_ij + eps      out_i = Σ_j w_ij v_j / den_i

and backward, with do = ∂L/∂out_i, u_i = do / den_i and e_i = -(do·out_i) / den_i::

    dw_ij = u_i·v_j + e_i
    dφ(q_i) = Σ_j dw_ij φ(k_j)      dφ(k_j) = Σ_i dw_ij φ(q_i)      dv_j = Σ_i w_ij u_i

Weights are computed block by block, so the cost is that of the pairs, as in softmax attention: this is the oracle, and
what runs where no kernel does. (Kernels know that Σ_j φ(k_j) v_jᵀ over a block's keys is the same for every query.) How
blocks are walked, and what happens at masked pairs, is as in :mod:`hhattn.reference.block_sparse_attention`.

A query without weights, because it has no marginal keys or all its weights are 0, has out 0 and den inf, so that
nothing comes of it backward either, whatever eps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hhattn.masks.block_mask import BlockMask
from hhattn.reference import block_sparse_attention as _blocks
from hhattn.reference.block_linear_attention import FEATURE_MAPS
from hhattn.reference.block_sparse_attention import Lists


def features(x: Tensor, feature_map: str) -> Tensor:
    """φ(x), in the dtype that is computed in: float32, or float64 for float64."""
    return FEATURE_MAPS[feature_map](_blocks._wide(x))


def forward(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, lists: Lists, bk: int, complement: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """phi_q [B, Sq, H, D], phi_k [B, Sk, H_kv, D], v [B, Sk, H_kv, Dv] -> (out [B, Sq, H, Dv], den [B, H, Sq]).

    The marginal pairs are those of ``lists``, or, with ``complement``, those that aren't in them."""
    n_kv, bq = phi_k.shape[2], lists.tiles.shape[1]
    lists = _complement(lists, phi_q.shape[1], phi_k.shape[1], bk) if complement else lists
    qs, ks, vs = _blocks._query_blocks(phi_q, n_kv, bq), _blocks._key_blocks(phi_k, bk), _blocks._key_blocks(v, bk)
    out, den = qs.new_zeros(*qs.shape[:-1], v.shape[-1]), qs.new_zeros(qs.shape[:-1])
    product = _blocks._product(vs)
    for head in _blocks._heads(lists, len(qs), qs.shape[3], n_kv):
        at, here = (head.batch, head.kv), (head.batch, head.kv, slice(None), head.rep)
        query, key, value = _blocks._join(qs[here]), ks[at].flatten(0, 1), vs[at].flatten(0, 1)
        o, total = query.new_zeros(*query.shape[:-1], v.shape[-1]), query.new_zeros(query.shape[:-1])
        for chunk in _blocks._chunks(head.lists, query, bk):
            w = _weights(query, key, chunk)
            total[:, chunk.rows] += w.sum(-1)
            o[:, chunk.rows] += product(w, _blocks._gather(value, chunk.columns))
        total = total.masked_fill_(total == 0, math.inf).add_(eps)
        out[here] = o.div_(total[..., None]).view_as(out[here])
        den[here] = total.view_as(den[here])
    den = den.permute(0, 1, 3, 2, 4).reshape(*phi_q.shape[::2], -1)[..., : phi_q.shape[1]]
    return _blocks._from_query_blocks(out, phi_q.shape[1]).to(v.dtype).contiguous(), den.contiguous()


def backward(
    dout: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    out: Tensor,
    den: Tensor,
    lists: Lists,
    bk: int,
    complement: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the features and of v. Weights are computed again, block by block; sums run in a fixed order."""
    n_kv, bq = phi_k.shape[2], lists.tiles.shape[1]
    lists = _complement(lists, phi_q.shape[1], phi_k.shape[1], bk) if complement else lists
    qs, ks, vs = _blocks._query_blocks(phi_q, n_kv, bq), _blocks._key_blocks(phi_k, bk), _blocks._key_blocks(v, bk)
    upstream, divisor = _blocks._wide(dout), den.transpose(1, 2)[..., None]
    u, e = (
        _blocks._query_blocks((x / divisor).masked_fill(divisor == math.inf, 0), n_kv, bq)
        for x in (upstream, -(upstream * out).sum(-1, keepdim=True))
    )
    dq, dk, dv = torch.zeros_like(qs), torch.zeros_like(ks), torch.zeros_like(vs)
    finite_qs, finite_ks, product = _blocks._finite(qs), _blocks._finite(ks), _blocks._product(u)
    for head in _blocks._heads(lists, len(qs), qs.shape[3], n_kv):
        at, here = (head.batch, head.kv), (head.batch, head.kv, slice(None), head.rep)
        query, finite_query, grad, of_den = (_blocks._join(x[here]) for x in (qs, finite_qs, u, e))
        key, finite_key, value = (x[at].flatten(0, 1) for x in (ks, finite_ks, vs))
        dquery, dkey, dvalue = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for chunk in _blocks._chunks(head.lists, query, bk):
            rows, columns = chunk.rows, chunk.columns
            w, do = _weights(query, key, chunk), grad[:, rows]
            _blocks._add_blocks(dvalue, columns, product(w.transpose(-1, -2), do))
            dw = (do @ _blocks._gather(value, columns).transpose(-1, -2)).add_(of_den[:, rows])
            _blocks._mask(dw, chunk, 0)
            dquery[:, rows] += dw @ _blocks._gather(finite_key, columns)
            _blocks._add_blocks(dkey, columns, dw.transpose(-1, -2) @ finite_query[:, rows])
        dq[here] = dquery.view_as(dq[here])
        dk[at] += dkey.view_as(dk[at])
        dv[at] += dvalue.view_as(dv[at])
    dk, dv = (x.flatten(2, 3)[:, :, : v.shape[1]].transpose(1, 2).contiguous() for x in (dk, dv))
    return _blocks._from_query_blocks(dq, phi_q.shape[1]).contiguous(), dk, dv.to(v.dtype)


def _weights(query: Tensor, key: Tensor, chunk: _blocks._Chunk) -> Tensor:
    """w [N, G, rep bq, n bk], 0 where a pair isn't marginal."""
    w = query[:, chunk.rows] @ _blocks._gather(key, chunk.columns).transpose(-1, -2)
    _blocks._mask(w, chunk, 0)
    return w


def _complement(lists: Lists, q_len: int, k_len: int, bk: int) -> Lists:
    """The lists of every pair that isn't in ``lists``."""
    mask = ~BlockMask(*lists, (lists.tiles.shape[1], bk), q_len, k_len)
    return Lists(*(getattr(mask, name) for name in Lists._fields))
