"""Normalise, then scale and shift: the formula in PyTorch, differentiable by autograd."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _grouped(op: Callable[[Tensor, Tensor], Tensor], r: Tensor, m: Tensor) -> Tensor:
    """``op(r, m)`` for r [B, S, C] and m [B, F, C], where each of the F rows of m serves S/F tokens in turn: m is
    broadcast, never expanded in memory. S may be 0, and F with it."""
    groups = m.shape[1]
    return op(r.unflatten(1, (groups, r.shape[1] // max(1, groups))), m.unsqueeze(2)).flatten(1, 2)


def norm_modulate(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    norm: str,
    eps: float,
) -> Tensor | tuple[Tensor, Tensor]:
    """``r = residual + gate·x``; ``y = (norm(r)·weight + bias)·(1 + scale) + shift``, float32 inside
    (float64 for float64 x).

    Shapes and meaning as in :func:`hhattn.norm_modulate`.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    r = x.to(compute)
    if gate is not None:
        r = _grouped(torch.mul, r, gate.to(compute))
    if residual is not None:
        r = residual.to(compute) + r

    centred = r - r.mean(-1, keepdim=True) if norm == "layer" else r
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(compute)
    if bias is not None:
        y = y + bias.to(compute)
    if scale is not None:
        y = _grouped(torch.mul, y, 1 + scale.to(compute))
    if shift is not None:
        y = _grouped(torch.add, y, shift.to(compute))
    y = y.to(x.dtype)
    return y if residual is None else (y, r.to(residual.dtype))
