"""norm_modulate against eager PyTorch, torch.compile and the speed of memory."""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path

import torch
from harness import Case, name_of, options, report

import hhattn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from helpers import assert_close_to_fp64, randn
from test_norm_modulate import eager

SHAPES = [(1, 8192, 1536, 1), (1, 9680, 2240, 11), (1, 9680, 2240, 9680)]  # batch, tokens, channels, modulation rows
QUICK = [(1, 64, 96, 4)]


def case(
    shape: tuple[int, int, int, int], norm: str, gated: bool, dtype: torch.dtype, args: argparse.Namespace
) -> Case:
    batch, tokens, channels, rows = shape
    x, residual = (randn(batch, tokens, channels, dtype=dtype, seed=i, device=args.device) for i in (0, 1))
    scale, shift, gate = (randn(batch, rows, channels, dtype=dtype, seed=i, device=args.device) for i in (2, 3, 4))
    tensors = {"residual": residual, "gate": gate} if gated else {}
    how = {"norm": norm, **tensors}
    compiled = torch.compile(eager, dynamic=False)

    def check() -> None:
        double = {n: t.double() for n, t in {"x": x, "scale": scale, "shift": shift, **tensors}.items()}
        outputs = (
            hhattn.norm_modulate(x, scale, shift, **how),
            eager(**double, norm=norm),
            eager(x, scale, shift, **how),
        )
        for actual, expected, baseline in zip(*(outputs if gated else ([o] for o in outputs)), strict=True):
            assert_close_to_fp64(actual, expected, baseline)

    streams, modulations = (4, 3) if gated else (2, 2)  # in and out
    return Case(
        f"{name_of(dtype)} {norm} {list(shape[:3])}, {rows} rows{', residual' if gated else ''}",
        {
            "hhattn": lambda: hhattn.norm_modulate(x, scale, shift, **how),
            "eager": lambda: eager(x, scale, shift, **how),
            "compile": lambda: compiled(x, scale, shift, **how),
        },
        check,
        moved_bytes=(streams * x.numel() + modulations * scale.numel()) * x.element_size(),
        goals={"compile": 1.2, "copy_": 0.8},
    )


def main() -> None:
    args = options(__doc__ or "")
    shapes = QUICK if args.quick else SHAPES
    kinds = product(args.dtypes, shapes, (False, True), ("rms", "layer"))
    cases = [case(shape, norm, gated, dtype, args) for dtype, shape, gated, norm in kinds]
    with torch.no_grad():
        report("norm_modulate", cases, args)


if __name__ == "__main__":
    main()
