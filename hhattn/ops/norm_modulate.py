"""Normalise, then scale and shift, with the residual sum before: the glue between a video transformer's layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hhattn import _dispatch, _ext
from hhattn.ops import _check
from hhattn.ops._norm import normalize, normalize_backward
from hhattn.reference.norm_modulate import norm_modulate as _reference

OP = "norm_modulate"
NORMS = ("rms", "layer")


def norm_modulate(
    x: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    norm: str = "rms",
    eps: float = 1e-6,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""adaLN modulation, fused with the norm before it and the gated residual sum before that.

    .. math::
        r &= \text{residual} + \text{gate} \cdot x \qquad (r = x \text{ without a residual}) \\
        y &= (\operatorname{norm}(r) \cdot \text{weight} + \text{bias}) \cdot (1 + \text{scale}) + \text{shift}

    with rms: :math:`\operatorname{norm}(r) = r / \sqrt{\operatorname{mean}(r^2) + \text{eps}}`, and layer:
    :math:`(r - \operatorname{mean}(r)) / \sqrt{\operatorname{var}(r) + \text{eps}}`, over the last dim.

    Args:
        x: [B, S, C], float32, float16 or bfloat16.
        scale, shift: [B, F, C], where S is a multiple of F and each row serves S/F tokens in turn: F = 1 modulates the
            clip, F = frames each frame, F = S each token. The batch may be 1. Never expanded in memory.
        weight, bias: [C], the affine part of the norm.
        norm: "rms" or "layer".
        eps: added under the root.
        residual: [B, S, C], the stream x is added to.
        gate: like scale; multiplies x before the sum. Needs ``residual``.
        impl: "reference", "cpp", ...; None chooses.

    Returns:
        y [B, S, C] in x's dtype; with a residual (y, r), r in the residual's dtype. Everything between is float32, and
        y comes from r before r is rounded. Tensors may differ in dtype, so autocast changes nothing here.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: ``impl`` can't run this call.

    Source: adaptive layer norm of DiT (Peebles & Xie, 2022), one modulation a frame or token as in diffusion forcing.
    """
    _validate(x, scale, shift, weight, bias, residual, gate, norm, eps)
    return _dispatch.call(OP, impl, x, scale, shift, weight, bias, residual, gate, norm, eps)


def _validate(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    norm: str,
    eps: float,
) -> None:
    _check.tensor("x", x, 3)
    batch, tokens, channels = x.shape
    _check.one_of("norm", norm, NORMS)
    _check.eps(eps)
    for name, value in (("weight", weight), ("bias", bias)):
        if value is not None:
            _check.tensor(name, value, 1)
            _check.shape(name, value, (channels,), "[C]")
            _check.device(name, value, "x", x)
    if residual is not None:
        _check.tensor("residual", residual, 3)
        _check.shape("residual", residual, x.shape, "[B, S, C]")
        _check.device("residual", residual, "x", x)
    elif gate is not None:
        raise ValueError("gate needs residual: r = residual + gate * x; without a residual there is nothing to gate")
    for name, value in (("scale", scale), ("shift", shift), ("gate", gate)):
        if value is None:
            continue
        _check.tensor(name, value, 3)
        _check.device(name, value, "x", x)
        rows = value.shape[1]
        fits = rows == tokens if rows == 0 else tokens % rows == 0
        if value.shape[0] not in (1, batch) or value.shape[2] != channels or not fits:
            raise ValueError(
                f"{name} must have shape [B or 1, F, C] = [{batch} or 1, F, {channels}] where F divides S = {tokens}, "
                f"got {tuple(value.shape)}"
            )


_dispatch.register(OP, "reference", transforms=True)(_reference)


def _cpp_can_run(x: Tensor | None = None, *rest: Tensor | str | float | None) -> str | None:
    if (reason := _ext.why_missing()) or x is None:
        return reason
    if x.device.type != "cpu":
        return f"x is on {x.device}; cpp runs on the CPU"
    names = ("x", "scale", "shift", "weight", "bias", "residual", "gate")
    for name, value in zip(names, (x, *rest), strict=False):
        if isinstance(value, Tensor) and value.shape[-1] > 1 and value.stride(-1) != 1:
            return f"the last dim of {name} is not contiguous (stride {value.stride(-1)})"
    return None


@_dispatch.register(OP, "cpp", _cpp_can_run)
def _cpp(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    norm: str,
    eps: float,
) -> Tensor | tuple[Tensor, Tensor]:
    y, r = torch.ops.hhattn.norm_modulate(x, scale, shift, weight, bias, residual, gate, norm == "layer", eps)
    return y if residual is None else (y, r)


def _fake(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    layer: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape)
    return y, x.new_empty(0) if residual is None else residual.new_empty(x.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, scale, shift, weight, bias, residual, gate, ctx.layer, ctx.eps = inputs
    ctx.save_for_backward(x, scale, shift, weight, bias, residual, gate)


def _rows(m: Tensor, like: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """m [B, F, C] as [B, F, 1, C] in float32, and how ``like`` [B, S, C] divides: (F, S/F), or (0, 0)."""
    return m.float().unsqueeze(2), (m.shape[1], like.shape[1] // max(1, m.shape[1]))


def _times(x: Tensor, m: Tensor, plus: float = 0.0) -> Tensor:
    """``x·(m + plus)`` where each row of m serves its group of tokens."""
    rows, groups = _rows(m, x)
    return (x.unflatten(1, groups) * (rows + plus)).flatten(1, 2)


def _sum_like(grad: Tensor, m: Tensor | None) -> Tensor | None:
    """``grad`` [B, S, C] summed over the tokens (and the batch) that share a row of m."""
    if m is None:
        return None
    _, groups = _rows(m, grad)
    total = grad.unflatten(1, groups).sum(2)
    return (total.sum(0, keepdim=True) if m.shape[0] < total.shape[0] else total).to(m.dtype)


def _backward(ctx: Any, grad_y: Tensor, grad_r: Tensor) -> tuple[Tensor | None, ...]:
    """The formula's gradient, from the inputs alone: nothing of the forward's size is kept."""
    x, scale, shift, weight, bias, residual, gate = ctx.saved_tensors
    norm = "layer" if ctx.layer else "rms"
    gated = x.float() if gate is None else _times(x.float(), gate)
    n, rstd = normalize(gated if residual is None else residual.float() + gated, norm, ctx.eps)
    affine = n if weight is None else n * weight.float()
    affine = affine if bias is None else affine + bias.float()

    g = grad_y.float()
    grad_shift, grad_scale = _sum_like(g, shift), _sum_like(g * affine, scale)
    g = g if scale is None else _times(g, scale, plus=1.0)
    grad_bias = None if bias is None else g.sum((0, 1)).to(bias.dtype)
    grad_weight = None if weight is None else (g * n).sum((0, 1)).to(weight.dtype)
    g = normalize_backward(g if weight is None else g * weight.float(), n, rstd, norm)
    if residual is None:
        return g.to(x.dtype), grad_scale, grad_shift, grad_weight, grad_bias, None, None, None, None
    g = g + grad_r.float()
    grad_gate = _sum_like(g * x.float(), gate)
    grad_x = (g if gate is None else _times(g, gate)).to(x.dtype)
    return grad_x, grad_scale, grad_shift, grad_weight, grad_bias, g.to(residual.dtype), grad_gate, None, None


if _ext.why_missing() is None:
    torch.library.register_fake("hhattn::norm_modulate", _fake)
    torch.library.register_autograd("hhattn::norm_modulate", _backward, setup_context=_setup)
