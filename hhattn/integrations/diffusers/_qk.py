"""q and k of a diffusers attention layer: norm and rotation, by the fused op or by diffusers' own modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import hhattn
from hhattn.integrations.swap import Swap

KINDS = {"RMSNorm": "rms", "MochiRMSNorm": "rms", "LayerNorm": "layer"}  # of diffusers and of torch
Rope = tuple[Tensor, Tensor] | None


def why_not_fused(attn: Any) -> str | None:
    """None where the norms of q and k are ones that :func:`hhattn.qk_norm_rope` computes, else what they are."""
    for norm, width in ((attn.norm_q, attn.to_q.out_features), (attn.norm_k, attn.to_k.out_features)):
        kind = type(norm).__name__
        if norm is None:
            return "q and k have no norm"
        if kind not in KINDS:
            return f"the q/k norm is a {kind}"
        sizes = (width, width // attn.heads)
        if norm.weight is None or norm.weight.shape not in [(size,) for size in sizes]:
            found = None if norm.weight is None else tuple(norm.weight.shape)
            return f"the q/k norm's weight is {found}, not one of {sizes[1]} for each head or {sizes[0]} for all"
    return None


def eps_of(norm: nn.Module, dtype: torch.dtype) -> float:
    """The norm's eps; torch's own RMSNorm takes the dtype's smallest step for None."""
    eps = norm.eps
    return torch.finfo(dtype).eps if eps is None else float(eps)  # type: ignore[arg-type]


def affine(norm: Any) -> tuple[Tensor | None, Tensor | None]:
    """A norm's weight and bias. Where accelerate keeps them elsewhere until the norm is called, they are fetched."""
    if norm.weight is None or not norm.weight.is_meta or not hasattr(norm, "_hf_hook"):
        return norm.weight, getattr(norm, "bias", None)
    norm._hf_hook.pre_forward(norm)
    found = norm.weight, getattr(norm, "bias", None)
    norm._hf_hook.post_forward(norm, None)
    return found


def norm_of(q_norm: Any, k_norm: Any, dtype: torch.dtype, head_dim: int) -> dict[str, Any]:
    """The arguments of :func:`hhattn.qk_norm_rope` that make it these norms."""
    (q_weight, q_bias), (k_weight, k_bias) = affine(q_norm), affine(k_norm)
    return {
        "norm": KINDS[type(q_norm).__name__],
        "across_heads": q_norm.weight.shape[0] != head_dim,
        "q_weight": q_weight,
        "k_weight": k_weight,
        "q_bias": q_bias,
        "k_bias": k_bias,
        "eps": eps_of(q_norm, dtype),
    }


def heads(attn: Any, x: Tensor) -> Tensor:
    """[B, S, H·D] -> [B, S, H, D]."""
    return x.unflatten(2, (attn.heads, -1))


def norm_rope(
    attn: Any,
    q: Tensor,
    k: Tensor,
    rope: Rope,
    fuse: bool,
    text_len: int = 0,
    text_first: bool = False,
    rotate: str = "interleaved",
) -> tuple[Tensor, Tensor]:
    """q, k [B, S, H·D] -> [B, S, H, D], normed (by the op where ``fuse``) and rotated by the op given ``rope``, but for
    ``text_len`` tokens at one end."""
    cos, sin = (None, None) if rope is None else rope
    where: dict[str, Any] = {"text_len": text_len, "text_first": text_first, "rotate": rotate}
    if fuse:
        q, k = heads(attn, q), heads(attn, k)
        return hhattn.qk_norm_rope(q, k, cos, sin, **norm_of(attn.norm_q, attn.norm_k, q.dtype, q.shape[3]), **where)
    q, k = _normed(attn, attn.norm_q, q), _normed(attn, attn.norm_k, k)
    return (q, k) if rope is None else hhattn.qk_norm_rope(q, k, cos, sin, norm=None, **where)


def norm_added(attn: Any, q: Tensor, k: Tensor, fuse: bool) -> tuple[Tensor, Tensor]:
    """The text's q and k [B, S_text, H·D], which have norms of their own -> [B, S_text, H, D]."""
    if not fuse:
        return _normed(attn, attn.norm_added_q, q), _normed(attn, attn.norm_added_k, k)
    q, k = heads(attn, q), heads(attn, k)
    return hhattn.qk_norm_rope(q, k, None, None, **norm_of(attn.norm_added_q, attn.norm_added_k, q.dtype, q.shape[3]))


def _normed(attn: Any, norm: Any, x: Tensor) -> Tensor:
    """x [B, S, H·D] -> [B, S, H, D] by the layer's own norm, over each head or over all."""
    if norm is None:
        return heads(attn, x)
    size = norm.normalized_shape if hasattr(norm, "normalized_shape") else norm.dim
    return heads(attn, norm(x)) if tuple(size) == (x.shape[2],) else norm(heads(attn, x))


def record_norms(handle: Swap, path: str, attn: Any, norms: bool) -> bool:
    """Whether the layer's q and k norms are fused; written down in the report either way."""
    why = "norms=False" if not norms else why_not_fused(attn)
    if why is None:
        handle.swapped(path, "q/k norm", "hhattn.qk_norm_rope")
    else:
        handle.left(path, "q/k norm", why)
    return why is None
