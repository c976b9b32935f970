"""Everything attends everything."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hhattn.layout import Order, VideoLayout
from hhattn.masks._grid import Pattern, everywhere, static_mask
from hhattn.masks.block_mask import BlockMask


def dense(
    layout: VideoLayout,
    *,
    text_lens: Sequence[int] | None = None,
    block_size: tuple[int, int] = (64, 64),
    order: Order = "raster",
    q_frames: Sequence[int] | None = None,
    k_frames: Sequence[int] | None = None,
) -> BlockMask:
    """Every token, text included, attends every token; with ``text_lens``, one length for each batch entry, text beyond
    it is padding, which attends and is attended by nothing. Other arguments as in :mod:`hhattn.masks`.

    Raises ValueError for text lengths beyond the layout's.
    """
    frames = torch.ones(layout.frames + 1, layout.frames + 1, dtype=torch.uint8)
    return static_mask(
        layout, [Pattern(frames, [everywhere(layout)])], block_size, order, q_frames, k_frames, text_lens
    )
