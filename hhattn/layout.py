"""The grid of tokens that a video is, and the two orders its tokens are stored in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

Order = Literal["raster", "tile"]
ORDERS = ("raster", "tile")


@dataclass(frozen=True)
class VideoLayout:
    """A grid of ``frames x height x width`` video tokens, cut into tiles, with ``text_len`` text tokens beside it.

    Two orders of the same ``seq_len = frames * height * width + text_len`` tokens:

    - *raster*: frame by frame, row by row, as patch embeddings come out of a model;
    - *tile*: tile by tile (tiles in raster order, tokens of a tile in raster order), so that a run of consecutive
      tokens is a compact box of the video and a 3D window over the video is a few runs of keys.

    Any grid goes with any tile: tiles at the far edges are smaller, nothing is padded, and each order is a permutation
    of the other. Text tokens stand after the video (before it with ``text_first=True``) in both orders, keep their
    order, and fill tiles of their own, ``prod(tile)`` tokens each.

    Instances are immutable and hashable; index tensors are computed once for each layout and device.

    Raises:
        ValueError: a grid or tile size below 1, a tile that isn't three numbers, or a negative ``text_len``.

    Example:
        >>> layout = VideoLayout(frames=8, height=23, width=40, tile=(4, 4, 4))
        >>> x = torch.randn(1, layout.seq_len, 64)  # raster order, [B, S, C]
        >>> torch.equal(layout.from_tiles(layout.to_tiles(x)), x)
        True
    """

    frames: int
    height: int
    width: int
    tile: tuple[int, int, int] = (4, 4, 4)
    text_len: int = 0
    text_first: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", tuple(int(n) for n in self.tile))
        for name, sizes in (("(frames, height, width)", self.grid), ("tile", self.tile)):
            if len(sizes) != 3 or not all(isinstance(n, int) and n >= 1 for n in sizes):
                raise ValueError(f"{name}={sizes}: accepted are three whole sizes of at least 1")
        if self.text_len < 0:
            raise ValueError(f"text_len={self.text_len}: accepted is 0 or more")

    @property
    def grid(self) -> tuple[int, int, int]:
        """(frames, height, width), in tokens."""
        return (self.frames, self.height, self.width)

    @property
    def tile_grid(self) -> tuple[int, int, int]:
        """Number of tiles along (frames, height, width); the last one of an axis may be smaller than ``tile``."""
        t, h, w = (-(-n // size) for n, size in zip(self.grid, self.tile, strict=True))
        return (t, h, w)

    @property
    def tile_len(self) -> int:
        """Tokens in a tile that no edge cuts."""
        return self.tile[0] * self.tile[1] * self.tile[2]

    @property
    def frame_len(self) -> int:
        """Tokens in one frame."""
        return self.height * self.width

    @property
    def video_len(self) -> int:
        """Video tokens."""
        return self.frames * self.height * self.width

    @property
    def seq_len(self) -> int:
        """Video and text tokens."""
        return self.video_len + self.text_len

    @property
    def num_tiles(self) -> int:
        """Tiles of video and of text."""
        t, h, w = self.tile_grid
        return t * h * w + -(-self.text_len // self.tile_len)

    @property
    def video_slice(self) -> slice:
        """Where the video tokens stand in either order."""
        start = self.text_len if self.text_first else 0
        return slice(start, start + self.video_len)

    @property
    def text_slice(self) -> slice:
        """Where the text tokens stand in either order."""
        start = 0 if self.text_first else self.video_len
        return slice(start, start + self.text_len)

    def to_tiles(self, x: Tensor, dim: int = 1) -> Tensor:
        """Raster order to tile order along ``dim``, whose length must be ``seq_len``. A copy; differentiable."""
        return self._reorder(x, dim, self.tile_index(x.device))

    def from_tiles(self, x: Tensor, dim: int = 1) -> Tensor:
        """Tile order to raster order along ``dim``: the inverse of :meth:`to_tiles`."""
        return self._reorder(x, dim, self.raster_index(x.device))

    def tile_index(self, device: torch.device | str = "cpu") -> Tensor:
        """[seq_len] int64: ``x_tile = x_raster[tile_index]``. Don't write to it: it is shared."""
        return _cached(_make_tile_index, self, torch.device(device))

    def raster_index(self, device: torch.device | str = "cpu") -> Tensor:
        """[seq_len] int64: ``x_raster = x_tile[raster_index]``. Don't write to it: it is shared."""
        return _cached(_make_raster_index, self, torch.device(device))

    def positions(self, order: Order = "raster", device: torch.device | str = "cpu") -> Tensor:
        """[seq_len, 3] int64: (frame, row, column) of every token in ``order``; -1 for text."""
        raster = torch.full((self.seq_len, 3), -1, dtype=torch.int64, device=device)
        raster[self.video_slice] = _video_positions(self, torch.device(device))
        return raster if check_order("order", order) == "raster" else raster[self.tile_index(device)]

    def tile_ids(self, order: Order = "raster", device: torch.device | str = "cpu") -> Tensor:
        """[seq_len] int64: the tile of every token in ``order``. Video tiles count from 0 in raster order of the tile
        grid, text tiles go on from there."""
        position = self.positions(order, device)
        (_, nh, nw), (t, h, w) = self.tile_grid, self.tile
        video = ((position[:, 0] // t) * nh + position[:, 1] // h) * nw + position[:, 2] // w
        n_video_tiles = self.tile_grid[0] * nh * nw
        text = torch.arange(self.text_len, device=device) // self.tile_len + n_video_tiles
        video[self.text_slice] = text
        return video

    def _reorder(self, x: Tensor, dim: int, index: Tensor) -> Tensor:
        if x.shape[dim] != self.seq_len:
            raise ValueError(
                f"x.shape[{dim}]={x.shape[dim]}: {self} has {self.seq_len} tokens "
                f"({self.frames}x{self.height}x{self.width} video + {self.text_len} text)"
            )
        return x.index_select(dim, index)


def check_order(name: str, order: str) -> str:
    """``order`` itself, or ValueError naming the argument ``name``."""
    if order not in ORDERS:
        raise ValueError(f'{name}={order!r}: accepted are "raster" and "tile"')
    return order


def _video_positions(layout: VideoLayout, device: torch.device) -> Tensor:
    """[video_len, 3] in raster order."""
    axes = [torch.arange(n, device=device) for n in layout.grid]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def _make_tile_index(layout: VideoLayout, device: torch.device) -> Tensor:
    position = _video_positions(layout, device)
    size = torch.tensor(layout.tile, device=device)
    _, nh, nw = layout.tile_grid
    _, th, tw = layout.tile
    tile, inside = position // size, position % size
    tile_id = (tile[:, 0] * nh + tile[:, 1]) * nw + tile[:, 2]
    inside_id = (inside[:, 0] * th + inside[:, 1]) * tw + inside[:, 2]
    video = torch.argsort(tile_id * layout.tile_len + inside_id)
    index = torch.arange(layout.seq_len, device=device)
    index[layout.video_slice] = video + layout.video_slice.start
    return index


def _make_raster_index(layout: VideoLayout, device: torch.device) -> Tensor:
    return torch.argsort(_make_tile_index(layout, device))


_indices: dict[tuple[Callable[..., Tensor], VideoLayout, torch.device], Tensor] = {}


def _cached(make: Callable[[VideoLayout, torch.device], Tensor], layout: VideoLayout, device: torch.device) -> Tensor:
    """``make(layout, device)``, kept for the next call. Not while tracing or under a dispatch mode, whose tensors (fake
    ones, for instance) must not outlive it; and never as an inference tensor, which autograd would refuse later."""
    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return make(layout, device)
    key = (make, layout, device)
    if key not in _indices:
        with torch.inference_mode(False):
            _indices[key] = make(layout, device)
    return _indices[key]
