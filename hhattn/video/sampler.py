"""Few-step sampling of a rectified flow, with guidance, chunk by chunk."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .model import Condition, Memory, VideoDiT

SHIFT = 2.0  # moves the levels towards noise, where the layout is decided
CLEAN = 0.02  # the level of the pass that commits a chunk: the lowest that training saw
START = 0.999


def levels(steps: int) -> list[float]:
    """Noise levels from START to 0, ``steps + 1`` of them: t = s·u / (1 + (s - 1)·u) for u evenly spaced from 1 to
    0."""
    u = [1 - i / steps for i in range(steps + 1)]
    return [START, *(SHIFT * v / (1 + (SHIFT - 1) * v) for v in u[1:])]


@torch.no_grad()
def sample_chunk(
    model: VideoDiT,
    cond: Condition,
    empty: Condition | None,
    noise: Tensor,
    memory: Memory | None,
    *,
    steps: int,
    guidance: float,
    first: Tensor | None = None,
) -> tuple[Tensor, Memory]:
    """Denoise one chunk and commit it.

    ``noise [B, T, C, h, w]``; ``empty`` is the condition without words and needed where ``guidance`` != 1;
    ``first [B, 1, C, h, w]`` is a given, clean first latent frame. Euler steps of dx/dt = (x - x0)/t; then one pass
    over the clean chunk writes the memory. Returns the clean latents and the new memory. Raises ValueError for guidance
    without ``empty``.
    """
    if guidance != 1 and empty is None:
        raise ValueError(f"guidance={guidance} with empty=None; needed: the condition without words, or guidance=1")
    chunk = (noise.shape[1],)

    def known(x: Tensor) -> Tensor:
        return x if first is None else torch.cat([first, x[:, 1:]], 1)

    def level(t: float) -> Tensor:
        out = torch.full(noise.shape[:2], t, device=noise.device)
        if first is not None:
            out[:, 0] = 0
        return out

    x = known(noise)
    schedule = levels(steps)
    for t, after in pairwise(schedule):
        x0, _ = model(x, level(t), cond, chunk, memory)
        if empty is not None and guidance != 1:
            without, _ = model(x, level(t), empty, chunk, memory)
            x0 = without + guidance * (x0 - without)
        x = known(x0 + (x - x0) * (after / t))
    _, memory = model(x, level(CLEAN), cond, chunk, memory)
    return x, memory
