"""qk_norm_rope against eager PyTorch, torch.compile and the speed of memory."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from harness import Case, name_of, options, report

import hhattn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers import assert_close_to_fp64, randn
from test_qk_norm_rope import eager

# label, grid, heads, head dim, one norm over all heads, tile order
SHAPES = [
    ("", (8, 32, 32), 12, 128, True, False),
    ("SANA-Video", (11, 22, 40), 20, 112, True, False),
    ("Wan 1.3B", (6, 30, 52), 12, 128, True, False),
    ("HunyuanVideo", (4, 30, 52), 24, 128, False, False),
    ("Wan 1.3B, tiles", (6, 30, 52), 12, 128, True, True),
]
QUICK = [("small", (2, 3, 4), 2, 16, True, True)]


def case(
    shape: tuple[str, tuple[int, int, int], int, int, bool, bool], dtype: torch.dtype, args: argparse.Namespace
) -> Case:
    label, grid, heads, dim, across, tiles = shape
    layout = hhattn.VideoLayout(*grid) if tiles else None
    tokens = grid[0] * grid[1] * grid[2]
    q, k = (randn(1, tokens, heads, dim, dtype=dtype, seed=i, device=args.device) for i in (0, 1))
    weight = randn(heads * dim if across else dim, dtype=dtype, seed=2, device=args.device)
    cos, sin = hhattn.rope_3d(grid, dim, device=args.device)
    how = {"q_weight": weight, "k_weight": weight, "across_heads": across, "layout": layout}
    compiled = torch.compile(eager, dynamic=False)

    def check() -> None:
        double = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in how.items()}
        expected = eager(q.double(), k.double(), cos.double(), sin.double(), **double)
        outputs = hhattn.qk_norm_rope(q, k, cos, sin, **how), expected, eager(q, k, cos, sin, **how)
        for actual, exact, baseline in zip(*outputs, strict=True):
            assert_close_to_fp64(actual, exact, baseline)

    return Case(
        f"{name_of(dtype)} {label + ' ' * bool(label)}[1, {tokens}, {heads}, {dim}]",
        {
            "hhattn": lambda: hhattn.qk_norm_rope(q, k, cos, sin, **how),
            "eager": lambda: eager(q, k, cos, sin, **how),
            "compile": lambda: compiled(q, k, cos, sin, **how),
        },
        check,
        moved_bytes=4 * q.numel() * q.element_size() + 2 * cos.numel() * cos.element_size(),
        goals={"compile": 1.2, "copy_": 0.7},
    )


def main() -> None:
    args = options(__doc__ or "")
    with torch.no_grad():
        shapes = QUICK if args.quick else SHAPES
        report("qk_norm_rope", [case(shape, dtype, args) for dtype in args.dtypes for shape in shapes], args)


if __name__ == "__main__":
    main()
