"""Dense softmax attention in this package's layout, by whichever implementation is the fastest there is for it."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from hhattn import _dispatch, _ext, _transforms
from hhattn.ops import _amp, _check
from hhattn.ops.block_sparse_attention import block_sparse_attention

if TYPE_CHECKING:
    from hhattn.masks import BlockMask

OP = "attention"
FEW = 256  # queries below which SDPA is as fast as the native kernel, or faster
LONG = 8  # times as many keys, of which a causal call's list of blocks takes longer to make than it saves


def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, causal: bool = False) -> Tensor:
    """softmax(scale · q kᵀ) v over all keys: flash-attn where it is installed and takes the call, the native
    block-sparse kernel with every block for float32 on a CPU, else torch's SDPA.

    Args:
        q: [B, Sq, H, D]; k: [B, Sk, H_kv, D]; v: [B, Sk, H_kv, Dv]; H a multiple of H_kv; float32, float16 or bfloat16.
        scale: of the scores; None is 1/√D.
        causal: query i sees keys 0 … i + Sk − Sq: the last query sees every key, as in flash-attn and as a cache of
            past keys needs it. (SDPA's own ``is_causal`` counts from the first key instead.) Needs Sq ≤ Sk.

    Returns:
        [B, Sq, H, Dv] in q's dtype.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device.
        RuntimeError: ``use_impl`` or HHATTN_IMPL names an implementation that can't run this call.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check.tensor(name, x, 4)
        _check.device(name, x, "q", q)
    q, k, v = _amp.cast(q, k, v)
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"q must have a multiple of k's {k.shape[2]} heads, got {q.shape[2]}")
    _check.shape("k", k, (q.shape[0], k.shape[1], k.shape[2], q.shape[3]), "[B, Sk, H_kv, D]")
    _check.shape("v", v, (*k.shape[:3], v.shape[3]), "[B, Sk, H_kv, Dv]")
    if causal and q.shape[1] > k.shape[1]:
        raise ValueError(
            f"causal needs Sq <= Sk, got {q.shape[1]} and {k.shape[1]}: the first queries would see no key"
        )
    return _dispatch.call(OP, None, q, k, v, scale=scale, causal=causal)


@_dispatch.register(OP, "reference", transforms=True)
def _sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> Tensor:
    mask, queries, keys = None, q.shape[1], k.shape[1]
    if causal and queries != keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal and mask is None,
        scale=scale,
        enable_gqa=bool(q.shape[2] != k.shape[2]),  # jit.trace makes tensors of sizes
    )
    return out.transpose(1, 2).contiguous()


def flash_can_run(
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> str | None:
    """None where flash-attn takes such a call, else the reason why not. Without tensors: where it could take any."""
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed; pip install 'hhattn[flash]' where there is a CUDA GPU"
    if q is None or v is None:
        return None if torch.cuda.is_available() else "flash-attn needs a CUDA GPU"
    if q.device.type != "cuda":
        return f"flash-attn runs on CUDA, q is on {q.device}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes float16 and bfloat16, q is {q.dtype}"
    if q.shape[3] > 256 or v.shape[3] != q.shape[3]:
        return f"flash-attn takes one head dim up to 256, got D = {q.shape[3]} and Dv = {v.shape[3]}"
    return None


@_dispatch.register(OP, "flash", flash_can_run)
@_dispatch.register(OP, "cuda", flash_can_run)
def _flash(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> Tensor:
    from flash_attn import flash_attn_func

    return flash_attn_func(q, k, v, softmax_scale=scale, causal=causal)


def _cpp_can_run(
    q: Tensor | None = None,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
) -> str | None:
    if (reason := _ext.why_missing()) or q is None or k is None or v is None:
        return reason
    if q.device.type != "cpu":
        return f"q is on {q.device}; cpp runs on the CPU"
    if q.dtype != torch.float32:
        return f"q is {q.dtype}, for which SDPA uses the CPU's matrix units"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return "its list of blocks isn't made inside a compiled function"
    if _transforms.active() or any(type(x) not in (Tensor, torch.nn.Parameter) for x in (q, k, v)):
        return "it has no rule for torch.func's transforms and for subclasses of tensors"
    if q.shape[1] < FEW or k.shape[1] == 0:
        return f"q has {q.shape[1]} tokens and k {k.shape[1]}; below {FEW} queries SDPA is as fast"
    if causal and k.shape[1] > LONG * q.shape[1]:
        return f"its list of blocks takes longer than it saves with more than {LONG} times as many keys as queries"
    if max(q.shape[3], v.shape[3]) > 256:
        return f"head dims up to 256, got D = {q.shape[3]} and Dv = {v.shape[3]}"
    strides = [f"{name} ({x.stride(3)})" for name, x in (("q", q), ("k", k), ("v", v)) if x.stride(3) != 1]
    return f"the last dim of {strides[0]} is not contiguous" if strides else None


@lru_cache(maxsize=8)
def _every_block(queries: int, keys: int, causal: bool) -> BlockMask:
    from hhattn.masks import BlockMask, band

    size = (64, 128)
    with torch.inference_mode(False), torch.device("cpu"):  # it may serve training later, under another default
        if causal:
            return band(queries, keys, right=0, block_size=size)
        blocks = torch.ones(1, 1, -(-queries // size[0]), -(-keys // size[1]), dtype=torch.bool)
        return BlockMask.from_blocks(blocks, block_size=size, q_len=queries, k_len=keys)


@_dispatch.register(OP, "cpp", _cpp_can_run)
def _cpp(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, causal: bool) -> Tensor:
    mask = _every_block(q.shape[1], k.shape[1], causal)
    return cast(Tensor, block_sparse_attention(q, k, v, mask, scale=scale, impl="cpp"))
