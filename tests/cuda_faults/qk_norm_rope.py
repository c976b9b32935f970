"""Faults of qk_norm_rope: tokens beyond a block, heads of 36 channels that don't fill their lanes."""

from __future__ import annotations

from typing import Any

import test_qk_norm_rope as ropes
from helpers import assert_close_to_fp64, strided

import hhattn
from cuda_faults import NUMBERS, Fault, Run

FLOAT = ("HH_ONE_DTYPE=float",)
GATHERED = {"rotate": "interleaved", "layout": hhattn.VideoLayout(1, 4, 5, tile=(1, 2, 2), text_len=3)}


def check_gradients(args: dict[str, Any], **how: Any) -> None:
    expected = ropes.gradients(ropes.eager, ropes.in_double(args), **how)
    baseline = ropes.gradients(ropes.eager, args, **how)
    actual = ropes.gradients(lambda **a: hhattn.qk_norm_rope(**a, impl="cuda"), args, **how)
    for name, value in expected.items():
        assert_close_to_fp64(actual[name], value, baseline[name], factor=3, name=f"gradient of {name}")


def forward() -> None:
    """Text behind, tile order, rows of q with gaps between them; a norm over single heads and one over all."""
    for across_heads in (False, True):
        args = ropes.arguments(2, 20, 3, 4, 2, 72, across_heads=across_heads)
        ropes.check(args | {"q": strided(args["q"])}, "cuda", norm="layer", **GATHERED)
        ropes.check(args, "cuda", norm="rms", rotate="half")


def odd() -> None:
    """Heads that no vector fits."""
    ropes.check(ropes.arguments(1, 5, 0, 3, 3, 10), "cuda", rotate="half")


def backward() -> None:
    for across_heads in (False, True):
        args = ropes.arguments(2, 20, 3, 4, 2, 72, across_heads=across_heads)
        check_gradients(args, norm="layer", **GATHERED)
        check_gradients(args, norm="rms", rotate="half")


RUNS = {
    "forward": Run(forward, (*FLOAT, "HH_VEC=4")),
    "odd": Run(odd, (*FLOAT, "HH_VEC=0")),
    "backward": Run(backward, (*FLOAT, "HH_VEC=4")),
}

ROPE, BACK, SHARED = "qk_norm_rope.cu", "qk_norm_rope_backward.cu", "qk_norm_rope.cuh"
FAULTS = [
    Fault("a channel beyond the head", "odd", "global-oob", SHARED,
          "lane(s) * VEC + i < s.dim / 2", "lane(s) * VEC + i <= s.dim / 2"),
    Fault("a vector beyond the head stored", "forward", "race", SHARED,
          "if (inside(s, j, 0)) store_vector", "if (inside(s, j, 0) || !HALVES) store_vector"),
    Fault("tokens beyond the last stored", "forward", "global-oob", ROPE,
          "if (there) x.store", "if (h < heads) x.store"),
    Fault("text is rotated", "forward", "global-oob", SHARED,
          "s >= a.start && at < a.video", "s >= a.start"),
    Fault("tile order ignored", "forward", NUMBERS, SHARED,
          "a.order ? uint32_t(a.order[out]) : out", "out"),
    Fault("the sine's sign", "forward", NUMBERS, ROPE,
          "cos.v[ja][ia] - second", "cos.v[ja][ia] + second"),
    Fault("the first of a pair turned before the second", "forward", NUMBERS, ROPE,
          "+ first * sin.v[jb][ib]", "+ x.v[ja][ia] * sin.v[jb][ib]"),
    Fault("a sum over half of a head's lanes", "forward", NUMBERS, SHARED,
          "for (uint32_t by = lanes / 2;", "for (uint32_t by = lanes / 4;"),
    Fault("the variance's sums in the mean's place", "forward", "race", ROPE,
          "shape.lanes, partial + 32)", "shape.lanes, partial)"),
    Fault("one weight for all heads under one norm", "forward", NUMBERS, ROPE,
          "ACROSS ? h * a.dim : 0", "0"),
    Fault("turned the same way back", "backward", NUMBERS, BACK,
          "second * cos.v[jb][ib] - first", "second * cos.v[jb][ib] + first"),
    Fault("dx in the order of dy", "backward", NUMBERS, BACK,
          "a.tokens + t.s) * a.heads", "a.tokens + out) * a.heads"),
    Fault("the sums of a token where the one before may be read", "backward", "race", BACK,
          "first % 2 * 96", "0"),
    Fault("one group of a warp in the sum", "backward", NUMBERS, BACK,
          "for (uint32_t by = lanes; by < 32; by *= 2)", "for (uint32_t by = 32; by < 32; by *= 2)"),
    Fault("warps' sums read before they are there", "backward", "uninitialized", BACK,
          "[i % VEC];\n  __syncthreads();\n", "[i % VEC];\n"),
    Fault("the sine's gradient of both with one sign", "backward", NUMBERS, BACK,
          "= -g.v[ja][ia]", "= g.v[ja][ia]"),
]  # fmt: skip
