"""Tables of bit tiles: packing, counting, and keeping one copy of each."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK = 1 << 22  # elements handled at once where bits are expanded to bytes


def pack(dense: Tensor) -> Tensor:
    """bool [..., bq, bk] -> uint8 [..., bq, ceil(bk / 8)]; bit j of byte i is column 8 i + j, missing columns are 0."""
    padded = torch.nn.functional.pad(dense, (0, -dense.shape[-1] % 8))
    weights = 2 ** torch.arange(8, dtype=torch.uint8, device=dense.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack(tiles: Tensor, bk: int) -> Tensor:
    """uint8 [..., bq, ceil(bk / 8)] -> bool [..., bq, bk]: the inverse of :func:`pack`."""
    shifts = torch.arange(8, dtype=torch.uint8, device=tiles.device)
    bits = ((tiles[..., None] >> shifts) & 1).flatten(-2)
    return bits[..., :bk].to(torch.bool)


def popcount(tiles: Tensor) -> Tensor:
    """uint8 [N, bq, w] -> int64 [N]: bits set in each tile."""
    of_byte = unpack(torch.arange(256, dtype=torch.uint8, device=tiles.device)[:, None], 8).sum(-1, dtype=torch.int16)
    step = max(1, _CHUNK // max(1, tiles[0].numel() if len(tiles) else 1))
    counts = [of_byte[part.flatten(1).int()].sum(-1, dtype=torch.int64) for part in tiles.split(step)]
    return torch.cat(counts) if counts else tiles.new_zeros(0, dtype=torch.int64)


def unique_numbers(x: Tensor, bound: int) -> tuple[Tensor, Tensor]:
    """Distinct numbers of ``x`` [N], ascending, and each entry's place among them; 0 <= x < ``bound``. Without sorting,
    which takes the longest of all, where there are enough entries to make a table worth while."""
    if bound > len(x):
        return torch.unique(x, return_inverse=True)
    present = torch.zeros(bound, dtype=torch.bool, device=x.device)
    present[x] = True
    return present.nonzero().squeeze(1), (present.cumsum(0) - 1)[x]


def unique_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows of ``rows`` [N, w] uint8 -> (``first`` [U], ``inverse`` [N]) with ``rows[first][inverse] == rows``.

    Rows are sorted by a 64-bit hash, which is many times faster than sorting the rows; every row is then compared with
    the one that stands for it, and should two ever collide, the rows themselves are sorted. So the result is exact.
    """
    n = len(rows)
    words = torch.nn.functional.pad(rows.flatten(1), (0, -rows.flatten(1).shape[1] % 8)).contiguous().view(torch.int64)
    generator = torch.Generator().manual_seed(0x5EED)
    factors = torch.randint(-(2**62), 2**62, (words.shape[1],), generator=generator, device="cpu")
    factors = factors.to(rows.device) * 2 + 1
    mixed = (words ^ (words >> 29)) * factors
    distinct, inverse = torch.unique((mixed ^ (mixed >> 32)).sum(-1), return_inverse=True)
    first = _first(inverse, len(distinct), n)
    if not torch.equal(words[first[inverse]], words):
        distinct, inverse = torch.unique(words, dim=0, return_inverse=True)
        first = _first(inverse, len(distinct), n)
    return first, inverse


def _first(inverse: Tensor, n_distinct: int, n: int) -> Tensor:
    """Smallest row number of each class."""
    start = torch.full((n_distinct,), n, dtype=torch.int64, device=inverse.device)
    return start.scatter_reduce(0, inverse, torch.arange(n, device=inverse.device), "amin")


def unique_tiles(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """[N, bq, w] -> (table of distinct tiles [U, bq, w], int64 [N] of each tile's place in it)."""
    first, inverse = unique_rows(tiles.flatten(1))
    return tiles[first], inverse
