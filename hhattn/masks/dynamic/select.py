"""Dynamic masks: a scorer guesses where the attention goes, a policy keeps the best blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from hhattn.layout import Order, VideoLayout, check_order
from hhattn.masks import _lists
from hhattn.masks._blocks import Shape
from hhattn.masks.block_mask import BlockMask, make_shape, same_tokens
from hhattn.masks.dynamic._cells import Frame
from hhattn.masks.dynamic.policies import Policy
from hhattn.ops import _amp

_SCORES = 1 << 22  # block scores made at once: 16 MB
_RANKED = 1 << 20  # and of these ranked and listed, which takes ten times the memory


class Scorer(Protocol):
    """A guess of the attention mass between blocks.

    ``pins``: whether it may say +inf, a block that is kept in any case. ``log_mass(q, k, block_size, scale)`` of
    q [B, Sq, H, D] and k [B, Sk, H_kv, D] is [B, H, nq, nk] float32: the logarithm of each key block's share of the
    query block's attention, up to a constant a row; +inf and -inf as in :mod:`hhattn.masks.dynamic.policies`.
    """

    @property
    def pins(self) -> bool: ...

    def log_mass(self, q: Tensor, k: Tensor, block_size: tuple[int, int], scale: float) -> Tensor: ...


@torch.no_grad()
def select(
    q: Tensor,
    k: Tensor,
    scorer: Scorer,
    policy: Policy,
    *,
    block_size: tuple[int, int] = (64, 64),
    scale: float | None = None,
    keep: BlockMask | None = None,
    within: BlockMask | None = None,
    order: Order = "raster",
    layout: VideoLayout | None = None,
    k_layout: VideoLayout | None = None,
) -> BlockMask:
    """The mask, for each batch entry and head, of the blocks that ``policy`` keeps by what ``scorer`` says of q and k::

        mask = masks.select(q, k, masks.mean_pool(), masks.top_k(ratio=0.25))
        out = hhattn.block_sparse_attention(q, k, v, mask)

    A selected block is attended in whole (as far as ``within`` goes). Nothing is read from the device: the lists are as
    wide as the policy's largest row. The choice is the same every time, and has no gradient; only tokens that exist
    count, so ragged ends and any length are fine. Scores of few heads are in flight at once, whatever the length.

    Args:
        q: [B, Sq, H, D]; k: [B, Sk, H_kv, D], H a multiple of H_kv.
        scorer: :class:`mean_pool`, :class:`self_similarity`, :class:`antidiagonal`, or any :class:`Scorer`.
        policy: :class:`top_k`, :class:`top_p` or :class:`threshold`.
        block_size: (bq, bk), tokens in a block.
        scale: of the attention's scores; None is 1 / sqrt(D).
        keep: pairs attended in any case, on top of what is selected: the first frame, the diagonal, text.
        within: pairs outside it are not selected: ``masks.block_causal(...)``, for instance.
        order, layout, k_layout: the order that q and k are in, and their layouts, for the mask to know. Blocks of
            tokens in tile order (``layout.to_tiles(q)``) are compact boxes of the video, and select better.

    Raises:
        ValueError: shapes that don't fit one another, a mask for other tokens, blocks or order, an unknown order.
    """
    check_order("order", order)
    shape = _checked(q, k, block_size, order, keep, within)
    from hhattn.ops.block_sparse_attention import checked_scale

    checked_scale(scale, q)
    for name, mask in (("keep", keep), ("within", within)):
        if mask is not None and not same_tokens(mask.layout, layout, order):
            raise ValueError(f"{name} is a mask for {mask.layout}, and layout={layout}")
    scale = q.shape[3] ** -0.5 if scale is None else scale

    def log_mass(heads: slice, kv: slice) -> Tensor:
        with _amp.off(q.device):
            return scorer.log_mass(q[:, :, heads], k[:, :, kv], (shape.bq, shape.bk), scale)

    most = policy.most(shape.nk) if scorer.pins else policy.width(shape.nk)
    lists = select_blocks(log_mass, q, k, shape, policy, most, Frame(shape, q.device, keep, within))
    return BlockMask(*lists, (shape.bq, shape.bk), shape.q_len, shape.k_len, order, layout, k_layout)


def select_blocks(
    log_mass: Callable[[slice, slice], Tensor],
    q: Tensor,
    k: Tensor,
    shape: Shape,
    policy: Policy,
    most: int,
    frame: Frame,
) -> _lists.Lists:
    """The lists of the mask, by ``log_mass(query heads, key heads)`` [B, H, nq, nk] of the heads of ``q`` and ``k``,
    some at a time; at most ``most`` blocks in a row."""
    wide, nq, size = frame.widths(most), shape.nq, (q.shape[0], q.shape[2], shape.nq)
    counts, full_counts = (torch.zeros(size, dtype=torch.int32, device=q.device) for _ in range(2))
    columns, tiles, full = (
        torch.zeros(*size, n, dtype=torch.int32, device=q.device) for n in (wide[0], wide[0], wide[1])
    )
    for heads, kv in _heads(q.shape[2], k.shape[2], max(1, _SCORES // (q.shape[0] * nq * shape.nk))):
        scores = log_mass(heads, kv)
        some = max(1, _RANKED // scores[:, :, 0].numel())  # rows at once
        for start in range(0, nq, some):
            rows = slice(start, min(start + some, nq))
            allowed = frame.allowed(heads, rows)
            mass = scores[:, :, rows].masked_fill(~allowed.touched, -math.inf)
            cells = frame.attended(policy.keep(mass), allowed, heads, rows)
            at = (slice(None), heads, rows)
            counts[at], columns[at], tiles[at] = _lists.listed(cells.tile >= 0, wide[0], cells.tile)
            full_counts[at], full[at] = _lists.listed(cells.full, wide[1])
    return counts, columns, tiles, full_counts, full, frame.table


def _heads(n_q: int, n_kv: int, most: int) -> Iterator[tuple[slice, slice]]:
    """At most ``most`` query heads at a time, at least one, and their key heads: whole groups, or parts of one."""
    group = n_q // n_kv
    if most >= group:
        step = most // group
        for kv in range(0, n_kv, step):
            last = min(kv + step, n_kv)
            yield slice(kv * group, last * group), slice(kv, last)
        return
    for kv in range(n_kv):
        for start in range(kv * group, (kv + 1) * group, most):
            yield slice(start, min(start + most, (kv + 1) * group)), slice(kv, kv + 1)


def _checked(
    q: Tensor,
    k: Tensor,
    block_size: tuple[int, int],
    order: str,
    keep: BlockMask | None,
    within: BlockMask | None,
) -> Shape:
    for name, x in (("q", q), ("k", k)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have shape [B, S, H, D], got {tuple(x.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"k must have q's batch and head dim and a divisor of its heads, got q {tuple(q.shape)}, k {tuple(k.shape)}"
        )
    shape = make_shape(q.shape[1], k.shape[1], block_size)
    for name, mask in (("keep", keep), ("within", within)):
        if mask is None:
            continue
        if (mask.q_len, mask.k_len, *mask.block_size) != shape:
            raise ValueError(
                f"{name} is for {mask.q_len}x{mask.k_len} tokens in blocks of {mask.block_size}, "
                f"q and k are {shape.q_len}x{shape.k_len} in blocks of {(shape.bq, shape.bk)}"
            )
        if mask.order != order:
            raise ValueError(f"{name} is of tokens in {mask.order} order, and order={order!r}: accepted is one order")
        batch, heads = mask.kv_num_blocks.shape[:2]
        if batch not in (1, q.shape[0]) or heads not in (1, q.shape[2]):
            raise ValueError(
                f"{name} must have batch 1 or {q.shape[0]} and heads 1 or {q.shape[2]}, got {batch} and {heads}"
            )
        if mask.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {mask.device}")
    return shape
