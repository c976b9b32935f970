"""How much attention mass each pattern keeps at a density, on given q, k and v: ``hhattn masks calibrate``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hhattn import masks
from hhattn.layout import Order, VideoLayout
from hhattn.masks.block_mask import BlockMask
from hhattn.masks.dynamic.recall import dense_attention, quality

Make = Callable[[float], BlockMask]


@dataclass(frozen=True)
class Row:
    """One pattern at one density. ``density`` is the share of pairs attended, ``executed`` that of blocks touched,
    which is what it costs; ``recall`` and ``error`` as in :class:`hhattn.masks.Quality`, means over batch and heads;
    ``worst`` is the recall of the worst head."""

    pattern: str
    target: float
    density: float
    executed: float
    recall: float
    worst: float
    error: float


@torch.no_grad()
def calibrate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    densities: Sequence[float] = (0.1, 0.25, 0.5),
    *,
    layout: VideoLayout | None = None,
    block_size: tuple[int, int] = (64, 64),
    scale: float | None = None,
) -> Iterator[Row]:
    """Rows for the selectors and, with ``layout``, for the static patterns, each as near each density as it comes.

    Args:
        q: [B, Sq, H, D]; k: [B, Sk, H_kv, D]; v: [B, Sk, H_kv, Dv]; with ``layout`` in raster order.
        densities: shares of the pairs, in (0, 1].
        layout: the grid of the keys' tokens. Blocks are then cut in tile order (of frame_window and radial in raster
            order, in which they are runs of tokens). Fewer queries than keys are those of its last frames.
        block_size, scale: as in :func:`hhattn.masks.select`.

    Raises ValueError for a density outside (0, 1], or a layout that doesn't fit.
    """
    for density in densities:
        if not 0 < density <= 1:
            raise ValueError(f"density={density}: accepted is a share of the pairs, in (0, 1]")
    order: Order = "raster"
    q_layout, static = None, {}
    if layout is not None:
        order, q_layout = "tile", _queries_of(layout, q.shape[1], k.shape[1])
        q, k, v = q_layout.to_tiles(q), layout.to_tiles(k), layout.to_tiles(v)
        static = _static(layout, q_layout, block_size)
    settings = {"block_size": block_size, "scale": scale, "order": order, "layout": q_layout, "k_layout": layout}
    out, lse = dense_attention(q, k, v, block_size, scale)
    for name, make in {**static, **_dynamic(q, k, settings)}.items():
        yield from _measured(name, make, densities, (q, k, v), (out, lse), scale, order)
    clusters = masks.centroid().cluster(q, k)
    qkv = (clusters.queries(q), clusters.keys(k), clusters.keys(v))
    dense = (clusters.queries(out), lse.gather(-1, clusters.q_order))
    for name, make in _sorted(clusters, block_size, scale).items():
        yield from _measured(name, make, densities, qkv, dense, scale, "raster")


def _measured(
    name: str,
    make: Make,
    densities: Sequence[float],
    qkv: tuple[Tensor, Tensor, Tensor],
    dense: tuple[Tensor, Tensor],
    scale: float | None,
    order: Order,
) -> Iterator[Row]:
    """A row for each density, of tokens in ``order`` whose dense attention is known."""
    for density in densities:
        mask = make(density)
        got = quality(*qkv, mask, scale=scale, dense=dense, order=order)
        worst, mean = float(got.recall.min()), float(got.recall.mean())
        yield Row(name, density, mask.density, mask.block_density, mean, worst, float(got.error.mean()))


def _queries_of(layout: VideoLayout, queries: int, keys: int) -> VideoLayout:
    """The layout of the queries."""
    frames = (queries - layout.text_len) // layout.frame_len
    mine = VideoLayout(max(1, frames), *layout.grid[1:], layout.tile, layout.text_len, layout.text_first)
    if (layout.seq_len, mine.seq_len) != (keys, queries) or frames > layout.frames:
        raise ValueError(
            f"layout has {layout.seq_len} tokens in {layout.frames} frames, q has {queries} and k {keys}: accepted are "
            "keys of the whole layout, and queries of its last frames"
        )
    return mine


def _dynamic(q: Tensor, k: Tensor, settings: dict[str, Any]) -> dict[str, Make]:
    """Selectors at about a density: by k blocks, or by the mass p that so many blocks hold."""

    def top_k(scorer: masks.Scorer) -> Make:
        return lambda density: masks.select(q, k, scorer, masks.top_k(ratio=density), **settings)

    def top_p(scorer: masks.Scorer) -> Make:
        return lambda density: _bisect(lambda p: masks.select(q, k, scorer, masks.top_p(p), **settings), density, 0, 1)

    stride = math.gcd(16, *settings["block_size"])
    scorers: dict[str, masks.Scorer] = {"mean_pool": masks.mean_pool(), "antidiagonal": masks.antidiagonal(stride)}
    patterns = {f"{name}, top-k": top_k(scorer) for name, scorer in scorers.items()}
    patterns |= {f"{name}, top-p": top_p(scorer) for name, scorer in scorers.items()}
    # at stride 1 every pair is looked at: what a perfect guess keeps
    return patterns | {"best blocks": top_k(masks.antidiagonal(1))}


def _sorted(clusters: masks.Clusters, block_size: tuple[int, int], scale: float | None) -> dict[str, Make]:
    """Selectors of tokens sorted by cluster."""

    def at(policy: masks.Policy) -> BlockMask:
        return clusters.select(policy, block_size, scale)

    return {
        "centroid, top-k": lambda density: at(masks.top_k(ratio=density)),
        "centroid, top-p": lambda density: _bisect(lambda p: at(masks.top_p(p)), density, 0, 1),
    }


def _static(layout: VideoLayout, q_layout: VideoLayout, block_size: tuple[int, int]) -> dict[str, Make]:
    """Static patterns at about a density, each by one number."""
    queries = range(layout.frames - q_layout.frames, layout.frames)

    @cache
    def build(name: str, size: Any, order: Order = "tile", **more: Any) -> BlockMask:
        common: dict[str, Any] = {"block_size": block_size, "order": order, "q_frames": queries}
        mask = getattr(masks, name)(layout, size, **common, **more)
        return mask | masks.text(layout, **common) if layout.text_len else mask

    def window(name: str, sizes: Sequence[int]) -> Make:
        def make(share: float) -> BlockMask:
            return build(name, tuple(max(1, round(share * n)) for n in sizes))

        return lambda density: _bisect(make, density, 0, 1)

    def frames(density: float) -> BlockMask:
        return _bisect(lambda x: build("frame_window", round(x), "raster"), density, 0, layout.frames)

    def radial(density: float) -> BlockMask:
        width = max(1, layout.frame_len // 16)  # 128 is about that of a frame of the models it was made for
        return _bisect(lambda x: build("radial", 2.0**x, "raster", min_width=width), density, -6, 6)

    return {
        "frame_window": frames,
        "sliding_tile": window("sliding_tile", layout.tile_grid),
        "neighborhood": window("neighborhood", layout.grid),
        "radial": radial,
    }


def _bisect(make: Callable[[float], BlockMask], density: float, low: float, high: float) -> BlockMask:
    """Of the masks that ``make`` gives for numbers between ``low`` and ``high``, denser for larger ones, the one
    nearest to ``density``, as far as ten halvings tell."""
    if density == 1:
        return make(high)
    best: BlockMask | None = None
    for _ in range(10):
        mask = make((low + high) / 2)
        if best is None or abs(mask.density - density) < abs(best.density - density):
            best = mask
        if abs(best.density - density) < 0.01 * density:
            break
        low, high = (low, (low + high) / 2) if mask.density > density else ((low + high) / 2, high)
    assert best is not None
    return best
