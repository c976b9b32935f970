"""Which blocks to keep, given a guess of the attention mass that each one holds: top-k, top-p, a threshold.

Scores are log-mass [..., nk], one row a query block; masses are their softmax over the row. +inf is a block that is
kept whatever happens and takes no part in the softmax; -inf one that is never kept. Blocks are ranked by a stable sort,
so that of equal ones the first is kept, every time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

Share = int | float
_ONE = 1 << 40  # a row's mass
_P = TypeVar("_P", bound="Policy")


def _count(share: Share, nk: int) -> int:
    """Blocks that ``share`` of ``nk`` means: an int itself, a float that share, rounded, but never to no block."""
    return min(nk, max(1, round(share * nk)) if isinstance(share, float) else share)


def _check_share(name: str, share: object, least: int = 1) -> None:
    number = isinstance(share, (int, float)) and not isinstance(share, bool)
    if not number or (isinstance(share, float) and not 0 < share <= 1) or (isinstance(share, int) and share < least):
        raise ValueError(
            f"{name}={share!r}: accepted are blocks, an int of at least {least}, or a share of a row, a float in (0, 1]"
        )


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What policies share: the least and the most blocks of a row. An int is a number of blocks, a float a share of the
    row's, rounded, but never to no block.

    at_least: kept in any case, the best first (but none that may not be kept).
    at_most: a limit that nothing exceeds, always-kept blocks included. It is also how wide the mask's lists are made,
        since their true length is known on the device only; None is a whole row.
    """

    at_least: Share = 1
    at_most: Share | None = None

    def __post_init__(self) -> None:
        _check_share("at_least", self.at_least, 0)
        if self.at_most is not None:
            _check_share("at_most", self.at_most)

    def keep(self, log_mass: Tensor) -> Tensor:
        """bool like ``log_mass`` [..., nk]: the blocks of each row that are kept."""
        nk = log_mass.shape[-1]
        ranked, index = log_mass.sort(dim=-1, descending=True, stable=True)
        always, never = ranked == math.inf, ranked == -math.inf
        mass = ranked.masked_fill(always, -math.inf).softmax(-1).masked_fill(always | never, 0)
        rank = torch.arange(nk, dtype=torch.int32, device=log_mass.device)
        wanted = self._wanted(mass, rank - always.sum(-1, keepdim=True, dtype=torch.int32)) | always
        wanted = (wanted | (rank < _count(self.at_least, nk))) & (rank < self.most(nk)) & ~never
        return torch.zeros_like(wanted).scatter_(-1, index, wanted)

    def most(self, nk: int) -> int:
        """The most blocks that a row of ``nk`` can keep, always-kept ones included."""
        return nk if self.at_most is None else _count(self.at_most, nk)

    def width(self, nk: int) -> int:
        """The most blocks that a row of ``nk`` can keep where none is always kept."""
        return self.most(nk)

    def with_density(self: _P, density: float) -> _P:
        """The same policy with at most this share of the blocks."""
        return replace(self, at_most=float(density))

    def _wanted(self, mass: Tensor, rank: Tensor) -> Tensor:
        """The blocks that are wanted, of rows with the largest ``mass`` first, ``rank`` from 0 among those scored."""
        raise NotImplementedError


@dataclass(frozen=True)
class top_k(Policy):
    """The ``k`` blocks of the largest mass: a share of a row's blocks (``ratio``, in (0, 1]; rounded, never to none) or
    a number (``blocks``). Always-kept blocks come on top.

    Raises ValueError unless exactly one of the two is given, within its range.

    Example:
        >>> top_k(ratio=0.25), top_k(blocks=8, at_least=0)
        (top_k(ratio=0.25), top_k(blocks=8, at_least=0))
    """

    ratio: float | None = None
    blocks: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.ratio is None) == (self.blocks is None):
            raise ValueError(f"ratio={self.ratio}, blocks={self.blocks}: accepted is one of the two")
        if self.ratio is not None and not 0 < self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio}: accepted is a share of a row's blocks, in (0, 1]")
        if self.blocks is not None:
            _check_share("blocks", int(self.blocks))

    def k(self, nk: int) -> int:
        """Blocks kept of a row of ``nk``."""
        return _count(float(self.ratio) if self.ratio is not None else int(self.blocks or 0), nk)

    def width(self, nk: int) -> int:
        """The most blocks that a row of ``nk`` can keep where none is always kept."""
        return min(self.most(nk), max(self.k(nk), _count(self.at_least, nk)))

    def with_density(self, density: float) -> top_k:
        """This share of the blocks instead."""
        return replace(self, ratio=float(density), blocks=None)

    def _wanted(self, mass: Tensor, rank: Tensor) -> Tensor:
        return rank < self.k(mass.shape[-1])


@dataclass(frozen=True)
class top_p(Policy):
    """The fewest blocks that hold at least the share ``p`` of a row's mass, in (0, 1]; 1 keeps every block.

    With ``at_most`` a row that needs more blocks keeps that many, its best. Give it for long videos: without it the
    mask's lists have room for every block, 1 GB for 20 heads of 220,800 tokens.

    Raises ValueError for another ``p``.
    """

    p: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.p <= 1:
            raise ValueError(f"p={self.p}: accepted is a share of the mass, in (0, 1]")

    def _wanted(self, mass: Tensor, rank: Tensor) -> Tensor:
        shares = (mass * _ONE).long()  # whole numbers add up alike on every device
        before = shares.cumsum(-1) - shares  # held by the better ones
        return (before < round(self.p * _ONE)) | (self.p >= 1)


@dataclass(frozen=True)
class threshold(Policy):
    """Every block with at least the share ``mass`` of its row's mass, in [0, 1].

    Raises ValueError for another ``mass``.
    """

    mass: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.mass <= 1:
            raise ValueError(f"mass={self.mass}: accepted is a share of the mass, in [0, 1]")

    def _wanted(self, mass: Tensor, rank: Tensor) -> Tensor:
        return mass >= self.mass
