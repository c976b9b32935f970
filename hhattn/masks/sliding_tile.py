"""Sliding tile attention: a 3D window that moves by whole tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hhattn.layout import Order, VideoLayout
from hhattn.masks._grid import Pattern, by_axis, static_mask
from hhattn.masks.block_mask import BlockMask


def sliding_tile(
    layout: VideoLayout,
    window: Sequence[int] | Sequence[Sequence[int]],
    *,
    block_size: tuple[int, int] = (64, 64),
    order: Order = "raster",
    q_frames: Sequence[int] | None = None,
    k_frames: Sequence[int] | None = None,
) -> BlockMask:
    """A video token of tile c attends the video tokens of ``window = (t, h, w)`` tiles around c.

    Along an axis of n tiles the window is the tiles ``s ... s + w - 1`` with ``s = clamp(c - (w - 1) // 2, 0, n - w)``:
    at an edge it moves inwards and keeps its size, as in Sliding Tile Attention (arXiv 2502.04507); an axis with
    ``w >= n`` is attended in whole. All tokens of a tile have the same keys, so with ``order="tile"`` and blocks as
    long as a tile nearly every block is full or empty.

    ::

        one axis of 6 tiles, window 3      tile  0 1 2 3 4 5
                       tokens of tile 0, 1       # # # . . .
                                      2          . # # # . .
                                   4, 5          . . . # # #

    Args:
        layout: the token grid and its tile.
        window: (t, h, w) in tiles for every head, or one such triple for each head.
        block_size, order, q_frames, k_frames: as in :mod:`hhattn.masks`. ``order="tile"`` touches far fewer blocks.

    Raises ValueError for a window that isn't three sizes of at least 1, or a list of such.
    """
    patterns = []
    for sizes in _windows(window):
        frames, rows, columns = (_axis(*axis) for axis in zip(layout.grid, layout.tile, sizes, strict=True))
        patterns.append(Pattern(frames.byte(), [by_axis(rows, columns)]))
    return static_mask(layout, patterns, block_size, order, q_frames, k_frames)


def _windows(window: Sequence[int] | Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    window = (window,) if isinstance(window, int) else window  # a number alone is refused like two of them
    shared = [w for w in window if isinstance(w, int)]
    sizes = [tuple(shared)] if shared else [tuple(w) for w in window if not isinstance(w, int)]
    mixed = 0 < len(shared) < len(window)
    if not sizes or mixed or any(len(w) != 3 or min(w) < 1 for w in sizes):
        raise ValueError(
            f"window={window}: accepted are three sizes (t, h, w) of at least 1, or a list of such, by head"
        )
    return sizes


def _axis(n: int, tile: int, window: int) -> Tensor:
    """[n, n] bool: tokens that see each other along an axis of n tokens."""
    at = torch.arange(n) // tile
    count = -(-n // tile)
    start = (at - (window - 1) // 2).clamp(min=0, max=max(count - window, 0))[:, None]
    return (at >= start) & (at < start + window)
