"""sparse_linear_attention against its own softmax branch, dense SDPA and what people write without a kernel."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import Case, name_of, options, report
from torch import Tensor

import hhattn
from hhattn import BlockMask

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers import assert_close_to_fp64, randn

BLOCK, HEADS, DIM = 64, 2, 128
CRITICAL, MARGINAL = 0.05, 0.85  # the paper's shares, but for a few points


def classes(tokens: int, device: str) -> tuple[Tensor, Tensor]:
    """Critical and marginal blocks [1, 1, n, n], drawn at random, as many in each row."""
    n = tokens // BLOCK
    place = torch.rand(1, 1, n, n, generator=torch.Generator().manual_seed(0)).argsort(-1).to(device) / n
    return place < CRITICAL, (place >= CRITICAL) & (place < CRITICAL + MARGINAL)


def whole(blocks: Tensor) -> BlockMask:
    return BlockMask.from_blocks(blocks, block_size=(BLOCK, BLOCK))


def batched(q: Tensor, k: Tensor, v: Tensor, marginal: Tensor) -> Tensor:
    """The linear branch as batched products, states of every block at once; q, k, v [B, H, S, D]."""
    phi_q, phi_k, values = (x.unflatten(2, (-1, BLOCK)) for x in (q.softmax(-1), k.softmax(-1), v))
    shares = marginal[0, 0].to(q.dtype)
    states = torch.einsum("ij,bhjx->bhix", shares, (phi_k.mT @ values).flatten(-2)).unflatten(-1, (DIM, DIM))
    sums = torch.einsum("ij,bhjx->bhix", shares, phi_k.sum(-2))
    out = phi_q @ states / ((phi_q * sums[..., None, :]).sum(-1, keepdim=True) + 1e-15)
    return out.flatten(2, 3)


def formula(q: Tensor, k: Tensor, v: Tensor, critical: Tensor, marginal: Tensor) -> Tensor:
    """Both branches as dense formulas; q, k, v [B, H, S, D]."""
    critical, marginal = (x.repeat_interleave(BLOCK, -1).repeat_interleave(BLOCK, -2) for x in (critical, marginal))
    w = (q.softmax(-1) @ k.softmax(-1).mT).masked_fill(~marginal, 0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=critical) + w / w.sum(-1, keepdim=True) @ v


def check(tokens: int, dtype: torch.dtype, device: str) -> None:
    """Against the dense formulas in float64, at a length where these can be had."""
    tokens = min(tokens, 2048)
    blocks = classes(tokens, device)
    qkv = [randn(1, tokens, 1, DIM, dtype=dtype, seed=i, device=device) for i in range(3)]
    ours = hhattn.sparse_linear_attention(*qkv, *map(whole, blocks)).transpose(1, 2)
    double, same = ([x.transpose(1, 2).to(t) for x in qkv] for t in (torch.float64, dtype))
    assert_close_to_fp64(ours, formula(*double, *blocks), formula(*same, *blocks), ulps=8)


def forward(tokens: int, dtype: torch.dtype, args: argparse.Namespace) -> Case:
    blocks = classes(tokens, args.device)
    critical, marginal = map(whole, blocks)
    nothing = whole(torch.zeros_like(blocks[0]))
    qkv = [randn(1, tokens, HEADS, DIM, dtype=dtype, seed=i, device=args.device) for i in range(3)]
    heads = [x.transpose(1, 2).contiguous() for x in qkv]
    contenders: dict[str, Callable[[], object]] = {
        "hhattn": lambda: hhattn.sparse_linear_attention(*qkv, critical, marginal),
        "its softmax branch": lambda: hhattn.block_sparse_attention(*qkv, critical),
        "its linear branch": lambda: hhattn.sparse_linear_attention(*qkv, nothing, marginal),
        "linear branch, batched products": lambda: batched(*heads, blocks[1]),
        "SDPA, dense": lambda: F.scaled_dot_product_attention(*heads),
    }
    return Case(
        f"forward, {name_of(dtype)}, {tokens} tokens, {CRITICAL:.0%} critical, {MARGINAL:.0%} marginal",
        contenders,
        partial(check, tokens, dtype, args.device),
        moved_bytes=sum(x.nbytes for x in qkv) * 4 // 3,
        goals={"its softmax branch": 0.7, "SDPA, dense": 10.0},
    )


def with_gradients(tokens: int, dtype: torch.dtype, args: argparse.Namespace) -> Case:
    critical, marginal = map(whole, classes(tokens, args.device))
    nothing = whole(torch.zeros_like(classes(tokens, args.device)[0]))
    leaves = [randn(1, tokens, HEADS, DIM, dtype=dtype, seed=i, device=args.device).requires_grad_() for i in range(3)]
    upstream = randn(1, tokens, HEADS, DIM, dtype=dtype, seed=9, device=args.device)

    def sdpa() -> object:
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves))
        return torch.autograd.grad(out, leaves, upstream.transpose(1, 2))

    def gradients(op: Callable[..., object], *masks: BlockMask) -> object:
        return torch.autograd.grad(op(*leaves, *masks), leaves, upstream)

    return Case(
        f"forward + backward, {name_of(dtype)}, {tokens} tokens",
        {
            "hhattn": lambda: gradients(hhattn.sparse_linear_attention, critical, marginal),
            "its softmax branch": lambda: gradients(hhattn.block_sparse_attention, critical),
            "its linear branch": lambda: gradients(hhattn.sparse_linear_attention, nothing, marginal),
            "SDPA, dense": sdpa,
        },
        partial(check, tokens, dtype, args.device),
        moved_bytes=sum(x.nbytes for x in leaves) * 3,
        goals={"SDPA, dense": 4.0},
    )


def main() -> None:
    args = options(__doc__ or "", ("float32", "bfloat16"))
    long, short = (2048, 1024) if args.quick else (32768, 8192)
    few = argparse.Namespace(**vars(args) | {"rounds": min(args.rounds, 5)})  # a dense one takes many seconds
    with torch.no_grad():
        report("sparse_linear_attention", [forward(long, dtype, few) for dtype in args.dtypes], few)
    report("sparse_linear_attention", [with_gradients(short, dtype, args) for dtype in args.dtypes], args)


if __name__ == "__main__":
    main()
