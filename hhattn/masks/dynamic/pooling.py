"""Scorers that look at a block's mean: mean_pool (VSA) and self_similarity (Sparge); and VSA's coarse attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hhattn.ops import _amp


def pool(x: Tensor, size: int) -> Tensor:
    """Means of every ``size`` tokens: [B, S, H, D] -> [B, H, n, D] float32 (float64 for float64). The last mean is over
    the tokens that there are."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    whole = x.shape[1] // size * size
    means = [x[:, :whole].unflatten(1, (-1, size)).mean(2, dtype=dtype)] if whole else []
    if whole < x.shape[1]:
        means.append(x[:, whole:].mean(1, keepdim=True, dtype=dtype))
    return torch.cat(means, 1).transpose(1, 2)


def log_counts(length: int, size: int, device: torch.device) -> Tensor:
    """[n] float32: the logarithm of the tokens in each block of ``size``."""
    start = torch.arange(0, length, size, device=device)
    return (length - start).clamp(max=size).log()


def block_scores(q_means: Tensor, k_means: Tensor, scale: float) -> Tensor:
    """``scale · q̄_i·k̄_j``: [B, H, nq, D], [B, H_kv, nk, D] -> [B, H, nq, nk]; heads of a group share their keys."""
    grouped = q_means.unflatten(1, (k_means.shape[1], -1))
    return (grouped * scale @ k_means[:, :, None].transpose(-1, -2)).flatten(1, 2)


@dataclass(frozen=True)
class mean_pool:
    """A block's mean stands for its tokens: ``log mass_ij = scale · q̄_i·k̄_j + log n_j``, n_j keys in block j.

    The coarse branch of Video Sparse Attention (arXiv 2505.13389); :func:`coarse_attention` is its output. One product
    of nq x nk means: torch's matrix products are what a kernel of ours would call, on a CPU and on a GPU.
    """

    pins = False

    def log_mass(self, q: Tensor, k: Tensor, block_size: tuple[int, int], scale: float) -> Tensor:
        """[B, H, nq, nk] float32, as in :mod:`hhattn.masks.dynamic.policies`."""
        scores = block_scores(pool(q, block_size[0]), pool(k, block_size[1]), scale)
        return scores + log_counts(k.shape[1], block_size[1], k.device)


@dataclass(frozen=True)
class self_similarity:
    """Means stand for blocks whose tokens are alike; the others are attended in any case.

    A block's self-similarity is the mean cosine of its pairs of tokens, ``|mean_t x_t / |x_t||²``, computed without the
    pairs. Where a block of keys has less than ``least``, every query attends it; where a block of queries has, it
    attends all keys; both are left out of the softmax. Else as :class:`mean_pool`. SpargeAttn (arXiv 2502.18137). torch
    operations throughout: two passes over q and k and a small product.

    least: in [-1, 1]; -1 makes it :class:`mean_pool`. Raises ValueError for another.
    """

    least: float = 0.5
    pins = True

    def __post_init__(self) -> None:
        if not -1 <= self.least <= 1:
            raise ValueError(f"least={self.least}: accepted is a cosine, in [-1, 1]")

    def log_mass(self, q: Tensor, k: Tensor, block_size: tuple[int, int], scale: float) -> Tensor:
        """[B, H, nq, nk] float32, as in :mod:`hhattn.masks.dynamic.policies`."""
        scores = mean_pool().log_mass(q, k, block_size, scale)
        q_alike, k_alike = (self._alike(x, size) for x, size in zip((q, k), block_size, strict=True))
        k_alike = k_alike.repeat_interleave(q.shape[2] // k.shape[2], 1)
        return scores.masked_fill(~(q_alike[..., :, None] & k_alike[..., None, :]), math.inf)

    def _alike(self, x: Tensor, size: int) -> Tensor:
        """[B, H, n] bool: blocks that their means stand for."""
        unit = torch.nn.functional.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
        return pool(unit, size).square().sum(-1) >= self.least


def coarse_attention(
    q: Tensor, k: Tensor, v: Tensor, block_size: tuple[int, int] = (64, 64), *, scale: float | None = None
) -> Tensor:
    """Attention of every query block's mean over the key blocks' means, given to all tokens of the block::

        out_i = Σ_j softmax_j(scale · q̄_i·k̄_j + log n_j) v̄_j

    The coarse output of Video Sparse Attention (arXiv 2505.13389), differentiable. q [B, Sq, H, D], k [B, Sk, H_kv, D],
    v [B, Sk, H_kv, Dv] -> [B, Sq, H, Dv] in q's dtype (autocast's where it is on); ``scale`` None is 1 / sqrt(D).

    Raises TypeError or ValueError for a scale that isn't a finite number, or v of another shape than k.
    """
    from hhattn.ops.block_sparse_attention import checked_scale

    if v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must have k's batch, tokens and heads, {tuple(k.shape[:3])}, got {tuple(v.shape)}")
    scale = checked_scale(scale, q)
    q, k, v = _amp.cast(q, k, v)
    with _amp.off(q.device):
        weights = mean_pool().log_mass(q, k, block_size, scale).softmax(-1)
        values = pool(v, block_size[1])
        out = (weights.unflatten(1, (v.shape[2], -1)) @ values[:, :, None]).flatten(1, 2)
    return out.repeat_interleave(block_size[0], 2)[:, :, : q.shape[1]].transpose(1, 2).to(q.dtype)
