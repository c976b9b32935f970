"""Rotary position tables for a grid of frames, rows and columns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hhattn.ops import _check

ROTATIONS = ("interleaved", "half")


def default_axes_dims(head_dim: int) -> tuple[int, int, int]:
    """How ``head_dim`` is shared by time, height and width unless told: h = w = 2·(D // 6), t = the rest."""
    side = 2 * (head_dim // 6)
    return head_dim - 2 * side, side, side


def rope_3d(
    grid: Sequence[int | Tensor],
    head_dim: int,
    *,
    theta: float = 1e4,
    axes_dims: Sequence[int] | None = None,
    offset: Sequence[float] = (0, 0, 0),
    rotate: str = "interleaved",
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles of every token of a (frames, height, width) grid, tokens in raster order.

    Axis a with d_a of the D dims turns pair i by the angle ``position_a · theta^(−2i / d_a)``, i = 0 … d_a/2 − 1. Pairs
    are neighbours (2i, 2i+1) for "interleaved" and (i, i + D/2) for "half"; each frequency stands twice, at both places
    of its pair. Angles are computed in float64, so positions may be fractional and as large as they like: there is no
    table to run off.

    Args:
        grid: three lengths (positions 0, 1, 2, …), or 1-D tensors of positions, or a mixture.
        head_dim: D, even.
        theta: the base of the frequencies.
        axes_dims: the dims of time, height and width, even, summing to D. None: h = w = 2·(D // 6), t = the rest.
        offset: added to the positions of each axis; the first frame of a chunk goes into offset[0].
        rotate: "interleaved" or "half", as in :func:`hhattn.qk_norm_rope`.
        device: of the result; None is the device of a position tensor of ``grid``, else the default one.

    Returns:
        (cos, sin), each [S, D] float32, S = frames · height · width.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is accepted.

    Source: RoFormer (Su et al., 2021); the split over three axes is that of diffusers' Wan and SANA-Video models.
    """
    dims = _validate(grid, head_dim, theta, axes_dims, offset, rotate)
    if device is None:
        device = next((g.device for g in grid if isinstance(g, Tensor)), None)
    lengths = [g.shape[0] if isinstance(g, Tensor) else g for g in grid]
    angles = []
    for axis, (positions, dim) in enumerate(zip(grid, dims, strict=True)):
        if not isinstance(positions, Tensor):
            positions = torch.arange(positions, device=device)
        where = positions.to(device=device, dtype=torch.float64) + offset[axis]
        frequency = theta ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float64) / dim)
        view = [1, 1, 1, dim // 2]
        view[axis] = lengths[axis]
        angles.append((where[:, None] * frequency).view(view).expand(*lengths, dim // 2))
    pairs = torch.cat(angles, -1).flatten(0, 2)
    table = pairs.repeat_interleave(2, -1) if rotate == "interleaved" else torch.cat((pairs, pairs), -1)
    return table.cos().float(), table.sin().float()


def _validate(
    grid: Sequence[int | Tensor],
    head_dim: int,
    theta: float,
    axes_dims: Sequence[int] | None,
    offset: Sequence[float],
    rotate: str,
) -> tuple[int, ...]:
    if len(grid) != 3:
        raise ValueError(f"grid must be (frames, height, width), got {len(grid)} entries: {tuple(grid)!r}")
    for entry in grid:
        if isinstance(entry, Tensor):
            if entry.ndim != 1:
                raise ValueError(f"grid: a tensor of positions must be 1-D, got shape {tuple(entry.shape)}")
        elif isinstance(entry, bool) or not isinstance(entry, (int, torch.SymInt)):
            raise TypeError(f"grid must hold lengths or 1-D tensors of positions, got {type(entry).__name__}")
        elif entry < 0:
            raise ValueError(f"grid must hold lengths that are not negative, got {entry}")
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"head_dim={head_dim} must be positive and even, since rotary pairs take two dims each")
    if theta <= 0:
        raise ValueError(f"theta={theta!r} must be positive")
    if len(offset) != 3:
        raise ValueError(f"offset must be (frames, rows, columns), got {len(offset)} entries: {tuple(offset)!r}")
    _check.one_of("rotate", rotate, ROTATIONS)
    dims = default_axes_dims(head_dim) if axes_dims is None else tuple(axes_dims)
    if len(dims) != 3 or sum(dims) != head_dim or any(d < 0 or d % 2 for d in dims):
        raise ValueError(f"axes_dims={dims} must be three even numbers, not negative, that sum to head_dim={head_dim}")
    return dims
