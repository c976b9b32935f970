"""Faults of norm_modulate: a row over several warps, whose channels don't fill them."""

from __future__ import annotations

import test_norm_modulate as norms
import torch
from helpers import assert_close_to_fp64, strided

import hhattn.ops.norm_modulate  # noqa: F401, defines the operators
from cuda_faults import NUMBERS, Fault, Run

OPS = torch.ops.hhattn_cuda

FLOAT = ("HH_ONE_DTYPE=float",)


def forward() -> None:
    """Every argument, two frames; rows of x have gaps between them, those of the residual none."""
    for norm in ("layer", "rms"):
        args = norms.arguments(tokens=6, channels=1100, rows=2)
        wide = {n: t.double() for n, t in args.items()}
        expected, baseline = norms.eager(**wide, norm=norm), norms.eager(**args, norm=norm)
        ours = args | {"x": strided(args["x"])}
        actual = OPS.norm_modulate(*(ours[name] for name in norms.ORDER), norm == "layer", 1e-6)
        for a, e, b in zip(actual, expected, baseline, strict=True):
            assert_close_to_fp64(a, e, b, 2)


def odd() -> None:
    """Rows that no vector fits."""
    x = norms.arguments(tokens=3, channels=41)["x"]
    y, _ = OPS.norm_modulate(x, *[None] * 6, False, 1e-6)
    assert_close_to_fp64(y, norms.eager(x.double()), norms.eager(x), 2)


RUNS = {"forward": Run(forward, FLOAT), "odd": Run(odd, FLOAT)}

NORM, ROWS, SHARED = "norm_modulate.cu", "rows.cuh", "norm_modulate.cuh"
FAULTS = [
    Fault("a vector beyond the row loaded", "forward", "global-oob", ROWS,
          "if (channel(j) < channels) load_vector", "if (channel(j) <= channels) load_vector"),
    Fault("a vector beyond the row stored", "forward", "race", ROWS,
          "if (channel(j) < channels) store_vector", "if (channel(j) <= channels) store_vector"),
    Fault("no barrier between partial sums and their readers", "forward", "race", ROWS,
          "  __syncthreads();\n  return ptx::warp_sum(lane < warps", "  return ptx::warp_sum(lane < warps"),
    Fault("a second sum in the first one's place", "forward", "race", SHARED,
          "row_sum(sum, partial + 32)", "row_sum(sum, partial)"),
    Fault("partial sums of warps that the row lacks", "forward", "uninitialized", ROWS,
          "lane < warps ? partial[lane] : 0.0f", "partial[lane]"),
    Fault("variance counts what lies beyond the row", "forward", NUMBERS, SHARED,
          "r.channel(j) < a.channels ? r.v[j][i] - mean : 0.0f", "r.v[j][i] - mean"),
    Fault("a frame's scale for another's", "forward", NUMBERS, SHARED,
          "by_scale(p.s) * m.row", "(1 - by_scale(p.s)) * m.row"),
    Fault("the residual's stride for that of x", "forward", NUMBERS, NORM,
          "here.s * a.x.token", "here.s * a.residual.token"),
    Fault("a gate of the first batch entry for all", "forward", NUMBERS, SHARED,
          "p.b * m.batch + by_gate", "0 * m.batch + by_gate"),
    Fault("vectors where addresses don't allow them", "odd", "misaligned", NORM,
          "const int vec = vectors.widest();", "const int vec = 4;"),
]  # fmt: skip
