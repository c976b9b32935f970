"""Everything attends everything."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hhattn.layout import Order, VideoLayout
from hhattn.masks._groups import static_mask
from hhattn.masks.block_mask import BlockMask


def dense(
    layout: VideoLayout,
    *,
    block_size: tuple[int, int] = (64, 64),
    order: Order = "raster",
    q_frames: Sequence[int] | None = None,
    k_frames: Sequence[int] | None = None,
) -> BlockMask:
    """Every token, text included, attends every token. Arguments as in :mod:`hhattn.masks`."""
    relation = torch.ones(1, 1, dtype=torch.bool)
    return static_mask(layout, lambda p: torch.zeros_like(p[:, 0]), relation, block_size, order, q_frames, k_frames)
