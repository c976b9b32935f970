"""adaLN: a norm followed by a modulation, with the gated residual in front of it where there is one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hhattn.nn._diffusers import norm_kind
from hhattn.ops.norm_modulate import norm_modulate


class NormModulate(nn.Module):
    """norm(x)·(1 + scale) + shift by :func:`hhattn.norm_modulate`, over the last dim of [B, S, ``dim``].

    ``elementwise_affine=True`` adds a learned ``weight``, and ``bias`` for norm="layer". Raises ValueError for another
    norm.
    """

    def __init__(self, dim: int, *, norm: str = "rms", eps: float = 1e-6, elementwise_affine: bool = False) -> None:
        super().__init__()
        if norm not in ("rms", "layer"):
            raise ValueError(f"norm={norm!r}; accepted: 'rms', 'layer'")
        self.norm, self.eps = norm, eps
        self.weight = nn.Parameter(torch.ones(dim)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if elementwise_affine and norm == "layer" else None

    @classmethod
    def from_diffusers(cls, norm: Any) -> NormModulate:
        """The norm of a block of diffusers: a LayerNorm, FP32LayerNorm or RMSNorm, over one dim. Its weight and bias
        are **shared**, not copied. Raises ValueError for others."""
        kind, eps = norm_kind(norm)
        size = tuple(norm.normalized_shape if hasattr(norm, "normalized_shape") else norm.dim)
        if len(size) != 1:
            raise ValueError(f"norm is over {size}; accepted: one dim")
        module = cls(size[0], norm=kind, eps=eps)
        module.weight, module.bias = norm.weight, getattr(norm, "bias", None)
        return module

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        residual: Tensor | None = None,
        gate: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x [B, S, C] -> y, or (y, residual + gate·x) given a residual; scale, shift and gate [B, 1 or F or S, C]."""
        return norm_modulate(
            x,
            scale,
            shift,
            weight=self.weight,
            bias=self.bias,
            norm=self.norm,
            eps=self.eps,
            residual=residual,
            gate=gate,
        )
