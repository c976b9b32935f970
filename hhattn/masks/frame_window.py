"""Frames attend their neighbours in time."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hhattn.layout import Order, VideoLayout
from hhattn.masks._groups import frame_of, static_mask
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

    Raises ValueError if ``frames`` is negative.
    """
    if frames < 0:
        raise ValueError(f"frames={frames}: accepted is 0 or more")
    frame = torch.arange(layout.frames)
    relation = (frame[None, :] - frame[:, None]).abs() <= frames
    return static_mask(layout, frame_of, relation, block_size, order, q_frames, k_frames)
