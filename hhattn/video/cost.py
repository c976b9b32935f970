"""What a configuration costs, counted without running it: parameters, multiply-adds, memory of the past."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .codec import TIME
from .model import Config, VideoDiT


@dataclass(frozen=True)
class Cost:
    """``flops``: floating-point operations (2 a multiply-add) of one pass over one latent frame, softmax windows as
    dense tiles; ``memory_bytes``: what a stream carries from chunk to chunk, in fp32."""

    parameters: int
    flops: int
    memory_bytes: int


def cost(config: Config, grid: tuple[int, int]) -> Cost:
    """Build the model on the meta device and count, for latent frames of ``grid`` (rows, columns) cells."""
    with torch.device("meta"):
        model = VideoDiT(config)
    n, dim, hd = grid[0] * grid[1], config.dim, config.head_dim
    once_a_frame = ("words.", "pool.", "time.", "final_ada.", "field.subject", "field.backdrop", "field.film")
    per_token = sum(
        p.numel() * (TIME if name.startswith("field.") else 1)  # the field is asked about each of the four pictures
        for name, p in model.named_parameters()
        if not name.startswith(once_a_frame) and ".ada." not in name and p.ndim > 1
    )
    flops, memory = 2 * per_token * n, 0
    for layer in range(config.layers):
        memory += 4 * 2 * n * dim
        if config.is_sparse(layer):
            reach, rows, cols = config.window
            seen = min(grid[0], rows * config.tile[0]) * min(grid[1], cols * config.tile[1]) * (2 * reach + 2)
            flops += 4 * n * seen * dim
            memory += 4 * 2 * (1 + reach) * n * dim
        else:
            flops += 4 * n * hd * dim
            states = {"joint": 1, "spatial": 0, "temporal": n}[config.sees(layer)]
            memory += 4 * config.heads * hd * (hd + 1) * states
    return Cost(sum(p.numel() for p in model.parameters()), flops, memory)
