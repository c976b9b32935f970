"""Normalise, then scale and shift, with the residual sum before: the glue between a video transformer's layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hhattn import _dispatch, _ext
from hhattn.ops import _check, _cuda, _triton
from hhattn.ops._second import differentiable_gradient
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


TENSORS = ("x", "scale", "shift", "weight", "bias", "residual", "gate")
MAX_CHANNELS = 16384  # of the GPU kernels, which hold a row in registers
MAX_CHANNELS_BACKWARD = 8192  # of the CUDA kernel, which holds a row's sums there too
FEW_CHANNELS = 512
MAX_ROWS = 2**31 - 1  # of the CUDA kernels, a row of which is an int32


def _not_contiguous(*args: Tensor | str | float | None) -> str | None:
    for name, value in zip(TENSORS, args, strict=False):
        if isinstance(value, Tensor) and value.shape[-1] > 1 and value.stride(-1) != 1:
            return f"the last dim of {name} is not contiguous (stride {value.stride(-1)})"
    return None


def _cpp_can_run(x: Tensor | None = None, *rest: Tensor | str | float | None) -> str | None:
    if (reason := _ext.why_missing()) or x is None:
        return reason
    if x.device.type != "cpu":
        return f"x is on {x.device}; cpp runs on the CPU"
    return _not_contiguous(x, *rest)


def _triton_can_run(x: Tensor | None = None, *rest: Tensor | str | float | None) -> str | None:
    if (reason := _triton.why_not(x)) or x is None:
        return reason
    if x.shape[-1] > MAX_CHANNELS:
        return f"x has {x.shape[-1]} channels; triton holds a row in registers, up to {MAX_CHANNELS}"
    return _not_contiguous(x, *rest)


def _cuda_can_run(x: Tensor | None = None, *rest: Tensor | str | float | None) -> str | None:
    if (reason := _cuda.why_not(x)) or x is None:
        return reason
    if x.shape[-1] > MAX_CHANNELS:
        return f"x has {x.shape[-1]} channels; cuda holds a row in registers, up to {MAX_CHANNELS}"
    asks = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, *rest))
    if asks and x.shape[-1] > MAX_CHANNELS_BACKWARD:
        return f"x has {x.shape[-1]} channels; cuda makes gradients of up to {MAX_CHANNELS_BACKWARD}"
    if x.shape[0] * x.shape[1] > MAX_ROWS:
        return f"x has {x.shape[0] * x.shape[1]} rows; cuda counts up to {MAX_ROWS}"
    return _not_contiguous(x, *rest)


def _cuda_is_behind(x: Tensor, *rest: Tensor | str | float | None) -> str | None:
    """Why Triton's kernel is expected to be faster, by the model of docs/kernels.md."""
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in (x, *rest)):
        return "by the model Triton's backward is ahead"
    return f"by the model Triton is ahead for {x.shape[-1]} channels" if x.shape[-1] <= FEW_CHANNELS else None


def _call(namespace: str, *args: Any) -> Tensor | tuple[Tensor, Tensor]:
    *tensors, norm, eps = args
    y, r = getattr(torch.ops, namespace).norm_modulate(*tensors, norm == "layer", eps)
    return y if tensors[5] is None else (y, r)


_dispatch.register(OP, "cpp", _cpp_can_run)(partial(_call, "hhattn"))
_dispatch.register(OP, "triton", _triton_can_run)(partial(_call, _triton.NAMESPACE))
_dispatch.register(OP, "cuda", _cuda_can_run, behind=_cuda_is_behind)(partial(_call, _cuda.NAMESPACE))


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


def _fake_backward(
    dy: Tensor,
    dr: Tensor | None,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    layer: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    inputs = (x, scale, shift, weight, bias, residual, gate)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.layer, ctx.eps = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(namespace: str, ctx: Any, dy: Tensor | None, dr: Tensor | None) -> tuple[Tensor | None, ...]:
    """The formula's gradient, from the inputs alone: nothing of the forward's size is kept."""
    tensors = ctx.saved_tensors
    x, residual = tensors[0], tensors[5]
    dr = None if residual is None else dr
    if torch.is_grad_enabled():
        args = (*tensors, "layer" if ctx.layer else "rms", ctx.eps)
        return tuple(differentiable_gradient(_reference, args, ctx.needs_input_grad, (dy, dr)))
    dy = torch.zeros_like(x) if dy is None else dy
    # a sum's gradient is one number, expanded
    dy, dr = (t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (dy, dr))
    grads = getattr(torch.ops, namespace).norm_modulate_backward(dy, dr, *tensors, ctx.layer, ctx.eps)
    return (*(None if t is None else grad for t, grad in zip(tensors, grads, strict=True)), None, None)


_ARGS = "Tensor x, Tensor? scale, Tensor? shift, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? gate"
_SCHEMA = f"({_ARGS}, bool layer, float eps) -> (Tensor, Tensor)"
_SCHEMA_BACKWARD = f"(Tensor dy, Tensor? dr, {_ARGS}, bool layer, float eps) -> ({', '.join(['Tensor'] * 7)})"
_triton.define(OP, OP, _SCHEMA, _fake)
_triton.define(OP, f"{OP}_backward", _SCHEMA_BACKWARD, _fake_backward)
_cuda.define(OP, _SCHEMA, _fake)
_cuda.define(f"{OP}_backward", _SCHEMA_BACKWARD, _fake_backward)
if _ext.why_missing() is None:
    torch.library.register_fake("hhattn::norm_modulate", _fake)
    torch.library.register_fake("hhattn::norm_modulate_backward", _fake_backward)
for _namespace in ("hhattn", _triton.NAMESPACE, _cuda.NAMESPACE)[_ext.why_missing() is not None :]:
    _rule = partial(_backward, _namespace)
    torch.library.register_autograd(f"{_namespace}::norm_modulate", _rule, setup_context=_setup)
