"""Sliding tile attention: a 3D window that moves by whole tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hhattn.layout import Order, VideoLayout
from hhattn.masks._groups import static_mask
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

    Args:
        layout: the token grid and its tile.
        window: (t, h, w) in tiles for every head, or one such triple for each head.
        block_size, order, q_frames, k_frames: as in :mod:`hhattn.masks`. ``order="tile"`` touches far fewer blocks.

    Raises ValueError for a window that isn't three sizes of at least 1, or a list of such.
    """
    n_tiles = layout.tile_grid
    relation = torch.stack([_window(n_tiles, w) for w in _windows(window)])
    size = torch.tensor(layout.tile)

    def tile_of(position: Tensor) -> Tensor:
        t, h, w = (position // size).unbind(-1)
        tile = (t * n_tiles[1] + h) * n_tiles[2] + w
        return tile.where(position[:, 0] >= 0, -1)

    return static_mask(layout, tile_of, relation, block_size, order, q_frames, k_frames)


def _windows(window: Sequence[int] | Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    shared = [w for w in window if isinstance(w, int)]
    sizes = [tuple(shared)] if shared else [tuple(w) for w in window if not isinstance(w, int)]
    if not sizes or any(len(w) != 3 or min(w) < 1 for w in sizes):
        raise ValueError(
            f"window={window}: accepted are three sizes (t, h, w) of at least 1, or a list of such, by head"
        )
    return sizes


def _window(n_tiles: tuple[int, int, int], window: tuple[int, ...]) -> Tensor:
    """[tiles, tiles] bool, from one relation for each axis."""
    axes: list[Tensor] = []
    for n, size in zip(n_tiles, window, strict=True):
        tile = torch.arange(n)
        start = (tile - (size - 1) // 2).clamp(min=0, max=max(n - size, 0))[:, None]
        axes.append((tile >= start) & (tile < start + size))
    t, h, w = axes[0][:, None, None, :, None, None], axes[1][:, None, None, :, None], axes[2][:, None, None, :]
    return (t & h & w).reshape(n_tiles[0] * n_tiles[1] * n_tiles[2], -1)
