"""Normalise queries and keys, then rotate them: the formula in PyTorch, differentiable by autograd."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate_pairs(x: Tensor, rotate: str) -> Tensor:
    """Each pair (a, b) of the last dim turned by a right angle: (−b, a). Pairs are neighbours, or i and i + D/2."""
    if rotate == "interleaved":
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((-b, a), -1).flatten(-2)
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: str, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    y = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = y if weight is None else y * weight.to(x.dtype)
    return y if bias is None else y + bias.to(x.dtype)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    norm: str | None,
    across_heads: bool,
    rotate: str,
    eps: float,
    text_len: int,
    text_first: bool,
    order: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``x·cos + rotated(x)·sin`` for ``x = norm(q)`` and ``norm(k)``, in float32 (float64 for float64 inputs).

    cos and sin are [1 or B, S_video, 1 or H, D]; ``order`` [S], where given, is the raster index of each output token.
    The rest as in :func:`hhattn.qk_norm_rope`.
    """

    def one(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        if norm is not None:
            flat = y.flatten(2) if across_heads else y
            y = _norm(flat, weight, bias, norm, eps).view(y.shape)
        if cos is not None and sin is not None:
            start = text_len if text_first else 0
            head, video, tail = y.tensor_split((start, start + cos.shape[1]), dim=1)
            video = video * cos.to(y.dtype) + rotate_pairs(video, rotate) * sin.to(y.dtype)
            y = torch.cat((head, video, tail), 1)
        return (y if order is None else y.index_select(1, order)).to(x.dtype)

    return one(q, q_weight, q_bias), one(k, k_weight, k_bias)
