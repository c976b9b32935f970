"""Faults of norm_modulate: a row over several warps, whose channels don't fill them."""

from __future__ import annotations

import test_norm_modulate as norms
import test_norms_backward as norms_backward
import torch
from helpers import assert_close_to_fp64, strided

import hhattn
import hhattn.ops.norm_modulate
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


def check_gradients(args: dict[str, torch.Tensor], norm: str) -> None:
    expected = norms.gradients(norms.eager, {n: t.double() for n, t in args.items()}, norm)
    baseline = norms.gradients(norms.eager, args, norm)
    actual = norms.gradients(lambda **a: hhattn.norm_modulate(**a, impl="cuda"), args, norm)
    for name in args:
        assert_close_to_fp64(actual[name], expected[name], baseline[name], factor=3, name=f"gradient of {name}")


def odd() -> None:
    """Rows that no vector fits."""
    x = norms.arguments(tokens=3, channels=41)["x"]
    y, _ = OPS.norm_modulate(x, *[None] * 6, False, 1e-6)
    assert_close_to_fp64(y, norms.eager(x.double()), norms.eager(x), 2)


def backward() -> None:
    """More tokens than a piece has; rows of modulation within pieces, across them and over many."""
    check_gradients(norms_backward.modulation(40, 300, (1, 5, 40), 2, False), "layer")
    check_gradients(norms_backward.modulation(40, 300, (2, 1, 20), 3, True), "rms")


RUNS = {"backward": Run(backward, (*FLOAT, "HH_VEC=4")), "forward": Run(forward, FLOAT), "odd": Run(odd, FLOAT)}

BACK, PARTS, NORM, ROWS, SHARED = (
    "norm_modulate_backward.cu",
    "part_sums.cuh",
    "norm_modulate.cu",
    "rows.cuh",
    "norm_modulate.cuh",
)
FAULTS = [
    Fault("a vector beyond the row loaded", "forward", "global-oob", ROWS,
          "if (channel(j) < channels) load_vector", "if (channel(j) <= channels) load_vector"),
    Fault("a vector beyond the row stored", "forward", "race", ROWS,
          "if (channel(j) < channels) store_vector", "if (channel(j) <= channels) store_vector"),
    Fault("no barrier between partial sums and their readers", "forward", "race", ROWS,
          "= x[i];\n  __syncthreads();\n", "= x[i];\n"),
    Fault("a second sum in the first one's place", "forward", "race", NORM,
          "row_sum(squares, partial + 32)", "row_sum(squares, partial)"),
    Fault("partial sums of warps that the row lacks", "forward", "uninitialized", ROWS,
          "lane < warps ? partial[32 * i + lane] : 0.0f", "partial[32 * i + lane]"),
    Fault("variance counts what lies beyond the row", "forward", NUMBERS, SHARED,
          "r.channel(j) < channels ? r.v[j][i] - mean : 0.0f", "r.v[j][i] - mean"),
    Fault("a frame's scale for another's", "forward", NUMBERS, SHARED,
          "by_scale(p.s) * m.row", "(1 - by_scale(p.s)) * m.row"),
    Fault("the residual's stride for that of x", "forward", NUMBERS, NORM,
          "here.s * a.x.token", "here.s * a.residual.token"),
    Fault("a gate of the first batch entry for all", "forward", NUMBERS, SHARED,
          "p.b * m.batch + by_gate", "0 * m.batch + by_gate"),
    Fault("vectors where addresses don't allow them", "odd", "misaligned", NORM,
          "const int vec = vectors.widest();", "const int vec = 4;"),
    Fault("partial sums of a row where the one before may be read", "backward", "race", BACK,
          "s % 2 * 96", "0"),
    Fault("a sum kept when its row of modulation ends", "backward", NUMBERS, BACK,
          "    sum.fill(0.0f);\n", ""),
    Fault("a piece's last row of modulation in the first one's place", "backward", "uninitialized", PARTS,
          "a.slots + (first > begin)) * a.channels};", "a.slots) * a.channels};"),
    Fault("one piece too few in a row's sum", "backward", NUMBERS, PARTS,
          "pieces = last / a.run - from + 1", "pieces = (last + 1) / a.run - from"),
    Fault("the mean of u missing from the gradient", "backward", NUMBERS, BACK,
          "f.layer ? sums[2] / count : 0.0f", "0.0f"),
    Fault("the gate's gradient from the gated x", "backward", NUMBERS, BACK,
          "sum += d * x; }, u, x)", "sum += d * x; }, u, r)"),
    Fault("pieces that overlap by a token", "backward", "race", BACK,
          "end = min(begin + uint32_t(a.run), at.tokens)", "end = min(begin + uint32_t(a.run) + 1, at.tokens)"),
    Fault("no barrier before groups are added up", "backward", "race", PARTS,
          "  __syncthreads();\n", ""),
    Fault("sums of a row's last groups left out", "backward", NUMBERS, PARTS,
          "group < GROUPS; ++group", "group < GROUPS - 6; ++group"),
    Fault("one batch entry's sums for all of a shared row's", "backward", NUMBERS, PARTS,
          "entry * a.summed + term / per_entry", "entry * a.summed"),
]  # fmt: skip
