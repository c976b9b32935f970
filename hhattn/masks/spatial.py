"""Frames attend themselves."""

from __future__ import annotations

from collections.abc import Sequence

from hhattn.layout import Order, VideoLayout
from hhattn.masks.block_mask import BlockMask
from hhattn.masks.frame_window import frame_window


def spatial(
    layout: VideoLayout,
    *,
    block_size: tuple[int, int] = (64, 64),
    order: Order = "raster",
    q_frames: Sequence[int] | None = None,
    k_frames: Sequence[int] | None = None,
) -> BlockMask:
    """A video token attends the tokens of its own frame: the spatial layers of factorised video transformers
    (arXiv 2103.15691, model 3; Latte, arXiv 2401.03048). Arguments as in :mod:`hhattn.masks`.

    ::

        frame 0    frame 1    frame 2      q: the query
        . . . .    # # # #    . . . .      #: its keys
        . . . .    # q # #    . . . .
        . . . .    # # # #    . . . .
    """
    return frame_window(layout, 0, block_size=block_size, order=order, q_frames=q_frames, k_frames=k_frames)
