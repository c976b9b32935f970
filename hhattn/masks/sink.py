"""Everyone attends the first frames."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hhattn.layout import Order, VideoLayout
from hhattn.masks._groups import frame_of, static_mask
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
    """Every video token attends the first ``frames`` frames, and nothing else: ``|`` it to a pattern that forgets them.
    Other arguments as in :mod:`hhattn.masks`.

    Raises ValueError if ``frames`` is negative.
    """
    if frames < 0:
        raise ValueError(f"frames={frames}: accepted is 0 or more")
    relation = (torch.arange(layout.frames) < frames)[None, :].expand(layout.frames, -1)
    return static_mask(layout, frame_of, relation, block_size, order, q_frames, k_frames)
