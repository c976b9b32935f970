"""What a layer of diffusers is, in the words of this package's modules. Read off its attributes: diffusers isn't
imported."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

NORMS = {"RMSNorm": "rms", "MochiRMSNorm": "rms", "LayerNorm": "layer", "FP32LayerNorm": "layer"}
# what an attention layer may have beside projections and norms -> the value under which it changes nothing
PLAIN = {
    "add_q_proj": None, "add_k_proj": None, "to_gate_logits": None, "group_norm": None, "spatial_norm": None,
    "norm_cross": None, "residual_connection": False, "rescale_output_factor": 1, "is_causal": False, "scale_qk": True,
}  # fmt: skip


def norm_kind(norm: Any) -> tuple[str, float]:
    """("rms" | "layer", eps) of a norm of diffusers or torch. ValueError for others."""
    kind, eps = NORMS.get(type(norm).__name__), getattr(norm, "eps", None)
    if kind is None:
        raise ValueError(f"norm is a {type(norm).__name__}; accepted: {', '.join(NORMS)}")
    if eps is None:  # torch's own RMSNorm then takes the smallest step of x's dtype
        eps = torch.finfo(torch.float32 if norm.weight is None else norm.weight.dtype).eps
    return kind, float(eps)


def qk_norms(attention: Any, head_dim: int) -> tuple[str | None, bool, float]:
    """(norm, across heads, eps) of the q and k norms of an attention layer; norm None where it has none."""
    q_norm, k_norm = attention.norm_q, attention.norm_k
    if q_norm is None or k_norm is None:
        return None, False, 1e-6
    found = norm_kind(q_norm)
    if norm_kind(k_norm) != found or q_norm.weight is None or k_norm.weight is None:
        raise ValueError("attention's norms of q and k must be of one kind and eps, and have weights")
    return found[0], q_norm.weight.shape[0] != head_dim, found[1]


def head_dims(attention: Any) -> tuple[int, int, int]:
    """(heads, heads of keys, head dim) of an attention layer."""
    heads = int(attention.heads)
    head_dim = attention.to_q.out_features // heads
    return heads, attention.to_k.out_features // head_dim, head_dim


def attention_settings(attention: Any) -> dict[str, Any]:
    """The arguments of AttentionProjections that a self-attention layer has. ValueError for what those don't do."""
    kind = type(attention).__name__
    for name in ("to_q", "to_k", "to_v", "to_out", "heads", "norm_q", "norm_k"):
        if not hasattr(attention, name) or (name.startswith("to_") and getattr(attention, name) is None):
            raise ValueError(f"attention is a {kind} without {name}; accepted: a self-attention layer of diffusers")
    for name, plain in PLAIN.items():
        if (came := getattr(attention, name, plain)) != plain:
            came = type(came).__name__ if isinstance(came, nn.Module) else came
            raise ValueError(f"attention has {name}: {came}; accepted: a self-attention layer without")
    if getattr(attention, "rope_type", "interleaved") != "interleaved":
        raise ValueError(f"attention rotates {attention.rope_type!r}; accepted: neighbours, 'interleaved'")
    if attention.to_k.in_features != attention.to_q.in_features:
        raise ValueError("attention is cross-attention: its keys have another width than its queries")
    heads, kv_heads, head_dim = head_dims(attention)
    norm, across, eps = qk_norms(attention, head_dim)
    if norm == "layer":
        raise ValueError("attention's q and k norms are layer norms; accepted: RMS norms, or none")
    return {
        "dim": attention.to_q.in_features,
        "num_heads": heads,
        "head_dim": head_dim,
        "num_kv_heads": kv_heads,
        "qk_norm": None if norm is None else "rms_across_heads" if across else "rms",
        "norm_eps": eps,
    }


def share_projections(layer: nn.Module, attention: Any) -> None:
    """Give ``layer`` the attention layer's own projections and norms. What only ``layer`` has is zeros, beside them."""
    out = attention.to_out
    if isinstance(out, nn.ModuleList):
        if any(getattr(more, "p", 0) for more in out[1:]):
            raise ValueError("attention has dropout; accepted: none")
        out = out[0]
    layer.to_out = out
    for name in ("to_q", "to_k", "to_v", "norm_q", "norm_k"):
        setattr(layer, name, getattr(attention, name))
    weight = attention.to_q.weight
    dtype = weight.dtype if weight.is_floating_point() else torch.float32  # quantised
    for module in layer.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.is_meta and not weight.is_meta:
                new = torch.zeros(parameter.shape, device=weight.device, dtype=dtype)
                setattr(module, name, nn.Parameter(new))


def rope_settings(rope: Any) -> dict[str, Any]:
    """The arguments of Rope3D that make it a module of diffusers: Wan's, SANA-Video's, HunyuanVideo's."""
    kind = type(rope).__name__
    if kind == "WanRotaryPosEmbed":
        dims = (rope.t_dim, rope.h_dim, rope.w_dim)
        return {"head_dim": sum(dims), "axes_dims": dims, "theta": _theta(rope, rope.t_dim)}
    if kind in ("HunyuanVideoRotaryPosEmbed", "HunyuanVideo15RotaryPosEmbed"):
        dims = tuple(rope.rope_dim)
        return {"head_dim": sum(dims), "axes_dims": dims, "theta": float(rope.theta)}
    raise ValueError(f"rope is a {kind}; accepted: WanRotaryPosEmbed, HunyuanVideo(15)RotaryPosEmbed")


def _theta(rope: Any, dim: int) -> float:
    """The base of Wan's frequencies, which is in its table alone: position 1 turns its second pair by base^(-2/dim)."""
    if dim < 4 or rope.freqs_cos.shape[0] < 2:
        raise ValueError("rope's table is too small to tell the base of its frequencies")
    angle = torch.atan2(rope.freqs_sin[1, 2], rope.freqs_cos[1, 2]).item()
    return float(f"{angle ** (-dim / 2):.5g}")  # as many digits as float32 tells
