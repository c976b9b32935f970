"""Softmax attention over the pairs that a :class:`hhattn.BlockMask` holds."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hhattn import _dispatch, _ext
from hhattn.layout import Order, check_order
from hhattn.masks.block_mask import BlockMask, by_column
from hhattn.ops import _amp, _cuda, _triton
from hhattn.ops._second import no_second_derivative
from hhattn.reference import block_sparse_attention as _reference
from hhattn.reference.block_sparse_attention import Lists

OP = "block_sparse_attention"
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAX_HEAD_DIM = 256
MAX_GRID = 65535  # blocks of a CUDA grid along its second and third dims
MAX_REACH = (2**32 - 33) * 8  # elements from a tensor's first to its last, which kernels count in 16 bytes and 32 bits
LEAST_SCALE = 2.0**-126  # a smaller one is 0 to GPU kernels: float32 has it with fewer digits, and Triton not at all


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: BlockMask,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    order: Order | None = None,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention in which query i attends the keys that ``mask`` holds for it, and no other::

        s_ij = scale · q_i·k_j      lse_i = log Σ_j exp(s_ij)      out_i = Σ_j exp(s_ij - lse_i) v_j

    Work and memory grow with the blocks that the mask touches; no Sq x Sk array is made, forward or backward. Softmax
    and sums are float32. A query that attends nothing gets out 0, lse -inf, and no gradient. What stands at masked
    positions doesn't matter, infinities and NaNs included. Gradients are the same bits every time.

    Args:
        q: [B, Sq, H, D]; k: [B, Sk, H_kv, D]; v: [B, Sk, H_kv, Dv]; D, Dv ≤ 256, H a multiple of H_kv. float32, float16
            or bfloat16 (float64 for checking gradients), one dtype for the three; under autocast they are cast to its
            dtype, float64 excepted, as for torch's own attention.
        mask: for Sq queries and Sk keys; batch B or 1, heads H or 1.
        scale: of the scores; None is 1 / sqrt(D).
        return_lse: also return lse [B, H, Sq], natural logarithm, float32 (float64 for float64). It is differentiable.
        order: the order q, k, v are in, "raster" or "tile"; out and lse come in the same. None is the mask's own.
            Another than the mask's needs a mask made from a :class:`hhattn.VideoLayout`, which converts on the way in
            and out.
        impl: "reference", "cpp", ...; None chooses.

    Returns:
        out [B, Sq, H, Dv] in q's dtype; with ``return_lse`` (out, lse).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device, or an order that the mask can't
            convert.
        RuntimeError: ``impl`` can't run this call.
    """
    _check_type("mask", mask)
    q, k, v = checked(q, k, v)
    check_mask("mask", mask, q, k)
    convert = conversions(mask, order)
    if convert:
        q, k, v = convert.q_in(q), convert.k_in(k), convert.k_in(v)
    out, lse = _dispatch.call(OP, impl, q, k, v, mask, checked_scale(scale, q))
    if convert:
        out, lse = convert.q_out(out), convert.q_out(lse, 2) if return_lse else lse
    return (out, lse) if return_lse else out


class Conversions(NamedTuple):
    """What brings q and k into a mask's order, and what has q's tokens back out of it; each takes (tensor, dim=1)."""

    q_in: Callable[..., Tensor]
    k_in: Callable[..., Tensor]
    q_out: Callable[..., Tensor]


def conversions(mask: BlockMask, order: Order | None) -> Conversions | None:
    """Those between ``order`` and the mask's, or None where they are the same."""
    if order is None or check_order("order", order) == mask.order:
        return None
    q, k = mask.layouts()
    if mask.order == "tile":
        return Conversions(q.to_tiles, k.to_tiles, q.from_tiles)
    return Conversions(q.from_tiles, k.from_tiles, q.to_tiles)


def checked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v that fit one another, in autocast's dtype where it is on."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{name} must have shape [B, S, H, D], got {tuple(x.shape)}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be one of {', '.join(map(str, _DTYPES))}, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")
        if not 1 <= x.shape[3] <= MAX_HEAD_DIM:
            raise ValueError(f"{name} must have a head dim of 1 ... {MAX_HEAD_DIM}, got {x.shape[3]}")
    q, k, v = _amp.cast(q, k, v)
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k must have q's batch and head dim, {q.shape[0]} and {q.shape[3]}, got {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must have k's batch, tokens and heads, {tuple(k.shape[:3])}, got {tuple(v.shape)}")
    if not k.shape[2] or q.shape[2] % k.shape[2]:
        raise ValueError(f"q must have a multiple of k's {k.shape[2]} heads, got {q.shape[2]}")
    return q, k, v


def checked_scale(scale: object, q: Tensor) -> float:
    """``scale``, or its default for q's head dim."""
    if scale is None:
        return q.shape[-1] ** -0.5
    if not isinstance(scale, numbers.Real) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number or None, got {scale!r}")
    return float(scale)


def _check_type(name: str, mask: object) -> None:
    if not isinstance(mask, BlockMask):
        raise TypeError(
            f"{name} must be a hhattn.BlockMask, got {type(mask).__name__}; BlockMask.from_dense and from_flex make one"
        )


def check_mask(name: str, mask: BlockMask, q: Tensor, k: Tensor) -> None:
    """``mask`` is one for q and k."""
    _check_type(name, mask)
    if mask.device != q.device:
        raise ValueError(
            f"{name} must be on the device of q, {q.device}, got {mask.device}; {name}.to(q.device) moves it"
        )
    if (mask.q_len, mask.k_len) != (q.shape[1], k.shape[1]):
        raise ValueError(
            f"{name} must be for Sq={q.shape[1]} queries and Sk={k.shape[1]} keys, got {mask.q_len} and {mask.k_len} "
            "(q, k and v are [B, S, H, D])"
        )
    batch, heads = mask.kv_num_blocks.shape[:2]
    if batch not in (1, q.shape[0]) or heads not in (1, q.shape[2]):
        raise ValueError(
            f"{name} must have batch 1 or {q.shape[0]} and heads 1 or {q.shape[2]}, got batch {batch} and heads {heads}"
        )


# ---- implementations as torch operators, with their gradients ----


@torch.library.custom_op("hhattn::block_sparse_attention_reference", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    kv_tiles: Tensor,
    full_kv_num_blocks: Tensor,
    full_kv_indices: Tensor,
    tiles: Tensor,
    bk: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    lists = Lists(kv_num_blocks, kv_indices, kv_tiles, full_kv_num_blocks, full_kv_indices, tiles)
    with _amp.off(q.device):
        return _reference.forward(q, k, v, lists, bk, scale)


@torch.library.custom_op("hhattn::block_sparse_attention_reference_backward", mutates_args=())
def _backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    kv_tiles: Tensor,
    full_kv_num_blocks: Tensor,
    full_kv_indices: Tensor,
    tiles: Tensor,
    bk: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    lists = Lists(kv_num_blocks, kv_indices, kv_tiles, full_kv_num_blocks, full_kv_indices, tiles)
    with _amp.off(q.device):
        return _reference.backward(dout, dlse, q, k, v, out, lse, lists, bk, scale)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, _dim = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(batch, q_len, heads, v.shape[3]), q.new_empty(batch, heads, q_len, dtype=dtype)


def _fake_backward(dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fake_gpu_backward(
    dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    to_q, to_kv = (*rest[15:], True, True)[:2]  # what has its default isn't passed
    dq, dk, dv = (x.new_empty(x.shape if to else 0) for x, to in ((q, to_q), (k, to_kv), (v, to_kv)))
    return dq, dk, dv


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.bk, ctx.scale = inputs[9:11]
    ctx.rest = len(inputs) - 3
    ctx.save_for_backward(*inputs[:9], *output, *inputs[11:])


def _by_key(lists: Sequence[Tensor], nk: int) -> tuple[Tensor, ...]:
    """A mask's lists by key block, as QLists has them, from its own."""
    counts, indices, tiles, full_counts, full_indices = lists[:5]
    full = by_column(full_counts, full_indices, nk, full_indices)
    return *by_column(counts, indices, nk, tiles), *full[:2]


def _misaligned(x: Tensor) -> bool:
    """Whether rows of 16-bit x [B, S, H, D] don't all lie on edges of 16 bytes."""
    strides = [stride for size, stride in zip(x.shape[:3], x.stride(), strict=False) if size > 1]
    return any(n % 8 for n in (x.storage_offset(), *strides))


def _complete(name: str, namespace: str = "hhattn") -> None:
    """Fakes, unless there are any, and gradient of the operator ``namespace::name``, whose gradient is
    ``namespace::name_backward``."""

    def gradients(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing gives them out a single time
        q, k, v, *lists, out, lse = saved[:11]
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()  # a sum's gradient is one number, expanded
        wanted, columns = ctx.needs_input_grad[:3], saved[11:]
        if namespace == _cuda.NAMESPACE:
            dout = dout.contiguous() if _misaligned(dout) else dout
            if columns[0] is None and any(wanted[1:]):
                columns = _by_key(lists, -(-k.shape[1] // ctx.bk))
        how = (*columns, wanted[0], any(wanted[1:])) if namespace != "hhattn" else ()
        backward = getattr(getattr(torch.ops, namespace), f"{name}_backward")
        found = backward(dout, dlse, q, k, v, out, lse, *lists, ctx.bk, ctx.scale, *how)
        return *(x if want else None for x, want in zip(found, wanted, strict=True)), *[None] * ctx.rest

    if namespace == "hhattn":
        torch.library.register_fake(f"{namespace}::{name}", _fake_forward)
        torch.library.register_fake(f"{namespace}::{name}_backward", _fake_backward)
    torch.library.register_autograd(f"{namespace}::{name}", gradients, setup_context=_save)
    no_second_derivative(OP, f"{namespace}::{name}_backward")


_MASK_ARGS = (
    "Tensor kv_num_blocks, Tensor kv_indices, Tensor kv_tiles, Tensor full_kv_num_blocks, Tensor full_kv_indices, "
    "Tensor tiles, int bk, float scale"
)
# The lists by key block, if they are there already, in the order of QLists.
_COLUMNS = ", ".join(
    f"Tensor? {name}=None" for name in ("offsets", "indices", "places", "full_offsets", "full_indices")
)
_SCHEMA = f"(Tensor q, Tensor k, Tensor v, {_MASK_ARGS}, {_COLUMNS}) -> (Tensor, Tensor)"
_SCHEMA_BACKWARD = (
    "(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_MASK_ARGS}, {_COLUMNS}, bool to_q=True, bool to_kv=True) -> (Tensor, Tensor, Tensor)"
)
_triton.define(OP, OP, _SCHEMA, _fake_forward)
_triton.define(OP, f"{OP}_backward", _SCHEMA_BACKWARD, _fake_gpu_backward)
_cuda.define(OP, _SCHEMA, _fake_forward)
_cuda.define(f"{OP}_backward", _SCHEMA_BACKWARD, _fake_gpu_backward)

_complete("block_sparse_attention_reference")
_complete(OP, _triton.NAMESPACE)
_complete(OP, _cuda.NAMESPACE)
if _ext.why_missing() is None:
    _complete(OP)


def lists_of(mask: BlockMask) -> tuple[Tensor, ...]:
    """The mask's tensors as the operators take them."""
    lists = (mask.kv_num_blocks, mask.kv_indices, mask.kv_tiles, mask.full_kv_num_blocks, mask.full_kv_indices)
    return tuple(x.contiguous() for x in (*lists, mask.tiles))


@_dispatch.register(OP, "reference")
def run_reference(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    """The reference's operator."""
    return _forward(q, k, v, *lists_of(mask), mask.block_size[1], scale)


def _not_taken(name: str, q: Tensor, *rest: Any) -> str | None:
    """Why the kernels of ``name`` can't take these tensors."""
    if q.dtype == torch.float64:
        return f"q is float64; {name} takes float32, float16 and bfloat16"
    for argument, x in zip(("q", "k", "v"), (q, *rest), strict=False):
        if x.shape[3] > 1 and x.stride(3) != 1:
            return f"the last dim of {argument} is not contiguous (stride {x.stride(3)})"
    return None


def cpp_can_run(q: Tensor | None = None, *rest: Any) -> str | None:
    """Why the native kernels can't run on q, k, v; None if they can."""
    if (reason := _ext.why_missing()) or q is None:
        return reason
    if q.device.type != "cpu":
        return f"q is on {q.device}; cpp runs on the CPU"
    return _not_taken("cpp", q, *rest)


def triton_can_run(q: Tensor | None = None, *rest: Any) -> str | None:
    """Why Triton's kernels can't run on q, k, v; None if they can."""
    if (reason := _triton.why_not(q)) or q is None:
        return reason
    return _not_taken("triton", q, *rest)


def cuda_can_run(q: Tensor | None = None, *rest: Any) -> str | None:
    """Why the CUDA kernels can't run on q, k, v; None if they can."""
    if (reason := _cuda.why_not(q)) or q is None:
        return reason
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"q is {str(q.dtype).removeprefix('torch.')}; cuda takes float16 and bfloat16"
    if q.shape[0] > MAX_GRID or q.shape[2] > MAX_GRID:
        return f"q has batch {q.shape[0]} and {q.shape[2]} heads; cuda takes up to {MAX_GRID} of each"
    for name, x in zip("qkv", (q, *rest), strict=False):
        if x.shape[3] % 8:
            return f"{name} has a head dim of {x.shape[3]}; cuda takes multiples of 8"
        if x.stride(3) == 1 and _misaligned(x):
            return f"rows of {name} don't all lie on edges of 16 bytes (strides {x.stride()})"
        if sum((size - 1) * stride for size, stride in zip(x.shape[:3], x.stride(), strict=False)) >= MAX_REACH:
            return f"{name} reaches over more than 64 GB (strides {x.stride()})"
    return _not_taken("cuda", q, *rest)


def cuda_is_behind(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> str | None:
    """Why Triton's kernels are expected to be faster, by the model of docs/kernels.md: theirs use wgmma and tcgen05
    where ours, the forward on sm_90 excepted, use mma.sync."""
    arch = _cuda.arch(q)
    if 100 <= arch < 120:
        return f"on sm_{arch} Triton's kernels use tcgen05, these mma.sync"
    if arch == 90 and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        return f"on sm_{arch} Triton's backward uses wgmma, this one mma.sync"
    if arch == 90 and any(size % 64 for size in mask.block_size):
        return f"on sm_{arch} blocks of {mask.block_size} go to mma.sync; wgmma takes multiples of 64"
    return None


def run(namespace: str, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float) -> tuple[Tensor, Tensor]:
    """``namespace``'s operator."""
    if namespace != "hhattn" and abs(scale) < LEAST_SCALE:
        scale = 0.0
    if namespace == _cuda.NAMESPACE and scale <= 0:  # its kernels take the largest product for the largest score
        sign = -1 if scale < 0 else 0
        q, scale = q * sign, abs(scale) if sign else 1.0
    columns: tuple[Tensor, ...] = ()
    trained = torch.is_grad_enabled() and (k.requires_grad or v.requires_grad)
    if namespace != "hhattn" and trained and not torch.compiler.is_compiling():
        columns = mask.q_lists()  # sorted once a mask; where it is traced, by the gradient itself
    operator = getattr(torch.ops, namespace).block_sparse_attention
    return operator(q, k, v, *lists_of(mask), mask.block_size[1], scale, *columns)


_dispatch.register(OP, "cpp", cpp_can_run)(partial(run, "hhattn"))
_dispatch.register(OP, "triton", triton_can_run)(partial(run, _triton.NAMESPACE))
_dispatch.register(OP, "cuda", cuda_can_run, behind=cuda_is_behind)(partial(run, _cuda.NAMESPACE))
