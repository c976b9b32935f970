"""Every static pattern: how it is built, and its definition, written apart, token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from hhattn import BlockMask, VideoLayout, masks

Point = tuple[int, int, int]
Rule = Callable[[Point, Point], bool]

layouts = st.builds(
    VideoLayout,
    frames=st.integers(1, 5),
    height=st.integers(1, 5),
    width=st.integers(1, 6),
    tile=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    text_len=st.integers(0, 5),
    text_first=st.booleans(),
)
orders = st.sampled_from(["raster", "tile"])
blocks = st.sampled_from([(8, 8), (16, 4), (5, 7), (1, 3), (40, 64)])
triples = st.tuples(*[st.integers(1, 4)] * 3)


def brute_force(layout: VideoLayout, rule: Rule) -> Tensor:
    """[S, S] over video tokens in raster order; text tokens attend nothing."""
    keep = torch.zeros(layout.seq_len, layout.seq_len, dtype=torch.bool)
    t, h, w = layout.grid
    where = [(a, b, c) for a in range(t) for b in range(h) for c in range(w)]
    start = layout.video_slice.start
    keep[layout.video_slice, layout.video_slice] = torch.tensor([[rule(p, q) for q in where] for p in where])
    assert start + len(where) <= layout.seq_len
    return keep


def all_axes(layout: VideoLayout, sees: Callable[..., bool], *arguments: Any) -> Rule:
    """Attended where ``sees(query, key, size, *arguments of the axis)`` along all three axes."""
    return lambda p, q: all(sees(*axis) for axis in zip(p, q, layout.grid, *arguments, strict=True))


def in_clamped_window(p: int, q: int, size: int, tile: int, window: int) -> bool:
    """Sliding tile attention along one axis, as its paper draws it."""
    count = -(-size // tile)
    if window >= count:
        return True
    first = min(max(p // tile - (window - 1) // 2, 0), count - window)
    return first <= q // tile < first + window


def is_neighbor(p: int, q: int, size: int, kernel: int, stride: int, dilation: int, causal: bool) -> bool:
    """NATTEN along one axis, by trying windows: of all that lie inside the dilation group the one whose centre is
    nearest to the leader's place; on a causal axis the last tokens up to the leader, the future left out."""
    group = [x for x in range(size) if x % dilation == p % dilation]
    if q not in group:
        return False
    stride_group = next(group[s : s + stride] for s in range(0, len(group), stride) if p in group[s : s + stride])
    if causal:
        upto = group.index(stride_group[-1]) + 1
        return q in group[max(0, upto - kernel) : upto] and q <= p
    middle = group.index(stride_group[0]) + stride // 2  # of a group cut short by the edge: its last token
    leader = min(middle, len(group) - 1)
    starts = range(max(1, len(group) - kernel + 1))
    start = min(starts, key=lambda s: abs(s + kernel // 2 - leader))
    return q in group[start : start + kernel]


def radial_rule(layout: VideoLayout, decay: float, sink: bool, min_width: int) -> Rule:
    """Radial attention, from its formula."""
    n = layout.height * layout.width

    def rule(p: Point, q: Point) -> bool:
        if sink and q[0] == 0:
            return True
        distance = abs(p[0] - q[0])
        length = 2 ** len(f"{n:b}") / 2 ** (len(f"{distance:b}") if distance else 0)
        if length < min_width and distance % int(min_width / length):
            return False
        offset = abs((p[1] * layout.width + p[2]) - (q[1] * layout.width + q[2]))
        return distance <= 1 or offset <= decay * length or offset <= min_width

    return rule


@dataclass
class Case:
    """A pattern with arguments: ``build(layout, **common)`` and its rule."""

    build: Callable[..., BlockMask]
    rule: Callable[[VideoLayout], Rule]


def case(name: str, draw: Callable[[st.SearchStrategy], Any]) -> Case:
    """The pattern ``name`` with drawn arguments."""
    if name == "sliding_tile":
        window = draw(triples)
        return Case(
            lambda layout, **common: masks.sliding_tile(layout, window, **common),
            lambda layout: all_axes(layout, in_clamped_window, layout.tile, window),
        )
    if name == "neighborhood":
        kernel, dilation = draw(triples), draw(st.tuples(*[st.integers(1, 3)] * 3))
        stride = tuple(draw(st.integers(1, k)) for k in kernel)
        causal = draw(st.tuples(*[st.booleans()] * 3))
        return Case(
            lambda layout, **common: masks.neighborhood(layout, kernel, stride, dilation, causal, **common),
            lambda layout: all_axes(layout, is_neighbor, kernel, stride, dilation, causal),
        )
    if name == "radial":
        decay, sink, width = draw(st.sampled_from([0.3, 1.0, 1.7])), draw(st.booleans()), draw(st.integers(1, 9))
        return Case(
            lambda layout, **common: masks.radial(layout, decay, sink, min_width=width, **common),
            lambda layout: radial_rule(layout, decay, sink, width),
        )
    n = draw(st.integers(0, 3))
    builders: dict[str, Case] = {
        "frame_window": Case(
            lambda layout, **common: masks.frame_window(layout, n, **common),
            lambda layout: lambda p, q: abs(p[0] - q[0]) <= n,
        ),
        "sink": Case(
            lambda layout, **common: masks.sink(layout, n, **common),
            lambda layout: lambda p, q: q[0] < n,
        ),
        "block_causal": Case(
            lambda layout, **common: masks.block_causal(layout, n + 1, **common),
            lambda layout: lambda p, q: q[0] // (n + 1) <= p[0] // (n + 1),
        ),
        "spatial": Case(masks.spatial, lambda layout: lambda p, q: p[0] == q[0]),
        "temporal": Case(masks.temporal, lambda layout: lambda p, q: p[1:] == q[1:]),
    }
    return builders[name]


PATTERNS = [
    "sliding_tile",
    "neighborhood",
    "radial",
    "frame_window",
    "sink",
    "block_causal",
    "spatial",
    "temporal",
]


def examples(layout: VideoLayout, **common: Any) -> dict[str, BlockMask]:
    """Every static pattern once, text joined to those that speak of video only, as users do."""
    text = masks.text(layout, **common)
    return {
        "sliding_tile": masks.sliding_tile(layout, (2, 2, 1), **common) | text,
        "sliding_tile by head": masks.sliding_tile(layout, [(1, 2, 2), (3, 1, 1)], **common) | text,
        "neighborhood": masks.neighborhood(layout, (3, 3, 2), **common) | text,
        "neighborhood, all options": masks.neighborhood(
            layout, (2, 3, 3), (1, 2, 1), (1, 1, 2), (True, False, False), **common
        ),
        "radial": masks.radial(layout, 0.5, min_width=3, **common) | text,
        "block_causal": masks.block_causal(layout, 2, **common) | text,
        "frame_window": masks.frame_window(layout, 1, **common) | text,
        "sink": masks.sink(layout, 1, **common) | masks.spatial(layout, **common),
        "spatial": masks.spatial(layout, **common),
        "temporal": masks.temporal(layout, **common),
        "text by batch entry": masks.spatial(layout, **common) | masks.text(layout, text_lens=[1, 3], **common),
        "dense": masks.dense(layout, **common),
        "dense by batch entry": masks.dense(layout, text_lens=[0, 2], **common),
    }
