"""block_sparse_attention against dense SDPA, FlexAttention, gathered blocks and the speed of a matrix product."""

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
from torch.nn.attention.flex_attention import BlockMask as FlexMask
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import hhattn
from hhattn import BlockMask

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers import assert_close_to_fp64, randn

BLOCK = (64, 128)
Run = Callable[[], object]


def random_blocks(tokens: int, density: float, device: str) -> BlockMask:
    """Each block of queries attends as many blocks of keys, drawn at random, all full."""
    nq, nk = tokens // BLOCK[0], tokens // BLOCK[1]
    places = torch.rand(1, 1, nq, nk, generator=torch.Generator().manual_seed(0)).argsort(-1)
    keep = places < round(density * nk)
    return BlockMask.from_blocks(keep, block_size=BLOCK, q_len=tokens, k_len=tokens).to(device)


def band(tokens: int, blocks: int) -> BlockMask:
    """Every query block attends ``blocks`` key blocks round its own place."""
    nq, nk = tokens // BLOCK[0], tokens // BLOCK[1]
    start = (torch.arange(nq) * nk // nq - blocks // 2).clamp(0, nk - blocks)[:, None]
    column = torch.arange(nk)
    keep = (column >= start) & (column < start + blocks)
    return BlockMask.from_blocks(keep[None, None], block_size=BLOCK, q_len=tokens, k_len=tokens)


def neighborhood(layout: hhattn.VideoLayout, window: tuple[int, int, int]) -> Tensor:
    """Pairs [S, S] in tile order: each token attends the window of tokens round it, which moves inwards at edges."""
    keep = torch.ones(1, 1, dtype=torch.bool)
    for size, width in zip((layout.frames, layout.height, layout.width), window, strict=True):
        at = torch.arange(size)
        start = (at - width // 2).clamp(0, size - width)[:, None]
        keep = torch.kron(keep, (at >= start) & (at < start + width))
    order = layout.tile_index(keep.device)
    return keep[order][:, order]


def gathered(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
    """What people write without a kernel: SDPA of each query block with its blocks of keys, gathered. [B, H, S, D]."""
    bq, bk = mask.block_size
    out = torch.empty_like(q)
    keys, values = (x.unflatten(2, (-1, bk)) for x in (k, v))
    for i, n in enumerate(mask.full_kv_num_blocks[0, 0].tolist()):
        columns = mask.full_kv_indices[0, 0, i, :n]
        rows = slice(i * bq, (i + 1) * bq)
        out[:, :, rows] = F.scaled_dot_product_attention(
            q[:, :, rows], keys[:, :, columns].flatten(2, 3), values[:, :, columns].flatten(2, 3)
        )
    return out


def flex_blocks(mask: BlockMask) -> FlexMask:
    """Full blocks only, and so without a predicate, which is FlexAttention at its best."""
    flex = mask.to_flex()
    lists = flex.kv_num_blocks, flex.kv_indices, flex.full_kv_num_blocks, flex.full_kv_indices
    return FlexMask.from_kv_blocks(*lists, BLOCK_SIZE=mask.block_size)


def flex_neighborhood(layout: hhattn.VideoLayout, window: tuple[int, int, int], device: str) -> FlexMask:
    """:func:`neighborhood` in raster order, as arithmetic on token numbers, which FlexAttention compiles."""
    sizes = layout.frames, layout.height, layout.width

    def near(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        keep = q == q
        for size, width in zip(reversed(sizes), reversed(window), strict=True):
            start = (q % size - width // 2).clamp(0, size - width)
            keep = keep & (k % size >= start) & (k % size < start + width)
            q, k = q // size, k // size
        return keep

    return create_block_mask(near, None, None, layout.seq_len, layout.seq_len, device=device)


def executed(mask: BlockMask, heads: int, dim: int) -> int:
    """Operations of the two products over every block that the mask touches."""
    blocks = int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum())
    return 4 * dim * heads * blocks * mask.block_size[0] * mask.block_size[1]


def inputs(tokens: int, heads: int, dim: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [randn(1, tokens, heads, dim, dtype=dtype, seed=i, device=device) for i in range(3)]


def check(qkv: list[Tensor], mask: BlockMask, keep: Tensor) -> None:
    """Against the dense formula in float64, head by head."""
    for h in range(qkv[0].shape[2]):
        head = [x[:, :, h : h + 1] for x in qkv]
        ours = hhattn.block_sparse_attention(*head, mask).transpose(1, 2)
        double, same = ([x.transpose(1, 2).to(t) for x in head] for t in (torch.float64, qkv[0].dtype))
        expected, baseline = (F.scaled_dot_product_attention(*x, attn_mask=keep) for x in (double, same))
        assert_close_to_fp64(ours, expected, baseline, ulps=8)
        if qkv[0].shape[1] > 2048:
            return  # one head tells, and a dense float64 one takes seconds


def pairs(mask: BlockMask, density: float) -> Tensor:
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=mask.device) if density == 1 else mask.to_dense()


def full_blocks(density: float, tokens: int, args: argparse.Namespace) -> Case:
    mask = random_blocks(tokens, density, args.device)
    qkv = inputs(tokens, 4, 64, torch.float32, args.device)
    dense = [x.transpose(1, 2).contiguous() for x in qkv]
    flex = torch.compile(flex_attention, dynamic=False)
    flex_mask = flex_blocks(mask)
    contenders: dict[str, Run] = {
        "hhattn": lambda: hhattn.block_sparse_attention(*qkv, mask),
        "SDPA, dense": lambda: F.scaled_dot_product_attention(*dense),
        "FlexAttention": lambda: flex(*dense, block_mask=flex_mask),
        "gather + SDPA": lambda: gathered(*dense, mask),
    }
    goals = {"torch.mm": 0.8, "SDPA, dense": 0.9 / density, "FlexAttention": 2.0 if density <= 0.125 else 1.0}
    return Case(
        f"forward, density {density}",
        contenders,
        partial(check, qkv, mask, pairs(mask, density)),
        flops=executed(mask, 4, 64),
        goals=goals | {"gather + SDPA": 1.0},
    )


def window(args: argparse.Namespace) -> Case:
    layout = hhattn.VideoLayout(*((3, 5, 8) if args.quick else (8, 23, 40)), tile=(4, 4, 4))
    size = (3, 3, 3) if args.quick else (5, 9, 9)
    keep = neighborhood(layout, size).to(args.device)[None, None]
    mask = BlockMask.from_dense(keep, block_size=(64, 64))
    qkv = inputs(layout.seq_len, 4, 64, torch.float32, args.device)
    dense = [x.transpose(1, 2).contiguous() for x in qkv]
    flex = torch.compile(flex_attention, dynamic=False)
    flex_mask = flex_neighborhood(layout, size, args.device)
    return Case(
        f"forward, window {size} of {layout.frames}x{layout.height}x{layout.width}, partial blocks",
        {
            "hhattn": lambda: hhattn.block_sparse_attention(*qkv, mask),
            "SDPA, dense": lambda: F.scaled_dot_product_attention(*dense),
            "SDPA, bool mask": lambda: F.scaled_dot_product_attention(*dense, attn_mask=keep),
            "FlexAttention": lambda: flex(*dense, block_mask=flex_mask),
        },
        partial(check, qkv, mask, keep),
        flops=executed(mask, 4, 64),
        goals={"SDPA, dense": 2.0, "SDPA, bool mask": 1.0, "FlexAttention": 1.0},
    )


def with_gradients(dtype: torch.dtype, tokens: int, args: argparse.Namespace) -> Case:
    """Forward and backward at a density of a quarter; halves against our own float32 too."""
    mask = random_blocks(tokens, 0.25, args.device)
    leaves = [x.requires_grad_() for x in inputs(tokens, 4, 64, dtype, args.device)]
    floats = [x.detach().float().requires_grad_() for x in leaves]
    upstream = randn(1, tokens, 4, 64, dtype=dtype, seed=9, device=args.device)

    def ours(x: list[Tensor], grad: Tensor) -> object:
        return torch.autograd.grad(hhattn.block_sparse_attention(*x, mask), x, grad)

    def sdpa() -> object:
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in floats))
        return torch.autograd.grad(out, floats, upstream.float().transpose(1, 2))

    contenders: dict[str, Run] = {"hhattn": lambda: ours(leaves, upstream), "SDPA, dense, float32": sdpa}
    goals = {"torch.mm": 0.6, "SDPA, dense, float32": 2.0}
    if dtype != torch.float32:
        contenders["hhattn, float32"] = lambda: ours(floats, upstream.float())
        goals["hhattn, float32"] = 1 / 1.25
    flops = executed(mask, 4, 64) * 7 // 2  # two products forward, five backward
    counted = {"hhattn, float32": flops}
    detached = [x.detach() for x in leaves]
    return Case(
        f"forward + backward, {name_of(dtype)}, density 0.25",
        contenders,
        partial(check, detached, mask, pairs(mask, 0.25)),
        flops=flops,
        goals=goals,
        other_work=counted if dtype != torch.float32 else {},
    )


def growth(tokens: int, args: argparse.Namespace) -> Case:
    """The time of an executed block at two lengths, the same number of key blocks for each query block."""
    lengths = (4096, tokens)
    qkvs = [inputs(n, 1, 64, torch.float32, args.device) for n in lengths]
    masks = [band(n, 16).to(args.device) for n in lengths]
    work = [executed(mask, 1, 64) for mask in masks]
    return Case(
        f"forward, {tokens} tokens, 16 blocks of keys for each of queries",
        {
            "hhattn": lambda: hhattn.block_sparse_attention(*qkvs[1], masks[1]),
            "4096 tokens": lambda: hhattn.block_sparse_attention(*qkvs[0], masks[0]),
        },
        partial(check, qkvs[0], masks[0], masks[0].to_dense()),
        flops=work[1],
        goals={"4096 tokens": 0.9},
        other_work={"4096 tokens": work[0]},
    )


def main() -> None:
    args = options(__doc__ or "", ("float32", "bfloat16", "float16"))
    tokens = 1024 if args.quick else 8192
    with torch.no_grad():
        report("block_sparse_attention", [full_blocks(d, tokens, args) for d in (1.0, 0.5, 0.25, 0.125)], args)
        report(
            "block_sparse_attention", [window(args), growth(8192 if args.quick else 220_800 // 128 * 128, args)], args
        )
    report("block_sparse_attention", [with_gradients(dtype, tokens, args) for dtype in args.dtypes], args)


if __name__ == "__main__":
    main()
