"""Everyone attends the first frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hhattn.layout import Order, VideoLayout
from hhattn.masks._grid import Pattern, everywhere, static_mask
from hhattn.masks.block_mask import BlockMask


def sink(
    layout: VideoLayout,
    frames: int = 1,
    *,
    block_size: tuple[int, int] = (64, 64),
    order: Order = "raster",
    q_frames: Sequence[int] | None = None,
    k_frames: Sequence[int] | None = None,
) -> BlockMask:
    """Every video token attends the first ``frames`` frames, and nothing else: ``|`` it to a pattern that forgets them
    (attention sinks, arXiv 2309.17453). Other arguments as in :mod:`hhattn.masks`.

    ::

        frames = 1        key frame  0 1 2 3 4
                    every query      # . . . .

    Raises ValueError if ``frames`` is negative.
    """
    if not isinstance(frames, int) or frames < 0:
        raise ValueError(f"frames={frames}: accepted is a whole number of 0 or more")
    first = (torch.arange(layout.frames) < frames).byte()[None, :].repeat(layout.frames, 1)
    return static_mask(layout, [Pattern(first, [everywhere(layout)])], block_size, order, q_frames, k_frames)
