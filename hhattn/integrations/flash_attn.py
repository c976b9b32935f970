"""flash-attn's functions, with its signatures, on machines that it doesn't run on.

``from hhattn.integrations.flash_attn import flash_attn_func`` where a program says ``from flash_attn import ...``. A
call is flash-attn's own where that is installed and takes it (CUDA, 16 bits); else attention over everything goes to
:func:`hhattn.attention`, causal and windowed attention to :func:`hhattn.block_sparse_attention` under
:func:`hhattn.masks.band`. What only flash-attn can do is refused elsewhere, never ignored.

Source of the signatures and of what they mean: flash-attn 2.8, ``flash_attn/flash_attn_interface.py``.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor

import hhattn
from hhattn.masks import BlockMask
from hhattn.ops.attention import flash_can_run

Output = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """Attention of q [B, Sq, H, D] over k, v [B, Sk, H_kv, D] -> [B, Sq, H, D].

    Args:
        softmax_scale: None is 1/√D.
        causal: query i sees keys 0 … i + Sk − Sq; a query that sees none gives 0.
        window_size: (left, right), keys before and after the query's own that it sees; -1 is no limit.
        deterministic: gradients always are, here.
        return_attn_probs: return (out, lse [B, H, Sq] float32, None) as flash-attn does without dropout.
        dropout_p, softcap, alibi_slopes: flash-attn's own; elsewhere only 0, 0 and None.

    Raises ValueError for what can't be done here.
    """
    settings: dict[str, Any] = {
        "dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal, "window_size": window_size,
        "softcap": softcap, "alibi_slopes": alibi_slopes, "deterministic": deterministic,
        "return_attn_probs": return_attn_probs,
    }  # fmt: skip
    if flash_can_run(q, k, v) is None:
        import flash_attn

        return cast(Output, flash_attn.flash_attn_func(q, k, v, **settings))
    _refuse(dropout_p, softcap, alibi_slopes)
    mask = _mask(q.shape[1], k.shape[1], causal, window_size, q.device)
    if mask is None and not return_attn_probs:
        return hhattn.attention(q, k, v, scale=softmax_scale)
    mask = mask or _band(q.shape[1], k.shape[1], None, None, q.device)
    done = hhattn.block_sparse_attention(q, k, v, mask, scale=softmax_scale, return_lse=return_attn_probs)
    return (*done, None) if isinstance(done, tuple) else done


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Output:
    """:func:`flash_attn_func` of q, k and v in one tensor [B, S, 3, H, D]."""
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; accepted is [B, S, 3, H, D]")
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *settings: Any, **named: Any) -> Output:
    """:func:`flash_attn_func` of k and v in one tensor [B, Sk, 2, H_kv, D]; what follows them is the same."""
    if kv.ndim != 5 or kv.shape[2] != 2:
        raise ValueError(f"kv has shape {tuple(kv.shape)}; accepted is [B, Sk, 2, H_kv, D]")
    k, v = kv.unbind(2)
    return flash_attn_func(q, k, v, *settings, **named)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *settings: Any, **named: Any
) -> Output:
    """:func:`flash_attn_varlen_func` of q, k and v in one tensor [total, 3, H, D], with one set of lengths."""
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; accepted is [total, 3, H, D]")
    q, k, v = qkv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *settings, **named)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *settings: Any,
    **named: Any,
) -> Output:
    """:func:`flash_attn_varlen_func` of k and v in one tensor [total_k, 2, H_kv, D]."""
    if kv.ndim != 4 or kv.shape[1] != 2:
        raise ValueError(f"kv has shape {tuple(kv.shape)}; accepted is [total_k, 2, H_kv, D]")
    k, v = kv.unbind(1)
    return flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *settings, **named)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Output:
    """:func:`flash_attn_func` of sequences laid end to end: sequence i is ``q[cu_seqlens_q[i] : cu_seqlens_q[i + 1]]``.

    q [total_q, H, D], k, v [total_k, H_kv, D], cu_seqlens [B + 1] int32 -> [total_q, H, D]; lse [H, total_q]. Where
    flash-attn doesn't run, the lengths are read on the host and sequences are attended one after another; tokens behind
    the last sequence give 0, and so do queries without keys, with an lse of -inf.
    """
    settings: dict[str, Any] = {
        "dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal, "window_size": window_size,
        "softcap": softcap, "alibi_slopes": alibi_slopes, "deterministic": deterministic,
        "return_attn_probs": return_attn_probs,
    }  # fmt: skip
    if flash_can_run(q[None], k[None], v[None]) is None:
        import flash_attn

        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return cast(Output, flash_attn.flash_attn_varlen_func(q, k, v, *lengths, **settings, block_table=block_table))
    _refuse(dropout_p, softcap, alibi_slopes)
    if block_table is not None:
        raise ValueError("block_table must be None where flash-attn doesn't run: there is no paged cache")
    q_ends, k_ends = (_ends(name, x, n) for name, x, n in _sequences(q, k, cu_seqlens_q, cu_seqlens_k))
    if len(q_ends) != len(k_ends):
        raise ValueError(f"cu_seqlens_q has {len(q_ends) - 1} sequences, cu_seqlens_k {len(k_ends) - 1}")
    q, k, v = (_as_autocast(x) for x in (q, k, v))
    out, lse = q.new_zeros(*q.shape[:2], v.shape[2]), torch.full((q.shape[1], len(q)), -torch.inf, device=q.device)
    settings["return_attn_probs"] = True
    outs, lses = [out[:0]], [lse[:, :0]]
    for i in range(len(q_ends) - 1):
        queries, keys = slice(q_ends[i], q_ends[i + 1]), slice(k_ends[i], k_ends[i + 1])
        if k_ends[i] == k_ends[i + 1]:
            outs.append(out[queries])
            lses.append(lse[:, queries])
        elif q_ends[i] < q_ends[i + 1]:
            one, its_lse, _ = flash_attn_func(q[None, queries], k[None, keys], v[None, keys], **settings)
            outs.append(one[0])
            lses.append(its_lse[0])
    out = torch.cat([*outs, out[q_ends[-1] :]])
    return (out, torch.cat([*lses, lse[:, q_ends[-1] :]], dim=1), None) if return_attn_probs else out


def _as_autocast(x: Tensor) -> Tensor:
    """``x`` in the dtype that autocast, where it is on, has attention computed in."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) and x.is_floating_point() else x


def _refuse(dropout_p: float, softcap: float, alibi_slopes: Tensor | None) -> None:
    why = "accepted where flash-attn doesn't run (it needs CUDA and 16 bits)"
    if dropout_p:
        raise ValueError(f"dropout_p={dropout_p}: 0 is {why}")
    if softcap:
        raise ValueError(f"softcap={softcap}: 0 is {why}")
    if alibi_slopes is not None:
        raise ValueError(f"alibi_slopes: None is {why}")


def _mask(q_len: int, k_len: int, causal: bool, window_size: tuple[int, int], device: torch.device) -> BlockMask | None:
    """The mask of a call, or None where everything is attended."""
    left, right = (None if n < 0 else int(n) for n in window_size)
    right = 0 if causal else right
    if (left is None or left >= k_len - 1) and (right is None or right >= q_len - 1):
        return None
    return _band(q_len, k_len, left, right, device)


@functools.lru_cache(maxsize=32)
def _band(q_len: int, k_len: int, left: int | None, right: int | None, device: torch.device) -> BlockMask:
    with torch.inference_mode(False):  # it may serve training later
        return hhattn.masks.band(q_len, k_len, left=left, right=right).to(device)


def _sequences(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor) -> list[tuple[str, Tensor, int]]:
    return [("cu_seqlens_q", cu_q, len(q)), ("cu_seqlens_k", cu_k, len(k))]


def _ends(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    ends = [int(n) for n in cu_seqlens.tolist()]
    if not ends or ends[0] != 0 or ends[-1] > total or any(a > b for a, b in pairwise(ends)):
        raise ValueError(f"{name}={ends}: accepted are ascending numbers from 0 to {total} at most")
    return ends
