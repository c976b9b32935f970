"""Normalise queries and keys, rotate them by position, lay them out tile by tile: one pass before attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from hhattn import _dispatch, _ext
from hhattn.layout import VideoLayout
from hhattn.ops import _check, _cuda, _triton
from hhattn.ops._second import differentiable_gradient
from hhattn.ops.rope_3d import ROTATIONS
from hhattn.reference.qk_norm_rope import qk_norm_rope as _reference

OP = "qk_norm_rope"
NORMS = (None, "rms", "layer")


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    norm: str | None = "rms",
    across_heads: bool = False,
    rotate: str = "interleaved",
    eps: float = 1e-6,
    text_len: int = 0,
    text_first: bool = False,
    layout: VideoLayout | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Norm of q and k, rotary embedding, and the change to tile order, in one pass.

    .. math::
        \hat x &= \operatorname{norm}(x) \cdot \text{weight} + \text{bias} \\
        y_a &= \hat x_a \cos_a - \hat x_b \sin_a, \quad y_b = \hat x_b \cos_b + \hat x_a \sin_b

    for each pair (a, b) of dims: (2i, 2i+1) when interleaved, (i, i + D/2) in halves.

    Args:
        q: [B, S, H, D], float32, float16 or bfloat16, raster order.
        k: [B, S, H_kv, D], H a multiple of H_kv.
        cos, sin: [S_video, D] as :func:`hhattn.rope_3d` gives them, or [1 or B, S_video, 1 or H, D]; S_video
            is S − text_len. Both None: no rotation.
        q_weight, k_weight, q_bias, k_bias: the affine part of the norms: [D], or [H·D] for q and [H_kv·D] for k with
            ``across_heads``.
        norm: "rms", "layer", or None for none.
        across_heads: one norm over all H·D channels of a token instead of one for each head.
        rotate: "interleaved" or "half".
        eps: added under the root.
        text_len, text_first: how many text tokens follow (precede) the video tokens; they are normed, not rotated.
        layout: write the result in the tile order of this :class:`hhattn.VideoLayout`, whose ``text_len`` and
            ``text_first`` hold unless the arguments say the same.
        impl: "reference", "cpp", ...; None chooses.

    Returns:
        (q, k), shapes and dtypes of the inputs. Everything between is float32.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: ``impl`` can't run this call.

    Source: RMSNorm (Zhang & Sennrich, 2019), query-key normalisation (Henry et al., 2020), RoFormer (Su et al., 2021).
    """
    if layout is not None:
        text_len, text_first = _layout_text(layout, text_len, text_first)
    _validate(q, k, norm, across_heads, rotate, eps, text_len, layout)
    _validate_affine(q, k, norm, across_heads, q_weight=q_weight, k_weight=k_weight, q_bias=q_bias, k_bias=k_bias)
    cos, sin = _tables(q, k, cos, sin, text_len)
    order = None if layout is None else layout.tile_index(q.device)
    affine = (q_weight, k_weight, q_bias, k_bias)
    where = (text_len, text_first, order)
    return _dispatch.call(OP, impl, q, k, cos, sin, *affine, norm, across_heads, rotate, eps, *where)


def _layout_text(layout: VideoLayout, text_len: int, text_first: bool) -> tuple[int, bool]:
    if not isinstance(layout, VideoLayout):
        raise TypeError(f"layout must be a hhattn.VideoLayout, got {type(layout).__name__}")
    contradicts = text_first != layout.text_first or text_len not in (0, layout.text_len)
    if (text_len or text_first) and contradicts:
        raise ValueError(
            f"text_len={text_len}, text_first={text_first} contradict layout, which has text_len={layout.text_len}, "
            f"text_first={layout.text_first}; leave them out"
        )
    return layout.text_len, layout.text_first


def _validate(
    q: Tensor,
    k: Tensor,
    norm: str | None,
    across_heads: bool,
    rotate: str,
    eps: float,
    text_len: int,
    layout: VideoLayout | None,
) -> None:
    _check.tensor("q", q, 4)
    _check.tensor("k", k, 4)
    _check.device("k", k, "q", q)
    batch, tokens, heads, dim = q.shape
    _check.shape("k", k, (batch, tokens, k.shape[2], dim), "[B, S, H_kv, D]")
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"k has {k.shape[2]} heads; they must divide q's H = {heads}")
    _check.one_of("norm", norm, NORMS)
    _check.one_of("rotate", rotate, ROTATIONS)
    _check.eps(eps)
    if across_heads and norm is None:
        raise ValueError("across_heads=True needs a norm: 'rms' or 'layer'")
    if not 0 <= text_len <= tokens:
        raise ValueError(f"text_len={text_len} must be between 0 and S = {tokens}")
    if layout is not None and layout.seq_len != tokens:
        raise ValueError(f"layout has {layout.seq_len} tokens, q has S = {tokens}")


def _validate_affine(q: Tensor, k: Tensor, norm: str | None, across_heads: bool, **affine: Tensor | None) -> None:
    for name, value in affine.items():
        if value is None:
            continue
        if norm is None:
            raise ValueError(f"{name} needs a norm: 'rms' or 'layer'")
        x = q if name.startswith("q") else k
        _check.tensor(name, value, 1)
        size, letters = (x.shape[2] * x.shape[3], "[H·D]") if across_heads else (x.shape[3], "[D]")
        _check.shape(name, value, (size,), letters)
        _check.device(name, value, "q", q)


def _tables(
    q: Tensor, k: Tensor, cos: Tensor | None, sin: Tensor | None, text_len: int
) -> tuple[Tensor | None, Tensor | None]:
    """cos and sin, checked, as [1 or B, S_video, 1 or H, D]."""
    if cos is None or sin is None:
        if cos is not sin:
            raise ValueError("cos and sin must both be given, or both be None")
        return None, None
    batch, tokens, heads, dim = q.shape
    if dim % 2:
        raise ValueError(f"q has D = {dim}; rotary pairs need an even D (pass cos=None, sin=None for no rotation)")
    out = []
    for name, value in (("cos", cos), ("sin", sin)):
        _check.tensor(name, value, 2 if isinstance(value, Tensor) and value.ndim == 2 else 4)
        _check.device(name, value, "q", q)
        full = value[None, :, None] if value.ndim == 2 else value
        fits = full.shape[0] in (1, batch) and full.shape[2] in (1, heads)
        if not fits or full.shape[1] != tokens - text_len or full.shape[3] != dim:
            raise ValueError(
                f"{name} must have shape [S_video, D] = ({tokens - text_len}, {dim}) or [1 or B, S_video, 1 or H, D], "
                f"S_video = S − text_len = {tokens} − {text_len}; got {tuple(value.shape)}"
            )
        if full.shape[2] != 1 and k.shape[2] != heads:
            raise ValueError(f"{name} differs by head, which needs H_kv = H; got H = {heads}, H_kv = {k.shape[2]}")
        out.append(full)
    if out[0].shape != out[1].shape:
        raise ValueError(f"cos and sin must have one shape, got {tuple(cos.shape)} and {tuple(sin.shape)}")
    return out[0], out[1]


_dispatch.register(OP, "reference", transforms=True)(_reference)


TENSORS = ("q", "k", "cos", "sin", "q_weight", "k_weight", "q_bias", "k_bias")
MAX_DIM, MAX_THREADS, MAX_ROWS = 256, 1024, 2**31 - 1  # of the CUDA kernels: channels a head, a block, tokens
MAX_CHANNELS = 16384  # of the Triton kernels, which hold what shares a norm in registers


def _not_contiguous(*args: Any) -> str | None:
    for name, value in zip(TENSORS, args, strict=False):
        if value is not None and value.shape[-1] > 1 and value.stride(-1) != 1:
            return f"the last dim of {name} is not contiguous (stride {value.stride(-1)})"
    return None


def _cpp_can_run(q: Tensor | None = None, *rest: Any) -> str | None:
    if (reason := _ext.why_missing()) or q is None:
        return reason
    if q.device.type != "cpu":
        return f"q is on {q.device}; cpp runs on the CPU"
    return _not_contiguous(q, *rest)


def _triton_can_run(q: Tensor | None = None, *rest: Any) -> str | None:
    if (reason := _triton.why_not(q)) or q is None:
        return reason
    if q.shape[2] * q.shape[3] > MAX_CHANNELS:
        return (
            f"q has {q.shape[2]} heads of {q.shape[3]} channels; triton holds a token in registers, up to "
            f"{MAX_CHANNELS} channels"
        )
    return _not_contiguous(q, *rest)


def _cuda_can_run(q: Tensor | None = None, k: Tensor | None = None, *rest: Any) -> str | None:
    if (reason := _cuda.why_not(q)) or q is None:
        return reason
    batch, tokens, heads, dim = q.shape
    if dim > MAX_DIM:
        return f"q has D = {dim}; cuda takes up to {MAX_DIM}"
    across = rest[7] if len(rest) > 7 else False
    lanes = max(2, 1 << ((dim + 7) // 8 - 1).bit_length() if dim else 1)  # most threads of a head
    if across and heads * lanes > MAX_THREADS:
        return f"q has {heads} heads of {dim} channels; cuda holds {MAX_THREADS // lanes} such heads under one norm"
    if batch * tokens > MAX_ROWS:
        return f"q has {batch * tokens} tokens; cuda counts up to {MAX_ROWS}"
    return _not_contiguous(q, k, *rest)


def _call(namespace: str, *args: Any) -> tuple[Tensor, Tensor]:
    *tensors, norm, across_heads, rotate, eps, text_len, text_first, order = args
    how = (NORMS.index(norm), across_heads, rotate == "interleaved", eps)
    start = text_len if text_first else 0
    return getattr(torch.ops, namespace).qk_norm_rope(*tensors, *how, start, order)


_dispatch.register(OP, "cpp", _cpp_can_run)(partial(_call, "hhattn"))
_dispatch.register(OP, "triton", _triton_can_run)(partial(_call, _triton.NAMESPACE))
# by the model of docs/kernels.md, which counts every branch of a kernel that looks at dtypes when it loads
_BEHIND = "by the model Triton is ahead"
_dispatch.register(OP, "cuda", _cuda_can_run, behind=lambda *_: _BEHIND)(partial(_call, _cuda.NAMESPACE))


def _fake(q: Tensor, k: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    q: Tensor,
    k: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    q_bias: Tensor | None,
    k_bias: Tensor | None,
    norm: int,
    across_heads: bool,
    interleaved: bool,
    eps: float,
    start: int,
    order: Tensor | None,
    tables: bool,
) -> tuple[Tensor, ...]:
    def like(x: Tensor | None) -> Tensor:
        return q.new_empty(0) if x is None else x.new_empty(x.shape)

    angles = (cos, sin) if tables else (None, None)
    return tuple(like(x) for x in (q, k, *angles, q_weight, k_weight, q_bias, k_bias))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, norm, across_heads, interleaved, eps, start, order = inputs
    ctx.how = (norm, across_heads, interleaved, eps, start)
    ctx.save_for_backward(*tensors, order)


def _backward(namespace: str, ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    """The formula's gradient, from the inputs alone: rotate back by the same angles, then the gradient of the norm."""
    *tensors, order = ctx.saved_tensors
    if torch.is_grad_enabled():
        return _differentiable_backward(ctx, grad_q, grad_k)
    # a sum's gradient is one number, expanded
    grads = (g if g.stride(-1) == 1 else g.contiguous() for g in (grad_q, grad_k))
    tables = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    found = getattr(torch.ops, namespace).qk_norm_rope_backward(*grads, *tensors, *ctx.how, order, tables)
    missing = (None,) * (len(ctx.how) + 1)
    present = (t is not None and (tables or i not in (2, 3)) for i, t in enumerate(tensors))
    return (*(grad if there else None for grad, there in zip(found, present, strict=True)), *missing)


def _differentiable_backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, order = ctx.saved_tensors
    norm, across_heads, interleaved, eps, start = ctx.how
    how = (NORMS[norm], across_heads, "interleaved" if interleaved else "half", eps, start, start > 0, order)

    def reference(*args: Any) -> tuple[Tensor, Tensor]:
        return _reference(*(*args[: len(tensors)], *how))

    args = (*tensors, *ctx.how, order)
    return tuple(differentiable_gradient(reference, args, ctx.needs_input_grad, (grad_q, grad_k)))


_ARGS = (
    "Tensor q, Tensor k, Tensor? cos, Tensor? sin, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, "
    "int norm, bool across_heads, bool interleaved, float eps, int start, Tensor? order"
)
_SCHEMA = f"({_ARGS}) -> (Tensor, Tensor)"
_SCHEMA_BACKWARD = f"(Tensor grad_q, Tensor grad_k, {_ARGS}, bool tables) -> ({', '.join(['Tensor'] * 8)})"
_triton.define(OP, OP, _SCHEMA, _fake)
_triton.define(OP, f"{OP}_backward", _SCHEMA_BACKWARD, _fake_backward)
_cuda.define(OP, _SCHEMA, _fake)
_cuda.define(f"{OP}_backward", _SCHEMA_BACKWARD, _fake_backward)
if _ext.why_missing() is None:
    torch.library.register_fake("hhattn::qk_norm_rope", _fake)
    torch.library.register_fake("hhattn::qk_norm_rope_backward", _fake_backward)
for _namespace in ("hhattn", _triton.NAMESPACE, _cuda.NAMESPACE)[_ext.why_missing() is not None :]:
    _rule = partial(_backward, _namespace)
    torch.library.register_autograd(f"{_namespace}::qk_norm_rope", _rule, setup_context=_setup)
