"""Neighbourhood attention: a window around each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from hhattn.layout import Order, VideoLayout
from hhattn.masks._grid import Pattern, by_axis, static_mask
from hhattn.masks.block_mask import BlockMask

Axes: TypeAlias = Sequence[int]


def neighborhood(
    layout: VideoLayout,
    kernel_size: int | Axes | Sequence[Axes],
    stride: int | Axes = 1,
    dilation: int | Axes = 1,
    causal: bool | Sequence[bool] = False,
    *,
    block_size: tuple[int, int] = (64, 64),
    order: Order = "raster",
    q_frames: Sequence[int] | None = None,
    k_frames: Sequence[int] | None = None,
) -> BlockMask:
    """A video token attends the ``kernel_size = (t, h, w)`` tokens nearest to it along each axis.

    Along an axis of n tokens, with kernel k, stride s and dilation e, the token at x is number ``i = x // e`` of its
    dilation group, the tokens with the same remainder ``x % e``, of which there are m. It attends the tokens
    ``start ... start + k - 1`` of that group, where ``start = clamp(l - k // 2, 0, m - k)``: the window is centred on l
    and moves inwards at the edges, so that every token has k neighbours. l is the leader of i's stride group,
    ``min(s * (i // s) + s // 2, m - 1)``, i itself at s = 1: queries of a group share one window. On a causal axis
    the window ends at the query: the tokens ``max(l - k + 1, 0) ... i`` with ``l = min(s * (i // s) + s - 1, m - 1)``.
    A pair is attended if it is along all three axes. k of m and more is the whole group.

    ::

        one axis, n = 8         k = 3            k = 3, stride 2    k = 3, dilation 2    k = 3, causal
            query at 0          q # # . . . . .  q # # . . . . .    q . # . # . . .      q . . . . . . .
            query at 3          . . # q # . . .  . . # q # . . .    . # . q . # . .      . # # q . . . .
            query at 4          . . . # q # . .  . . . . q # # .    . . # . q . # .      . . # # q . . .

    The semantics of NATTEN's ``na3d`` (arXiv 2204.07143, 2209.15001, 2504.16922), which also asks that a dilated kernel
    fits the axis and is at least 2.

    Args:
        layout: the token grid; its tile plays no part in the pattern.
        kernel_size: (t, h, w), one size for all axes, or such a triple for each head.
        stride: by axis or one for all; at most the kernel size, as tokens might else not attend themselves.
        dilation: by axis or one for all.
        causal: by axis or one for all.
        block_size, order, q_frames, k_frames: as in :mod:`hhattn.masks`. ``order="tile"`` touches far fewer blocks.

    Raises ValueError for sizes that aren't whole and at least 1, or a stride above the kernel size.
    """
    strides, dilations = _sizes("stride", stride), _sizes("dilation", dilation)
    causes = [causal] * 3 if isinstance(causal, bool) else list(causal)
    if len(causes) != 3 or not all(isinstance(c, bool) for c in causes):
        raise ValueError(f"causal={causal}: accepted is a bool, or one for each axis (t, h, w)")
    patterns = []
    for kernel in _kernels(kernel_size):
        if any(s > k for s, k in zip(strides, kernel, strict=True)):
            raise ValueError(f"stride={stride}: accepted is at most kernel_size={kernel_size} along each axis")
        axes = zip(layout.grid, kernel, strides, dilations, causes, strict=True)
        frames, rows, columns = (_axis(*axis) for axis in axes)
        patterns.append(Pattern(frames.byte(), [by_axis(rows, columns)]))
    return static_mask(layout, patterns, block_size, order, q_frames, k_frames)


def _axis(n: int, kernel: int, stride: int, dilation: int, causal: bool) -> Tensor:
    """[n, n] bool: keys of each query along one axis."""
    x = torch.arange(n)
    i, group = x // dilation, x % dilation
    members = (n - 1 - group) // dilation + 1
    leader = torch.minimum(i // stride * stride + (stride - 1 if causal else stride // 2), members - 1)
    if causal:
        first, last = leader - kernel + 1, i
    else:
        first = torch.minimum(leader - kernel // 2, members - kernel).clamp(min=0)
        last = first + kernel - 1
    same = group[:, None] == group[None, :]
    return same & (i[None, :] >= first[:, None]) & (i[None, :] <= last[:, None])


def _sizes(name: str, value: int | Axes) -> list[int]:
    sizes = [value] * 3 if isinstance(value, int) else list(value)
    if len(sizes) != 3 or not all(isinstance(n, int) and n >= 1 for n in sizes):
        raise ValueError(f"{name}={value}: accepted is a whole size of at least 1, or one for each axis (t, h, w)")
    return sizes


def _kernels(kernel_size: int | Axes | Sequence[Axes]) -> list[list[int]]:
    if isinstance(kernel_size, int) or (kernel_size and all(isinstance(n, int) for n in kernel_size)):
        return [_sizes("kernel_size", kernel_size)]  # type: ignore[arg-type]
    if not kernel_size:
        raise ValueError(f"kernel_size={kernel_size}: accepted are three sizes (t, h, w), or a list of such, by head")
    return [_sizes("kernel_size", one) for one in kernel_size]
