"""Tokens sorted by meaning: k-means of queries and keys, and masks over the sorted tokens (SVG2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hhattn.masks.block_mask import BlockMask, make_shape
from hhattn.masks.dynamic._cells import Frame
from hhattn.masks.dynamic.policies import Policy
from hhattn.masks.dynamic.select import select_blocks
from hhattn.ops import _amp

_SCORES = 1 << 22  # token-to-centroid scores in flight
_SAMPLE = 16  # tokens a cluster that the centroids are fitted to


@dataclass(frozen=True)
class centroid:
    """k-means of the queries and of the keys of each head, so that tokens that attend alike, and are attended alike,
    stand together and whole blocks can be left out.

    Lloyd's steps from centroids spread over the tokens, or from those of an earlier step of the sampler, which need one
    step more: ``refine``. They are fitted to at most 16 tokens a cluster, evenly spaced, and then every token goes to
    the nearest. A centroid that no token is nearest to stays where it was. The result is the same every time, nothing
    is read from the device, and it is made of torch's matrix products and sums, on a CPU and on a GPU.

    Sparse VideoGen 2 (arXiv 2505.18875). It attends clusters of any size; blocks here are of one size, hence masks over
    the sorted tokens, whose blocks share in the mass of the clusters they hold: see :meth:`Clusters.select`.

    q_clusters, k_clusters: how many; None is one for each 256 queries and each 128 keys, at most 128 and 512.
    steps: Lloyd's steps from the start, refine: from the centroids of an earlier call.

    Raises ValueError for numbers below 1 (``refine`` below 0).
    """

    q_clusters: int | None = None
    k_clusters: int | None = None
    steps: int = 8
    refine: int = 1

    def __post_init__(self) -> None:
        for name, least in (("q_clusters", 1), ("k_clusters", 1), ("steps", 1), ("refine", 0)):
            number = getattr(self, name)
            if number is not None and number < least:
                raise ValueError(f"{name}={number}: accepted is {least} or more")

    @torch.no_grad()
    def cluster(self, q: Tensor, k: Tensor, previous: Clusters | None = None) -> Clusters:
        """Clusters of q [B, Sq, H, D] and k [B, Sk, H_kv, D], starting from those of ``previous`` where they fit.

        ``previous`` is for tensors of the same batch and heads; the numbers of tokens may differ. Raises ValueError for
        others.
        """
        old = (None, None) if previous is None else (previous.q_centroids, previous.k_centroids)
        sizes = (self.q_clusters or min(128, -(-q.shape[1] // 256)), self.k_clusters or min(512, -(-k.shape[1] // 128)))
        sides = zip((q, k), sizes, old, strict=True)
        with _amp.off(q.device):
            (q_centroids, q_labels), (k_centroids, k_labels) = (self._fit(x, count, start) for x, count, start in sides)
        q_order, k_order = (labels.sort(dim=-1, stable=True) for labels in (q_labels, k_labels))
        return Clusters(q_centroids, k_centroids, q_order.values, k_order.values, q_order.indices, k_order.indices)

    def _fit(self, x: Tensor, count: int, start: Tensor | None) -> tuple[Tensor, Tensor]:
        """(centroids [B, H, C, D], labels [B, H, S]) of x [B, S, H, D], in float32 (float64 for float64)."""
        x = (x if x.dtype == torch.float64 else x.float()).transpose(1, 2).contiguous()
        (batch, heads, length, dim), steps = x.shape, self.steps if start is None else self.refine
        count = min(count, length) if start is None else start.shape[2]
        if start is not None and start.shape != (batch, heads, count, dim):
            raise ValueError(f"previous has centroids {tuple(start.shape)}, these are {(batch, heads, count, dim)}")
        centroids = x[:, :, torch.arange(count, device=x.device) * length // count] if start is None else start
        sample = x[:, :, :: max(1, length // (_SAMPLE * count))].contiguous()
        for _ in range(steps):
            sums, sizes = _sums(sample, _nearest(sample, centroids), count)
            centroids = (sums / sizes.clamp(min=1)[..., None]).where(sizes[..., None] > 0, centroids)
        return centroids, _nearest(x, centroids)


@dataclass(frozen=True, eq=False)
class Clusters:
    """Clusters of queries and keys, head by head, and the order of tokens sorted by them.

    q_centroids [B, H, Cq, D], k_centroids [B, H_kv, Ck, D]: the means.
    q_labels [B, H, Sq], k_labels [B, H_kv, Sk]: clusters of the *sorted* tokens, ascending.
    q_order, k_order: likewise, the place that each sorted token came from.
    """

    q_centroids: Tensor
    k_centroids: Tensor
    q_labels: Tensor
    k_labels: Tensor
    q_order: Tensor
    k_order: Tensor

    def queries(self, x: Tensor) -> Tensor:
        """[B, Sq, H, ...] sorted by cluster, each head in its own order."""
        return _sorted(x, self.q_order)

    def keys(self, x: Tensor) -> Tensor:
        """[B, Sk, H_kv, ...] likewise: keys, and the values that go with them."""
        return _sorted(x, self.k_order)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`queries`."""
        place = torch.arange(self.q_order.shape[-1], device=x.device).expand_as(self.q_order)
        return _sorted(x, torch.empty_like(self.q_order).scatter_(-1, self.q_order, place))

    @torch.no_grad()
    def select(self, policy: Policy, block_size: tuple[int, int] = (64, 64), scale: float | None = None) -> BlockMask:
        """The mask over sorted tokens. With P the softmax over centroids, clusters of keys weighted by their sizes::

            P_ab = softmax_b(scale · c_a·c_b + log n_b)      mass_ij = Σ_a Σ_b w_ia P_ab w'_jb

        w_ia is the share of block i's queries that are in cluster a, w'_jb the share of cluster b's keys that are in
        block j. So rows of ``mass`` sum to 1 over blocks, and a policy keeps the fewest blocks for the mass it asks
        for; keeping every block that a chosen pair of clusters touches would keep more of them for the same mass.
        ``scale`` None is 1 / sqrt(D).
        """
        scale = self.q_centroids.shape[-1] ** -0.5 if scale is None else scale
        shape = make_shape(self.q_labels.shape[-1], self.k_labels.shape[-1], block_size)
        held, holding = self._shares(shape.bq, shape.bk)
        sizes = _sizes(self.k_labels, self.k_centroids.shape[2])

        def log_mass(heads: slice, kv: slice) -> Tensor:
            n_kv = kv.stop - kv.start
            centroids, weights = (x[:, heads].unflatten(1, (n_kv, -1)) for x in (self.q_centroids, held))
            with _amp.off(held.device):
                scores = centroids * scale @ self.k_centroids[:, kv, None].transpose(-1, -2)
                mass = weights @ (scores + sizes[:, kv, None, None].log()).softmax(-1) @ holding[:, kv, None]
            return mass.float().clamp(min=torch.finfo(torch.float32).tiny).log().flatten(1, 2)

        frame = Frame(shape, self.q_labels.device, None, None)
        like = (self.q_labels.transpose(1, 2), self.k_labels.transpose(1, 2))
        lists = select_blocks(log_mass, *like, shape, policy, policy.width(shape.nk), frame)
        return BlockMask(*lists, (shape.bq, shape.bk), shape.q_len, shape.k_len)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, scale: float | None = None) -> Tensor:
        """:func:`hhattn.block_sparse_attention` under a mask over sorted tokens, of tokens in their own order."""
        from hhattn.ops.block_sparse_attention import block_sparse_attention

        out = block_sparse_attention(self.queries(q), self.keys(k), self.keys(v), mask, scale=scale)
        return self.restore(out)  # type: ignore[arg-type]

    def _shares(self, bq: int, bk: int) -> tuple[Tensor, Tensor]:
        """(w [B, H, nq, Cq], w' [B, H_kv, Ck, nk])."""
        held = _in_blocks(self.q_labels, bq, self.q_centroids.shape[2]).to(self.q_centroids.dtype)
        holding = _in_blocks(self.k_labels, bk, self.k_centroids.shape[2]).to(self.k_centroids.dtype)
        sizes = holding.sum(-2, keepdim=True).clamp(min=1)
        return held / held.sum(-1, keepdim=True), (holding / sizes).transpose(-1, -2)


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    """Of each row of x [B, H, S, D] the nearest of the centroids [B, H, C, D]; of equal ones the first: [B, H, S]."""
    half = centroids.square().sum(-1)[:, :, None] / 2
    step, columns = max(1, _SCORES // half.numel()), centroids.transpose(-1, -2)
    # the index of max, since torch's argmax takes twice as long on a CPU
    return torch.cat([(part @ columns).sub_(half).max(-1).indices for part in x.split(step, 2)], -1)


def _sizes(labels: Tensor, count: int) -> Tensor:
    """float32 [B, H, C]: how many of ``labels`` [B, H, S] say each cluster. Whole numbers: exact in any order."""
    sizes = torch.zeros(*labels.shape[:2], count, dtype=torch.float32, device=labels.device)
    return sizes.scatter_add_(-1, labels, torch.ones_like(labels, dtype=sizes.dtype))


def _sums(x: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(sums [B, H, C, D], sizes [B, H, C]) of the rows of x [B, H, S, D] by label, in the same order every time."""
    batch, heads, _, dim = x.shape
    cluster = (labels + torch.arange(batch * heads, device=x.device).view(batch, heads, 1) * count).flatten()
    sums, rows = x.new_zeros(batch * heads * count, dim), x.flatten(0, 2)
    if x.is_cuda:  # index_add_ adds atomically there; this sorts first
        sums.index_put_((cluster,), rows, accumulate=True)
    else:
        sums.index_add_(0, cluster, rows)
    return sums.view(batch, heads, count, dim), _sizes(labels, count)


def _in_blocks(labels: Tensor, size: int, count: int) -> Tensor:
    """float32 [B, H, n, C]: how many of each block's tokens are in each cluster."""
    n = -(-labels.shape[-1] // size)
    block = torch.arange(labels.shape[-1], device=labels.device) // size
    return _sizes(block * count + labels, n * count).unflatten(-1, (n, count))


def _sorted(x: Tensor, order: Tensor) -> Tensor:
    """x [B, S, H, ...] with the tokens of each head in ``order`` [B, H, S]."""
    batch, length, heads = x.shape[:3]
    of_batch = torch.arange(batch, device=x.device)[:, None, None] * length
    row = (of_batch + order.transpose(1, 2)) * heads + torch.arange(heads, device=x.device)
    return x.flatten(0, 2).index_select(0, row.flatten()).view(x.shape)
