"""RMS and layer normalisation with their gradients, as the backward passes of the fused ops need them."""

from __future__ import annotations

import torch
from torch import Tensor


def normalize(x: Tensor, norm: str, eps: float) -> tuple[Tensor, Tensor]:
    """``n = (x − mean)·rstd`` over the last dim (no mean for "rms"), and ``rstd`` with that dim kept as 1."""
    centred = x - x.mean(-1, keepdim=True) if norm == "layer" else x
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


def normalize_backward(grad: Tensor, n: Tensor, rstd: Tensor, norm: str) -> Tensor:
    """The gradient of :func:`normalize` in ``x``, from ``grad`` in ``n``: ``rstd·(g − n·mean(g·n) − mean(g))``, without
    the last term for "rms"."""
    inner = grad - n * (grad * n).mean(-1, keepdim=True)
    if norm == "layer":
        inner = inner - grad.mean(-1, keepdim=True)
    return rstd * inner
