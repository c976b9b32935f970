"""The operators of sparse_linear_attention's linear branch, the reference's, the native ones and those on Triton's
kernels: fakes and gradients.

The marginal pairs are a :class:`hhattn.BlockMask`'s, as its tensors; with ``complement``, those that it doesn't hold.
So "all that isn't critical" needs no mask of its own, which couldn't be built without waiting for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hhattn import _ext
from hhattn.ops import _amp, _triton
from hhattn.ops._second import no_second_derivative
from hhattn.reference import sparse_linear_attention as _reference
from hhattn.reference.block_sparse_attention import Lists

OP = "sparse_linear_attention"
NAME = "sparse_linear_marginal"


@torch.library.custom_op(f"hhattn::{NAME}_reference", mutates_args=())
def _forward(
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    kv_tiles: Tensor,
    full_kv_num_blocks: Tensor,
    full_kv_indices: Tensor,
    tiles: Tensor,
    bk: int,
    complement: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    lists = Lists(kv_num_blocks, kv_indices, kv_tiles, full_kv_num_blocks, full_kv_indices, tiles)
    with _amp.off(v.device):
        return _reference.forward(phi_q, phi_k, v, lists, bk, complement, eps)


@torch.library.custom_op(f"hhattn::{NAME}_reference_backward", mutates_args=())
def _backward(
    dout: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    v: Tensor,
    out: Tensor,
    den: Tensor,
    kv_num_blocks: Tensor,
    kv_indices: Tensor,
    kv_tiles: Tensor,
    full_kv_num_blocks: Tensor,
    full_kv_indices: Tensor,
    tiles: Tensor,
    bk: int,
    complement: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    lists = Lists(kv_num_blocks, kv_indices, kv_tiles, full_kv_num_blocks, full_kv_indices, tiles)
    with _amp.off(v.device):
        return _reference.backward(dout, phi_q, phi_k, v, out, den, lists, bk, complement)


def _fake_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, _dim = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return v.new_empty(batch, q_len, heads, v.shape[3]), q.new_empty(batch, heads, q_len, dtype=dtype)


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    # 9 tensors, then bk, complement, perhaps phi, and eps, which den already holds
    *tensors, ctx.how = (*inputs[:9], inputs[9:-1])
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])


def _gradients(operator: Callable[..., Any], ctx: Any, dout: Tensor, _dden: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, *lists, out, den = ctx.saved_tensors
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()  # a sum's gradient is one number, expanded
    return (
        *operator(dout, q, k, v, out, den, *lists, *ctx.how),
        *(None for _ in lists),
        *(None for _ in ctx.how),
        None,
    )


def _call_backward(namespace: str, *args: Any) -> Any:
    return getattr(getattr(torch.ops, namespace), f"{NAME}_backward")(*args)


_MASK = (
    "Tensor kv_num_blocks, Tensor kv_indices, Tensor kv_tiles, Tensor full_kv_num_blocks, Tensor full_kv_indices, "
    "Tensor tiles, int bk, bool complement"
)
_QKV = "Tensor q, Tensor k, Tensor v"
_triton.define(OP, NAME, f"({_QKV}, {_MASK}, int phi, float eps) -> (Tensor, Tensor)", _fake_forward)
_triton.define(
    OP,
    f"{NAME}_backward",
    f"(Tensor dout, {_QKV}, Tensor out, Tensor den, {_MASK}, int phi) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)

_forward.register_fake(_fake_forward)
_backward.register_fake(_fake_backward)
_forward.register_autograd(partial(_gradients, _backward), setup_context=_save)
no_second_derivative(OP, f"hhattn::{NAME}_reference_backward")
_NATIVE = ("hhattn",) if _ext.why_missing() is None else ()
for _namespace in _NATIVE:
    torch.library.register_fake(f"{_namespace}::{NAME}", _fake_forward)
    torch.library.register_fake(f"{_namespace}::{NAME}_backward", _fake_backward)
for _namespace in (*_NATIVE, _triton.NAMESPACE):
    _rule = partial(_gradients, partial(_call_backward, _namespace))
    torch.library.register_autograd(f"{_namespace}::{NAME}", _rule, setup_context=_save)
    no_second_derivative(OP, f"{_namespace}::{NAME}_backward")


def reference(
    q: Tensor, k: Tensor, v: Tensor, lists: tuple[Tensor, ...], bk: int, complement: bool, feature_map: str, eps: float
) -> Tensor:
    """The linear branch as the reference computes it; features are made, and differentiated, by torch itself."""
    with _amp.off(q.device):
        phi_q, phi_k = (_reference.features(x, feature_map) for x in (q, k))
        return _forward(phi_q, phi_k, v, *lists, bk, complement, eps)[0]
