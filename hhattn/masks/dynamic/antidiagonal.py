"""A scorer that looks at every token, at a stride: XAttention's antidiagonal sums."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_SCORES = 1 << 21  # scores in flight: 8 MB of float32


@dataclass(frozen=True)
class antidiagonal:
    """The mean along the antidiagonal of each ``stride x stride`` square of scores stands for the square.

    Tokens go in groups of ``stride``; concatenating the keys of a group in order, and its queries in reverse, makes the
    sum along the antidiagonal one product of vectors of ``stride · D``::

        s_ab = scale / stride · Σ_p q_{a, stride-1-p}·k_{b, p}      p_ab = softmax_b(s_ab + log n_b)
        mass_ij = mean of Σ_{b in block j} p_ab over the queries of block i

    so each token takes part, at 1 / stride of the cost of the scores. The last group is filled up with its own tokens
    in turn: nothing but real pairs is counted, and n_b is how many keys are real. XAttention (arXiv 2503.16428). A
    matrix product, a softmax and a sum, hence torch's own: in q's dtype on a GPU, in float32 on a CPU, whose products
    of halves are slow; a few MB of scores at a time.

    stride: divides both sides of the blocks. Raises ValueError below 1, and where it doesn't divide.
    """

    stride: int = 16
    pins = False

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise ValueError(f"stride={self.stride}: accepted is 1 or more")

    def log_mass(self, q: Tensor, k: Tensor, block_size: tuple[int, int], scale: float) -> Tensor:
        """[B, H, nq, nk] float32, as in :mod:`hhattn.masks.dynamic.policies`."""
        (bq, bk), stride = block_size, self.stride
        if bq % stride or bk % stride:
            raise ValueError(f"stride={stride}: accepted are divisors of both sides of block_size={block_size}")
        queries, q_counts = self._groups(q, reverse=True)
        keys, k_counts = self._groups(k, reverse=False)
        n_kv, nk, per_key = keys.shape[1], -(-k.shape[1] // bk), bk // stride
        queries = queries.unflatten(1, (n_kv, -1)) * (scale / stride)  # before the sum, which float16 couldn't hold
        # whole query blocks at a time, as many as keep the scores in flight few
        per_query = bq // stride
        step = max(1, _SCORES // (q.shape[0] * q.shape[2] * len(k_counts) * per_query)) * per_query
        rows = []
        for part, weight in zip(queries.split(step, 3), q_counts.split(step), strict=True):
            # heads of a group are more rows of one product
            scores = (part.flatten(2, 3) @ keys.transpose(-1, -2)).float().unflatten(2, part.shape[2:4])
            mass = scores.add_(k_counts.log()).softmax(-1)
            mass = F.pad(mass, (0, nk * per_key - mass.shape[-1])).unflatten(-1, (nk, per_key)).sum(-1)
            rows.append(_block_means(mass, weight, per_query))
        return torch.cat(rows, 3).flatten(1, 2).clamp(min=torch.finfo(torch.float32).tiny).log()

    def _groups(self, x: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        """[B, S, H, D] -> ([B, H, G, stride D], tokens in each group [G] float32)."""
        length, stride = x.shape[1], self.stride
        start = torch.arange(0, length, stride, device=x.device)
        counts = (length - start).clamp(max=stride)
        place = torch.arange(stride, device=x.device)
        place = (place.flip(0) if reverse else place) % counts[:, None]
        if reverse or length % stride:
            x = x.index_select(1, (start[:, None] + place).flatten())
        x = x if x.is_cuda or x.dtype == torch.float64 else x.float()
        return x.unflatten(1, (-1, stride)).permute(0, 3, 1, 2, 4).flatten(3), counts.float()


def _block_means(mass: Tensor, weight: Tensor, size: int) -> Tensor:
    """Means over every ``size`` groups [..., G, nk] by the tokens in them [G]: [..., ceil(G / size), nk]."""
    short = -len(weight) % size
    weight = F.pad(weight, (0, short)).view(-1, size)
    mass = F.pad(mass, (0, 0, 0, short)).unflatten(-2, (-1, size))
    return (mass * weight[..., None]).sum(-2) / weight.sum(-1)[:, None]
