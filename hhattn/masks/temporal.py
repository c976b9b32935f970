"""Places attend themselves over time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hhattn.layout import Order, VideoLayout
from hhattn.masks._grid import Pattern, static_mask
from hhattn.masks.block_mask import BlockMask


def temporal(
    layout: VideoLayout,
    *,
    block_size: tuple[int, int] = (64, 64),
    order: Order = "raster",
    q_frames: Sequence[int] | None = None,
    k_frames: Sequence[int] | None = None,
) -> BlockMask:
    """A video token attends the tokens of its own row and column in every frame: the temporal layers of factorised
    video transformers (arXiv 2103.15691, model 3; Latte, arXiv 2401.03048). Arguments as in :mod:`hhattn.masks`.

    ::

        frame 0    frame 1    frame 2      q: the query
        . . . .    . . . .    . . . .      #: its keys
        . # . .    . q . .    . # . .
        . . . .    . . . .    . . . .

    In raster order a block holds many places and one frame, so few pairs of each block that it touches are attended. A
    layout whose tile is long in time, with ``order="tile"``, gathers them: of 240x23x40 tokens, tiles of (16, 2, 2)
    touch 30 times fewer.
    """
    frames = torch.ones(layout.frames, layout.frames, dtype=torch.uint8)
    pattern = Pattern(frames, [lambda: torch.eye(layout.frame_len, dtype=torch.bool)])
    return static_mask(layout, [pattern], block_size, order, q_frames, k_frames)
