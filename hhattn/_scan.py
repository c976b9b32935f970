"""What every implementation of linear attention does between the chunks' sums and the tokens' outputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hhattn import _transforms


def decayed_prefix(x: Tensor, decay: Tensor, reverse: bool = False) -> Tensor:
    """y_c = decay_c · y_{c-1} + x_c over dim 2 of [B, H, N, ...], decay [B, H, N]; in log2(N) vectorised steps.

    ``reverse`` gives its transpose, y_c = x_c + decay_{c+1} · y_{c+1}. It never divides by a cumulated decay, so that a
    decay of 0 (forget everything) is exact.
    """
    if reverse:
        decay = F.pad(decay, (0, 1))[:, :, 1:].flip(2)
        return decayed_prefix(x.flip(2), decay).flip(2)
    factor = decay.reshape(*decay.shape, *(1,) * (x.ndim - 3))
    step = 1
    while step < x.shape[2]:
        x = torch.cat((x[:, :, :step], torch.addcmul(x[:, :, step:], factor[:, :, step:], x[:, :, :-step])), 2)
        factor = torch.cat((factor[:, :, :step], factor[:, :, step:] * factor[:, :, :-step]), 2)
        step *= 2
    return x


class _DecayedPrefix(torch.autograd.Function):
    """:func:`decayed_prefix` that keeps its result only, not the log2(N) steps, for the backward. ``setup_context`` and
    the vmap rule let ``torch.func`` through; forward mode goes past it, since Dynamo takes no Function with a jvp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, decay: Tensor) -> Tensor:
        return decayed_prefix(x, decay)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output, inputs[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        y, decay = ctx.saved_tensors
        grad_x = decayed_prefix(grad, decay, reverse=True)
        carried = (grad_x[:, :, 1:] * y[:, :, :-1]).flatten(3).sum(-1)
        return grad_x, F.pad(carried, (1, 0))


def prefix(sums: Tensor, decay: Tensor | None, initial: Tensor | None) -> Tensor:
    """Per-chunk sums [B, H, N, ...] -> what each chunk sees: its own sum and the decayed sums of all before it."""
    if initial is not None:
        if decay is not None:
            initial = initial * decay[:, :, 0].reshape(*decay.shape[:2], *(1,) * (initial.ndim - 2))
        sums = torch.cat((sums[:, :, :1] + initial[:, :, None], sums[:, :, 1:]), 2)
    if sums.shape[2] == 1:
        return sums
    if decay is None:
        return sums.cumsum(2)
    return decayed_prefix(sums, decay) if _transforms.forward_mode() else _DecayedPrefix.apply(sums, decay)


def share(x: Tensor, groups: int) -> Tensor:
    """[B, H_kv, ...] -> [B, H, ...]: what each group of query heads shares, once a head."""
    return x if groups == 1 else x.repeat_interleave(groups, 1)
