"""Frames attend their neighbours in time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hhattn.layout import Order, VideoLayout
from hhattn.masks._grid import Pattern, everywhere, static_mask
from hhattn.masks.block_mask import BlockMask


def frame_window(
    layout: VideoLayout,
    frames: int,
    *,
    block_size: tuple[int, int] = (64, 64),
    order: Order = "raster",
    q_frames: Sequence[int] | None = None,
    k_frames: Sequence[int] | None = None,
) -> BlockMask:
    """A video token of frame f attends frame g where ``|f - g| <= frames``; 0 is attention within a frame. Other
    arguments as in :mod:`hhattn.masks`.

    ::

        frames = 1        key frame  0 1 2 3 4
                    query frame 0    # # . . .
                                1    # # # . .
                                2    . # # # .

    Raises ValueError if ``frames`` is negative.
    """
    if not isinstance(frames, int) or frames < 0:
        raise ValueError(f"frames={frames}: accepted is a whole number of 0 or more")
    frame = torch.arange(layout.frames)
    near = ((frame[None, :] - frame[:, None]).abs() <= frames).byte()
    return static_mask(layout, [Pattern(near, [everywhere(layout)])], block_size, order, q_frames, k_frames)
