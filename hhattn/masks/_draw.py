"""Pictures of a mask: its blocks, and the keys of one query in the video."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hhattn.masks import _bits
from hhattn.masks.block_mask import BlockMask

_PIXELS = 1024  # block rows or columns drawn one by one; of more, the fullest of each few is
_FRAMES = 12  # frames drawn at most
_KEY, _QUERY, _REST = "#2a6f97", "#d1495b", "#eceff1"


def plot(mask: BlockMask, batch: int, head: int, ax: Any) -> Any:
    """See :meth:`BlockMask.plot`."""
    pyplot = _pyplot()
    (nq, nk), (bq, bk) = mask.num_blocks, mask.block_size
    share = F.max_pool2d(_shares(mask, batch, head)[None], (-(-nq // _PIXELS), -(-nk // _PIXELS)), ceil_mode=True)[0]
    if ax is None:
        ax = pyplot.subplots()[1]
    colours = pyplot.get_cmap("viridis_r").with_extremes(bad=_REST)
    drawn = share.where(share > 0, torch.nan).cpu().numpy()
    ax.imshow(drawn, vmin=0, vmax=1, cmap=colours, interpolation="nearest", aspect="auto", extent=(0, nk, nq, 0))
    ax.set(xlabel=f"key block ({bk} tokens)", ylabel=f"query block ({bq} tokens)")
    ax.set_title(f"{mask.q_len}x{mask.k_len}, {mask.order} order, density {mask.density:.1%}")
    return ax


def _shares(mask: BlockMask, batch: int, head: int) -> Tensor:
    """[nq, nk] float: share of each block's pairs that are attended."""
    bq, bk = mask.block_size
    blocks = mask._slice(batch, head)
    share = blocks.full.float()
    share.view(-1)[blocks.partial] = _bits.popcount(mask.tiles)[blocks.tile] / (bq * bk)
    return share


def keys_of(mask: BlockMask, query: int, batch: int = 0, head: int = 0) -> Tensor:
    """bool [k_len]: keys of one query, a place in the mask's order."""
    (bq, bk), nk = mask.block_size, mask.num_blocks[1]
    row = query // bq
    keys = torch.zeros(nk, bk, dtype=torch.bool, device=mask.device)
    full = mask.full_kv_indices[batch, head, row, : mask.full_kv_num_blocks[batch, head, row]]
    partial = slice(0, int(mask.kv_num_blocks[batch, head, row]))
    keys[full.long()] = True
    tiles = mask.tiles[mask.kv_tiles[batch, head, row, partial].long()]
    keys[mask.kv_indices[batch, head, row, partial].long()] = _bits.unpack(tiles[:, query % bq], bk)
    return keys.flatten()[: mask.k_len]


def figure(mask: BlockMask, query: tuple[int, int, int], title: str, batch: int = 0, head: int = 0) -> Any:
    """A matplotlib figure of a mask with layouts: its blocks on the left; on the right the keys that the video token at
    ``query`` (frame, row, column) attends, frame by frame."""
    pyplot = _pyplot()
    q_layout, k_layout = mask.layouts()
    place = q_layout.video_slice.start + (query[0] * q_layout.height + query[1]) * q_layout.width + query[2]
    if mask.order == "tile":
        place = int(q_layout.raster_index(mask.device)[place])
    keys = keys_of(mask, place, batch, head)
    keys = k_layout.from_tiles(keys, 0) if mask.order == "tile" else keys
    video = keys[k_layout.video_slice].view(k_layout.grid)
    chosen = _chosen_frames(video, query[0])
    columns = 3 if len(chosen) in (5, 6, 9) else min(4, len(chosen))
    rows = -(-len(chosen) // columns)
    ratio = k_layout.height / k_layout.width
    height = max(3.4, rows * (1.7 * ratio + 0.3) + 0.6)
    fig = pyplot.figure(figsize=(3.6 + 1.75 * columns, height), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=[3.6, 1.75 * columns])
    ax = plot(mask, batch, head, left.subplots())
    ax.set_box_aspect(1)
    ax.set_title(f"blocks, {mask.order} order: {mask.block_density:.1%} touched", fontsize=9)
    ax.tick_params(labelsize=7)
    grid = right.subplots(rows, columns, squeeze=False).flatten()
    for axis in grid[len(chosen) :]:
        axis.set_visible(False)
    for axis, frame in zip(grid, chosen, strict=False):
        _frame(axis, video[frame], query[1:] if frame == query[0] else None)
        axis.set_title(
            f"frame {frame}: {int(video[frame].sum())}", fontsize=8, color=_QUERY if frame == query[0] else "black"
        )
    text = f", {int(keys[k_layout.text_slice].sum())} of text" if k_layout.text_len else ""
    right.suptitle(f"keys of the query at {query}: {int(video.sum())} of video{text}", fontsize=9)
    fig.suptitle(f"{title}, density {mask.density:.2%}", fontsize=10)
    return fig


def _chosen_frames(video: Tensor, own: int) -> list[int]:
    """The query's frame and those that it attends; of more than fit, the nearest and then ever further ones."""
    attended = [f for f in range(len(video)) if f == own or video[f].any()]
    near = sorted(attended, key=lambda f: abs(f - own))
    if len(near) > _FRAMES:
        spread = ((torch.arange(_FRAMES) / (_FRAMES - 1)) ** 1.5 * (len(near) - 1)).round().int().tolist()
        kept = dict.fromkeys([*spread, *range(len(near))])
        near = [near[i] for i in list(kept)[:_FRAMES]]
    return sorted(near)


def _frame(ax: Any, keys: Tensor, query: tuple[int, ...] | None) -> None:
    from matplotlib.colors import ListedColormap

    picture = keys.int()
    if query is not None:
        picture[query] = 2
    ax.imshow(
        picture.cpu().numpy(), vmin=0, vmax=2, cmap=ListedColormap([_REST, _KEY, _QUERY]), interpolation="nearest"
    )
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(False)


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("pictures of masks need matplotlib: pip install 'hhattn[bench]'") from error
    return pyplot
