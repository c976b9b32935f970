"""The projections every attention layer owns: q, k, v, the q/k norms, and the way out."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hhattn.nn._diffusers import attention_settings, share_projections
from hhattn.ops.qk_norm_rope import qk_norm_rope

QK_NORMS = ("rms_across_heads", "rms", None)
Layer = TypeVar("Layer", bound="AttentionProjections")


class AttentionProjections(nn.Module):
    """``to_q``, ``to_k``, ``to_v``, ``to_out`` (nn.Linear) and ``norm_q``, ``norm_k`` (nn.RMSNorm or None).

    ``qk_norm="rms_across_heads"`` norms over all heads together (Wan, SANA-Video, LTX), ``"rms"`` each head for itself
    (HunyuanVideo), None not at all. Raises ValueError for an unknown norm or heads that don't divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        head_dim: int | None = None,
        num_kv_heads: int | None = None,
        qk_norm: str | None = "rms_across_heads",
        bias: bool = True,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm={qk_norm!r}; accepted: {', '.join(map(repr, QK_NORMS))}")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"num_heads={num_heads} doesn't divide dim={dim}; give head_dim, or heads that divide")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads}; accepted: a divisor of num_heads={num_heads}")
        self.head_dim = head_dim or dim // num_heads
        self.qk_norm, self.norm_eps = qk_norm, norm_eps
        inner, kv_inner = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.to_q = nn.Linear(dim, inner, bias=bias)
        self.to_k = nn.Linear(dim, kv_inner, bias=bias)
        self.to_v = nn.Linear(dim, kv_inner, bias=bias)
        self.to_out = nn.Linear(inner, dim, bias=bias)
        across = qk_norm == "rms_across_heads"
        self.norm_q = None if qk_norm is None else nn.RMSNorm(inner if across else self.head_dim, eps=norm_eps)
        self.norm_k = None if qk_norm is None else nn.RMSNorm(kv_inner if across else self.head_dim, eps=norm_eps)

    @classmethod
    def from_diffusers(cls: type[Layer], attention: Any, **settings: Any) -> Layer:
        """This layer on the projections and norms of a self-attention layer of diffusers (Wan, SANA-Video, LTX, ...).

        They are **shared**, not copied: training either trains both, adapters on them take part, no memory is taken.
        What diffusers' layer doesn't have (``proj_l``, ``to_gate``) is zeros, of its dtype and device. What is computed
        is this class's: :class:`BlockLinearAttention` gives SANA-Video's result, :class:`BlockSparseAttention` under a
        mask of every pair that of softmax attention. ``settings`` are other arguments of the class. ``rope`` is then
        diffusers' (cos, sin) as [S, D] (``cos[0, :, 0]`` of Wan's), or :func:`hhattn.rope_3d`'s.

        Raises ValueError for layers that do more: a second stream, cross-attention, gates, layer norms of q and k,
        rotated halves, dropout.
        """
        known = attention_settings(attention)
        if both := known.keys() & settings.keys():
            raise ValueError(f"settings has {sorted(both)[0]}, which is the attention layer's; leave it out")
        with torch.device("meta"):
            layer = cls(**known, **settings)
        share_projections(layer, attention)
        return layer

    def heads(self, x: Tensor) -> Tensor:
        """[B, S, H·D] -> [B, S, H, D]"""
        return x.unflatten(-1, (-1, self.head_dim))

    def queries_and_keys(self, x: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """x [B, S, C] -> q [B, S, H, D], k [B, S, H_kv, D], normed, and rotated by ``rope`` = (cos, sin) [S, D]."""
        q, k = self.heads(self.to_q(x)), self.heads(self.to_k(x))
        cos, sin = (None, None) if rope is None else rope
        if self.norm_q is None or self.norm_k is None:
            return (q, k) if rope is None else qk_norm_rope(q, k, cos, sin, norm=None)
        return qk_norm_rope(
            q,
            k,
            cos,
            sin,
            q_weight=self.norm_q.weight,
            k_weight=self.norm_k.weight,
            across_heads=self.qk_norm == "rms_across_heads",
            eps=self.norm_eps,
        )
