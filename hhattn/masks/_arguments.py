"""Arguments that the builders share, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hhattn.layout import VideoLayout


def part_of(layout: VideoLayout, name: str, frames: Sequence[int] | None) -> VideoLayout:
    """The layout of the given frames of ``layout``; default: all of it."""
    if frames is None:
        return layout
    if not len(frames) or not all(0 <= int(f) < layout.frames for f in frames):
        raise ValueError(f"{name}={frames}: accepted are one or more frames of 0 ... {layout.frames - 1}")
    return replace(layout, frames=len(frames))


def frame_numbers(layout: VideoLayout, frames: Sequence[int] | None) -> Tensor:
    """Numbers of the frames that are there, text's (one more than all) before them or after as in the layout."""
    numbers = list(range(layout.frames)) if frames is None else [int(f) for f in frames]
    return torch.tensor([layout.frames, *numbers] if layout.text_first else [*numbers, layout.frames])


def text_lengths(layout: VideoLayout, text_lens: Sequence[int] | None) -> list[int]:
    """Text tokens of each batch entry that are no padding."""
    if text_lens is None:
        return [layout.text_len]
    lens = [] if isinstance(text_lens, int) else [int(n) for n in text_lens]
    if not lens or not all(0 <= n <= layout.text_len for n in lens):
        raise ValueError(f"text_lens={text_lens}: accepted are lengths of 0 ... {layout.text_len}, one a batch entry")
    return lens
