"""Radial attention: the further apart two frames, the narrower the band of places that see each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hhattn.layout import Order, VideoLayout
from hhattn.masks._grid import Pattern, Places, everywhere, static_mask
from hhattn.masks.block_mask import BlockMask


def radial(
    layout: VideoLayout,
    decay: float = 1.0,
    sink: bool = True,
    *,
    min_width: int = 128,
    block_size: tuple[int, int] = (64, 64),
    order: Order = "raster",
    q_frames: Sequence[int] | None = None,
    k_frames: Sequence[int] | None = None,
) -> BlockMask:
    """A video token attends tokens that stand at nearly its own place, the more nearly the further away their frame.

    With d = |f - g| for frames f of the query and g of the key, n tokens a frame, and n counted in bits,

        length(d) = 2^bits(n) / 2^bits(d)        bits(0) = 0, bits(1) = 1, bits(2) = bits(3) = 2, ...
        width(d)  = n if d <= 1 else max(decay * length(d), min_width)

    a pair of places i and j, numbers 0 ... n - 1 row by row, is attended where ``|i - j| <= width(d)`` and
    ``d % max(1, floor(min_width / length(d))) == 0``: once a band would be narrower than ``min_width``, it keeps that
    width and appears in every second frame, then in every fourth, and so on. With ``sink`` frame 0 is attended in whole
    by all. So each doubling of the distance costs as much as the one before, O(n log n) pairs a token of a long video
    instead of O(n).

    ::

        n = 8, min_width = 1    keys of d = 0, 1      2, 3         4 ... 7      8 ... 15
            place 0             # # # # # # # #       # # # # # .  # # # . . .  # # . . . .
            place 1             # # # # # # # #       # # # # # #  # # # # . .  # # # . . .

    Radial Attention (arXiv 2506.19852) as its authors' code has it, where ``min_width`` is the block size, 128, and the
    first neighbours are dense (their HunyuanVideo setting; Wan's halves them). That code then rounds the mask to whole
    blocks of 128; here it is exact to the token, for any frame and block size.

    Args:
        layout: the token grid; its tile plays no part in the pattern.
        decay: scales the widths, not the splitting; smaller is sparser.
        sink: whether frame 0 is attended by all.
        min_width: width, in places, under which bands don't shrink but thin out over frames.
        block_size, order, q_frames, k_frames: as in :mod:`hhattn.masks`. A band is a run of raster tokens, so the
            default order touches fewer blocks here.

    Raises ValueError for a ``decay`` that isn't positive or a ``min_width`` below 1.
    """
    if not decay > 0:
        raise ValueError(f"decay={decay}: accepted are positive numbers")
    if min_width < 1:
        raise ValueError(f"min_width={min_width}: accepted is 1 or more")
    widths = [_width(d, layout.frame_len, decay, min_width) for d in range(layout.frames)]
    distinct = sorted({w for w in widths if w >= 0})
    of_distance = torch.tensor([0 if w < 0 else 1 + distinct.index(w) for w in widths], dtype=torch.uint8)
    frame = torch.arange(layout.frames)
    frames = of_distance[(frame[:, None] - frame[None, :]).abs()]
    places = [_band(layout.frame_len, width) for width in distinct]
    if sink:
        places.append(everywhere(layout))
        frames[:, 0] = len(places)
    return static_mask(layout, [Pattern(frames, places)], block_size, order, q_frames, k_frames)


def _width(distance: int, n: int, decay: float, min_width: int) -> int:
    """Largest offset between places at this distance; -1 where the frame is left out."""
    length = 2.0 ** (n.bit_length() - distance.bit_length())
    if distance % max(1, int(min_width / length)):
        return -1
    return n if distance <= 1 else min(n, int(max(decay * length, min_width)))


def _band(n: int, width: int) -> Places:
    return lambda: torch.ones(n, n, dtype=torch.bool).tril_(width).triu_(-width)
