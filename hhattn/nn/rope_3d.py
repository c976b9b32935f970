"""Rotary tables for a video's grid of tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hhattn.nn._diffusers import rope_settings
from hhattn.ops.rope_3d import rope_3d


class Rope3D(nn.Module):
    """:func:`hhattn.rope_3d` with its settings kept; no parameters, no table, hence no longest clip."""

    def __init__(
        self,
        head_dim: int,
        *,
        theta: float = 1e4,
        axes_dims: tuple[int, int, int] | None = None,
        rotate: str = "interleaved",
    ) -> None:
        super().__init__()
        rope_3d((0, 0, 0), head_dim, theta=theta, axes_dims=axes_dims, rotate=rotate)  # refuses what it can't take
        self.head_dim, self.theta, self.axes_dims, self.rotate = head_dim, theta, axes_dims, rotate

    @classmethod
    def from_diffusers(cls, rope: Any) -> Rope3D:
        """The tables of Wan's, SANA-Video's or HunyuanVideo's rotary embedding, without a longest clip: called with a
        grid of tokens, it gives as [S, D] what that gives. There are no weights to share. ValueError for others."""
        return cls(**rope_settings(rope))

    def forward(
        self,
        grid: tuple[int, int, int],
        *,
        offset: tuple[float, float, float] = (0, 0, 0),
        device: torch.device | str | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(frames, height, width) -> cos, sin [frames·height·width, head_dim], positions counted from ``offset``."""
        return rope_3d(
            grid,
            self.head_dim,
            theta=self.theta,
            axes_dims=self.axes_dims,
            offset=offset,
            rotate=self.rotate,
            device=device,
        )
