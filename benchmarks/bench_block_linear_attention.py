"""block_linear_attention against the formula that models run, and the speed of a matrix product."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from harness import Case, name_of, options, report
from torch import Tensor

import hhattn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers import assert_close_to_fp64, randn
from linear_oracle import formula

SHAPES = [(8, 32), (20, 112)]  # heads, head dim
FRAMES, GRID, CHUNK = 40, (23, 40), 10  # 36,800 tokens in chunks of 9,200


class Problem:
    """One shape, with what every contender is given."""

    def __init__(self, heads: int, dim: int, dtype: torch.dtype, frames: int, device: str) -> None:
        tokens = frames * GRID[0] * GRID[1]
        self.chunk = CHUNK * GRID[0] * GRID[1]
        self.qkv = [randn(1, tokens, heads, dim, dtype=dtype, seed=i, device=device) for i in range(3)]
        self.rope = hhattn.rope_3d((frames, *GRID), dim, device=device)
        self.upstream = randn(1, tokens, heads, dim, dtype=dtype, seed=9, device=device)
        self.flops = 4 * tokens * heads * dim * dim
        self.label = f"{tokens} tokens, {heads} heads of {dim}, {name_of(dtype)}"

    def ours(self, qkv: list[Tensor]) -> Tensor:
        return hhattn.block_linear_attention(*qkv, chunk_lens=self.chunk, rope=self.rope)

    def formula(self, qkv: list[Tensor]) -> Tensor:
        return formula(*qkv, self.chunk, self.rope)

    def check(self) -> None:
        """One head against float64."""
        head = [x[:, :, :1] for x in self.qkv]
        expected = formula(*(x.double() for x in head), self.chunk, tuple(x.double() for x in self.rope))
        assert_close_to_fp64(self.ours(head), expected, self.formula(head), ulps=8)


def forward(heads: int, dim: int, dtype: torch.dtype, frames: int, args: argparse.Namespace) -> Case:
    p = Problem(heads, dim, dtype, frames, args.device)
    contenders = {"hhattn": lambda: p.ours(p.qkv), "formula": lambda: p.formula(p.qkv)}
    goals = {"formula": 3.0} | ({"torch.mm": 0.5} if dim > 64 else {})
    other: dict[str, int] = {}
    if dtype != torch.float32:
        floats = [x.float() for x in p.qkv]
        contenders["hhattn, float32"] = lambda: p.ours(floats)
        goals["hhattn, float32"], other["hhattn, float32"] = 1 / 1.25, p.flops
    return Case(f"forward, {p.label}", contenders, p.check, flops=p.flops, goals=goals, other_work=other)


def with_gradients(heads: int, dim: int, dtype: torch.dtype, frames: int, args: argparse.Namespace) -> Case:
    p = Problem(heads, dim, dtype, frames, args.device)
    leaves = [x.clone().requires_grad_() for x in p.qkv]
    contenders = {
        "hhattn": lambda: torch.autograd.grad(p.ours(leaves), leaves, p.upstream),
        "formula": lambda: torch.autograd.grad(p.formula(leaves), leaves, p.upstream),
    }
    return Case(f"forward + backward, {p.label}", contenders, p.check, flops=3 * p.flops, goals={"formula": 2.5})


def growth(frames: int, args: argparse.Namespace) -> Case:
    """The time of a token at two lengths."""
    short, long = (Problem(2, 64, torch.float32, n, args.device) for n in (CHUNK, frames))
    return Case(
        f"forward, {long.label}",
        {"hhattn": lambda: long.ours(long.qkv), short.label: lambda: short.ours(short.qkv)},
        short.check,
        flops=long.flops,
        goals={short.label: 0.9},
        other_work={short.label: short.flops},
    )


def main() -> None:
    args = options(__doc__ or "", ("float32", "bfloat16", "float16"))
    frames = 20 if args.quick else FRAMES
    shapes = [(2, 16)] if args.quick else SHAPES
    with torch.no_grad():
        cases = [forward(*shape, dtype, frames, args) for dtype in args.dtypes for shape in shapes]
        report("block_linear_attention", [*cases, growth(2 * CHUNK if args.quick else 240, args)], args)
    cases = [with_gradients(*shape, dtype, frames, args) for dtype in args.dtypes for shape in shapes]
    report("block_linear_attention and its gradients", cases, args)


if __name__ == "__main__":
    main()
