"""Text attends all, and all attends text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hhattn.layout import Order, VideoLayout
from hhattn.masks._groups import static_mask
from hhattn.masks.block_mask import BlockMask


def text(
    layout: VideoLayout,
    *,
    block_size: tuple[int, int] = (64, 64),
    order: Order = "raster",
    q_frames: Sequence[int] | None = None,
    k_frames: Sequence[int] | None = None,
) -> BlockMask:
    """Pairs in which the query or the key is a text token. The other patterns speak of video tokens only: ``|`` this to
    one of them for joint attention over video and text. Arguments as in :mod:`hhattn.masks`.
    """
    relation = torch.tensor([[False, True], [True, True]])
    return static_mask(layout, lambda p: (p[:, 0] < 0).long(), relation, block_size, order, q_frames, k_frames)
