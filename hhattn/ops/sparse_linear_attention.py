"""Sparse-linear attention: softmax attention where it matters, linear attention where it hardly does."""

from __future__ import annotations

import math
import numbers
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hhattn import _dispatch
from hhattn.layout import Order
from hhattn.masks.block_mask import BlockMask, same_tokens
from hhattn.ops import _check, _marginal
from hhattn.ops import block_sparse_attention as _sparse
from hhattn.ops._triton import NAMESPACE
from hhattn.reference.block_linear_attention import FEATURE_MAPS as _MAPS

OP = _marginal.OP
FEATURE_MAPS = ("softmax", "elu1", "relu", "relu2")  # those that are never negative, nor are the weights then


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    critical: BlockMask,
    marginal: BlockMask | None = None,
    *,
    proj: Tensor | None = None,
    alpha: float | Tensor | None = None,
    gate: Tensor | None = None,
    feature_map: str = "softmax",
    scale: float | None = None,
    eps: float = 1e-15,
    order: Order | None = None,
    impl: str | None = None,
) -> Tensor:
    """Softmax attention over the critical pairs, linear attention over the marginal ones, nothing over the rest, which
    are negligible. With φ = ``feature_map``::

        s_i = Σ_{j critical} softmax_j(scale · q_i·k_j) v_j
        l_i = Σ_{j marginal} φ(q_i)·φ(k_j) v_j / (Σ_{j marginal} φ(q_i)·φ(k_j) + eps)
        out = α s + (1 - α) l'  with ``alpha``,  s + l'  without,    l' = gate · proj l

    The sum Σ φ(k_j) v_jᵀ over a block of keys is the same for every query, so a marginal block costs a query block
    D x Dv additions instead of bq x bk scores. Pairs are exact to the token in both branches. What stands at negligible
    positions doesn't matter, infinities and NaNs included, but for Triton's kernels and for such a token's own gradient
    in the reference. A query without critical keys has s = 0, one without
    marginal keys, or whose weights are all 0, l = 0. Sums are float32; gradients are the same bits every time.

    Args:
        q: [B, Sq, H, D]; k: [B, Sk, H_kv, D]; v: [B, Sk, H_kv, Dv]; D, Dv ≤ 256, H a multiple of H_kv. float32, float16
            or bfloat16 (float64 for checking gradients), one dtype for the three; under autocast they are cast to its
            dtype, float64 excepted.
        critical: the pairs of the softmax branch; batch B or 1, heads H or 1.
        marginal: the pairs of the linear branch, in blocks of the same size; batch and heads likewise. None: every pair
            that isn't critical, so that none are negligible. A pair in both masks counts in both branches: nothing is
            taken out, so that a mask of every pair gives the linear branch that the paper's published code runs.
        proj: [Dv, Dv] or [H, Dv, Dv], applied to l as the weight of a linear layer, rows for outputs; cast to q's
            dtype. The paper's combiner, learned from zeros.
        alpha: a number, or a tensor [], [H] or [B, Sq, H], a row's share of the softmax branch, taken as it is (the
            combiner of SLA2).
        gate: [B, Sq, H] or [B, Sq, H, Dv], multiplies l; taken as it is, no sigmoid.
        feature_map: "softmax" (over D; the paper's best), "elu1" (elu + 1), "relu" or "relu2" (squared relu).
        scale: of the softmax branch's scores; None is 1 / sqrt(D).
        eps: added to the linear branch's denominator.
        order: the order q, k, v and gate (and an ``alpha`` of rows) are in, "raster" or "tile"; out comes in the same.
            None is the masks' own. Another than theirs needs masks made from a :class:`hhattn.VideoLayout`.
        impl: "reference", "cpp", "triton"; None chooses.

    Returns:
        out [B, Sq, H, Dv] in q's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; masks that differ in block size or
            order, or that can't convert to ``order``.
        RuntimeError: ``impl`` can't run this call.

    Source: SLA (Zhang et al., 2025, arXiv:2509.24006); the share α: SLA2 (arXiv:2602.12675).
    """
    q, k, v = _sparse.checked(q, k, v)
    _sparse.check_mask("critical", critical, q, k)
    if marginal is not None:
        _sparse.check_mask("marginal", marginal, q, k)
        _check_alike(critical, marginal)
    _check.one_of("feature_map", feature_map, FEATURE_MAPS)
    _check.eps(eps)
    _check_combiners(proj, alpha, gate, q, v)
    convert = _sparse.conversions(critical, order)
    if convert:
        q, k, v = convert.q_in(q), convert.k_in(k), convert.k_in(v)
    scale = _sparse.checked_scale(scale, q)
    softmax, linear = _dispatch.call(OP, impl, q, k, v, critical, marginal, scale, feature_map, float(eps))
    if convert:
        softmax, linear = convert.q_out(softmax), convert.q_out(linear)
    return _combined(softmax, linear, proj, alpha, gate)


def _check_alike(critical: BlockMask, marginal: BlockMask) -> None:
    for name in ("block_size", "order"):
        ours, theirs = getattr(critical, name), getattr(marginal, name)
        if ours != theirs:
            raise ValueError(f"marginal must have critical's {name}, {ours}, got {theirs}")
    for name in ("layout", "k_layout"):
        ours, theirs = getattr(critical, name), getattr(marginal, name)
        if not same_tokens(ours, theirs, critical.order):
            raise ValueError(f"marginal must have critical's {name}, {ours}, got {theirs}")


def _check_combiners(
    proj: Tensor | None, alpha: float | Tensor | None, gate: Tensor | None, q: Tensor, v: Tensor
) -> None:
    rows, heads, width = tuple(q.shape[:3]), q.shape[2], v.shape[3]
    accepted: dict[str, tuple[object, str, list[tuple[int, ...]]]] = {
        "proj": (proj, "[Dv, Dv] or [H, Dv, Dv]", [(width, width), (heads, width, width)]),
        "alpha": (alpha, "[], [H] or [B, Sq, H]", [(), (heads,), rows]),
        "gate": (gate, "[B, Sq, H] or [B, Sq, H, Dv]", [rows, (*rows, width)]),
    }
    for name, (value, meaning, shapes) in accepted.items():
        if value is None:
            continue
        if name == "alpha" and isinstance(value, numbers.Real):
            if not math.isfinite(value):
                raise ValueError(f"alpha must be finite, got {value!r}")
            continue
        _check.floating(name, value)
        assert isinstance(value, Tensor)
        if tuple(value.shape) not in shapes:
            listed = " or ".join(map(str, shapes))
            raise ValueError(f"{name} must have shape {meaning} = {listed}, got {tuple(value.shape)}")
        _check.device(name, value, "q", q)


def _combined(
    softmax: Tensor, linear: Tensor, proj: Tensor | None, alpha: float | Tensor | None, gate: Tensor | None
) -> Tensor:
    """Both branches [B, Sq, H, Dv] as one, in their dtype, sums in the widest of what takes part."""
    dtype = softmax.dtype
    if proj is not None:
        proj = proj.to(dtype)
        linear = linear @ proj.T if proj.ndim == 2 else torch.einsum("bshd,hed->bshe", linear, proj)
    if gate is not None:
        linear = linear * (gate if gate.ndim == 4 else gate[..., None])
    if alpha is None:
        return (softmax + linear).to(dtype)
    if isinstance(alpha, Tensor):
        alpha = alpha[..., None]
    return (alpha * softmax + (1 - alpha) * linear).to(dtype)


# ---- implementations: both branches, each [B, Sq, H, Dv] ----


def _pairs(critical: BlockMask, marginal: BlockMask | None) -> tuple[tuple[Tensor, ...], int, bool]:
    """The marginal pairs as the operators take them: lists, bk, and whether it is all others that are meant."""
    mask = critical if marginal is None else marginal
    return _sparse.lists_of(mask), mask.block_size[1], marginal is None


@_dispatch.register(OP, "reference")
def _run_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    critical: BlockMask,
    marginal: BlockMask | None,
    scale: float,
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    softmax, _ = _sparse.run_reference(q, k, v, critical, scale)
    return softmax, _marginal.reference(q, k, v, *_pairs(critical, marginal), feature_map, eps)


def _run(
    namespace: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    critical: BlockMask,
    marginal: BlockMask | None,
    scale: float,
    feature_map: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    softmax, _ = _sparse.run(namespace, q, k, v, critical, scale)
    lists, *which = _pairs(critical, marginal)
    operator = getattr(getattr(torch.ops, namespace), _marginal.NAME)
    return softmax, operator(q, k, v, *lists, *which, list(_MAPS).index(feature_map), eps)[0]


def _can_run(sparse: Any, *args: Any) -> str | None:
    return sparse(*args[:3])


for _name, _namespace, _sparse_can_run in (
    ("cpp", "hhattn", _sparse.cpp_can_run),
    ("triton", NAMESPACE, _sparse.triton_can_run),
):
    _dispatch.register(OP, _name, partial(_can_run, _sparse_can_run))(partial(_run, _namespace))
