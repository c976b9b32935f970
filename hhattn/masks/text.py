"""Text attends all, and all attends text."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hhattn.layout import Order, VideoLayout
from hhattn.masks._grid import Pattern, everywhere, static_mask
from hhattn.masks.block_mask import BlockMask


def text(
    layout: VideoLayout,
    *,
    text_lens: Sequence[int] | None = None,
    block_size: tuple[int, int] = (64, 64),
    order: Order = "raster",
    q_frames: Sequence[int] | None = None,
    k_frames: Sequence[int] | None = None,
) -> BlockMask:
    """Pairs in which the query or the key is a text token. The other patterns speak of video tokens only: ``|`` this to
    one of them for joint attention over video and text.

    ::

        text after the video        video      text   padding
                          video   . . . . . .  # # #  . .
                           text   # # # # # #  # # #  . .
                        padding   . . . . . .  . . .  . .

    Args:
        layout: the token grid, whose ``text_len`` tokens stand after the video, or before it with ``text_first``.
        text_lens: of each batch entry, how many of its text tokens, from the first, are no padding; default all of all.
            Padding attends and is attended by nothing, and the mask's batch size is the number of lengths.
        block_size, order, q_frames, k_frames: as in :mod:`hhattn.masks`.

    Raises ValueError for text lengths beyond the layout's.
    """
    frames = torch.zeros(layout.frames + 1, layout.frames + 1, dtype=torch.uint8)
    frames[-1, :] = frames[:, -1] = 1
    return static_mask(
        layout, [Pattern(frames, [everywhere(layout)])], block_size, order, q_frames, k_frames, text_lens
    )
