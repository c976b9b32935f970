"""Chunks of frames attend themselves and the past."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hhattn.layout import Order, VideoLayout
from hhattn.masks._grid import Pattern, everywhere, static_mask
from hhattn.masks.block_mask import BlockMask


def block_causal(
    layout: VideoLayout,
    frames_per_chunk: int,
    *,
    block_size: tuple[int, int] = (64, 64),
    order: Order = "raster",
    q_frames: Sequence[int] | None = None,
    k_frames: Sequence[int] | None = None,
) -> BlockMask:
    """A video token of frame f attends frame g where ``g // frames_per_chunk <= f // frames_per_chunk``: its whole
    chunk, both ways, and every chunk before (CausVid, arXiv 2412.07772, and the block-causal models after it). Other
    arguments as in :mod:`hhattn.masks`.

    ::

        frames_per_chunk = 2        key frame  0 1 2 3 4 5
                            query frame  0, 1  # # . . . .
                                         2, 3  # # # # . .
                                         4, 5  # # # # # #

    Raises ValueError if ``frames_per_chunk`` is below 1.
    """
    if not isinstance(frames_per_chunk, int) or frames_per_chunk < 1:
        raise ValueError(f"frames_per_chunk={frames_per_chunk}: accepted is a whole number of 1 or more")
    chunk = torch.arange(layout.frames) // frames_per_chunk
    frames = (chunk[None, :] <= chunk[:, None]).byte()
    return static_mask(layout, [Pattern(frames, [everywhere(layout)])], block_size, order, q_frames, k_frames)
