"""q and k of a diffusers attention layer: norm and rotation, by the fused op or by diffusers' own modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import hhattn
from hhattn.integrations.swap import Swap


def why_not_fused(attn: Any) -> str | None:
    """None where the q and k norms are RMS norms over all heads with a weight and no bias, else what they are."""
    for norm in (attn.norm_q, attn.norm_k):
        if type(norm).__name__ != "RMSNorm" or norm.weight is None or getattr(norm, "bias", None) is not None:
            return f"the q/k norm is a {type(norm).__name__}, not an RMSNorm over all heads"
        if norm.weight.shape != (attn.to_q.out_features,) and norm.weight.shape != (attn.to_k.out_features,):
            return f"the q/k norm's weight is {tuple(norm.weight.shape)}, not one over all heads"
    return None


def eps_of(norm: nn.Module, dtype: torch.dtype) -> float:
    """The norm's eps; torch's own RMSNorm takes the dtype's smallest step for None."""
    eps = norm.eps
    return torch.finfo(dtype).eps if eps is None else float(eps)  # type: ignore[arg-type]


def heads(attn: Any, x: Tensor) -> Tensor:
    """[B, S, H·D] -> [B, S, H, D]."""
    return x.unflatten(2, (attn.heads, -1))


def norm_rope(attn: Any, q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor] | None, fuse: bool) -> tuple[Tensor, Tensor]:
    """q, k [B, S, H·D] -> [B, S, H, D], normed (by the op where ``fuse``), and rotated by the op given ``rope``."""
    cos, sin = (None, None) if rope is None else rope
    if fuse:
        return hhattn.qk_norm_rope(
            heads(attn, q),
            heads(attn, k),
            cos,
            sin,
            q_weight=attn.norm_q.weight,
            k_weight=attn.norm_k.weight,
            across_heads=True,
            eps=eps_of(attn.norm_q, q.dtype),
        )
    q = q if attn.norm_q is None else attn.norm_q(q)
    k = k if attn.norm_k is None else attn.norm_k(k)
    q, k = heads(attn, q), heads(attn, k)
    return (q, k) if rope is None else hhattn.qk_norm_rope(q, k, cos, sin, norm=None)


def record_norms(handle: Swap, path: str, attn: Any, norms: bool) -> bool:
    """Whether the layer's q and k norms are fused; written down in the report either way."""
    why = "norms=False" if not norms else why_not_fused(attn)
    if why is None:
        handle.swapped(path, "q/k norm", "hhattn.qk_norm_rope")
    else:
        handle.left(path, "q/k norm", why)
    return why is None
