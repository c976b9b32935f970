"""The operators of block_linear_attention, the chunks' sums and the tokens' outputs: fakes and gradients, alike for the
native ones and those on Triton's and CUDA kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hhattn import _ext
from hhattn.ops import _cuda, _triton
from hhattn.ops._second import no_second_derivative

OP = "block_linear_attention"


def _fake_sums(
    k: Tensor, v: Tensor, gate: Any, cos: Any, sin: Any, length: int, listed: list[int], *_: Any
) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, dim = k.shape
    chunks = len(listed) or torch.sym_max(1, (tokens + length - 1) // length)
    shape = (batch, heads, chunks, dim)
    return k.new_empty(*shape, v.shape[3], dtype=torch.float32), k.new_empty(shape, dtype=torch.float32)


def _save_sums(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.length, ctx.listed, ctx.phi, ctx.psi = inputs
    ctx.save_for_backward(*tensors)


def _sums_gradients(namespace: str, ctx: Any, dkv: Tensor, dk_sum: Tensor) -> tuple[Any, ...]:
    k, v, gate, *tables = ctx.saved_tensors
    dkv, dk_sum = dkv.contiguous(), dk_sum.contiguous()
    how = (ctx.length, ctx.listed, ctx.phi, ctx.psi)
    dk, dv, dgate = getattr(torch.ops, namespace).block_linear_sums_backward(dkv, dk_sum, k, v, gate, *tables, *how)
    return dk, dv, None if gate is None else dgate, *(None,) * 6


def _fake_sums_backward(
    dkv: Tensor, dk_sum: Tensor, k: Tensor, v: Tensor, gate: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return k.new_empty(k.shape), v.new_empty(v.shape), k.new_empty(0) if gate is None else gate.new_empty(gate.shape)


def _fake_outputs(q: Tensor, kv: Tensor, *_: Any) -> Tensor:
    return q.new_empty(*q.shape[:3], kv.shape[4])


def _save_outputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.length, ctx.listed, ctx.phi, ctx.psi, ctx.normalize, ctx.eps = inputs
    ctx.save_for_backward(*tensors, output)


def _outputs_gradients(namespace: str, ctx: Any, dout: Tensor) -> tuple[Any, ...]:
    q, kv, k_sum, *tables, out = ctx.saved_tensors
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()  # a sum's gradient is one number, expanded
    how = (ctx.length, ctx.listed, ctx.phi, ctx.psi, ctx.normalize, ctx.eps)
    gradients = getattr(torch.ops, namespace).block_linear_outputs_backward(dout, q, kv, k_sum, out, *tables, *how)
    return (*gradients, *(None,) * 8)


def _fake_outputs_backward(
    dout: Tensor, q: Tensor, kv: Tensor, k_sum: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), kv.new_empty(kv.shape), k_sum.new_empty(k_sum.shape)


_HOW = "Tensor? cos, Tensor? sin, SymInt length, int[] listed, int phi, int psi"
_SUMS, _OUTPUTS = f"Tensor k, Tensor v, Tensor? gate, {_HOW}", f"{_HOW}, bool normalize, float eps"
_OPERATORS: dict[str, tuple[Callable[..., Any], str]] = {
    "sums": (_fake_sums, f"({_SUMS}) -> (Tensor, Tensor)"),
    "sums_backward": (_fake_sums_backward, f"(Tensor dkv, Tensor dk_sum, {_SUMS}) -> (Tensor, Tensor, Tensor)"),
    "outputs": (_fake_outputs, f"(Tensor q, Tensor kv, Tensor k_sum, {_OUTPUTS}) -> Tensor"),
    "outputs_backward": (
        _fake_outputs_backward,
        f"(Tensor dout, Tensor q, Tensor kv, Tensor k_sum, Tensor out, {_OUTPUTS}) -> (Tensor, Tensor, Tensor)",
    ),
}
for _name, (_fake, _schema) in _OPERATORS.items():
    _triton.define(f"{OP}_backward" if "backward" in _name else OP, f"block_linear_{_name}", _schema, _fake)
    _cuda.define(f"block_linear_{_name}", _schema, _fake)
    if _ext.why_missing() is None:
        torch.library.register_fake(f"hhattn::block_linear_{_name}", _fake)
for _namespace in ("hhattn", _triton.NAMESPACE, _cuda.NAMESPACE)[_ext.why_missing() is not None :]:
    for _name, _rule, _save in (("sums", _sums_gradients, _save_sums), ("outputs", _outputs_gradients, _save_outputs)):
        _gradient = partial(_rule, _namespace)
        torch.library.register_autograd(f"{_namespace}::block_linear_{_name}", _gradient, setup_context=_save)
        no_second_derivative(OP, f"{_namespace}::block_linear_{_name}_backward", 'impl="reference" has all of them')
