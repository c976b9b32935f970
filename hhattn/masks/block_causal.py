"""Chunks of frames attend themselves and the past."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hhattn.layout import Order, VideoLayout
from hhattn.masks._groups import frame_of, static_mask
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
    chunk, both ways, and every chunk before. Other arguments as in :mod:`hhattn.masks`.

    Raises ValueError if ``frames_per_chunk`` is below 1.
    """
    if frames_per_chunk < 1:
        raise ValueError(f"frames_per_chunk={frames_per_chunk}: accepted is 1 or more")
    chunk = torch.arange(layout.frames) // frames_per_chunk
    relation = chunk[None, :] <= chunk[:, None]
    return static_mask(layout, frame_of, relation, block_size, order, q_frames, k_frames)
