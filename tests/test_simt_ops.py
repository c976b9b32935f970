"""Every op's Triton kernels, compiled for a GPU and executed thread by thread on a CPU: nothing reported, the same
bits whatever the order of warps, and within the accuracy rule of float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import test_norm_modulate as norms
import test_qk_norm_rope as ropes
import torch
from helpers import assert_close_to_fp64, strided
from torch import Tensor

pytest.importorskip("triton")

import hhattn
from hhattn import simt
from hhattn.ops import _triton

pytestmark = pytest.mark.skipif(_triton.interpreted(), reason="the interpreter runs no PTX")
SEEDS = (0, 1)
ARCHS = (80, 90)  # of forwards; gradients on the first
Results = dict[str, Tensor]


def emulated(call: Callable[[], Results], arch: int = 80) -> Results:
    """What ``call`` returns on the emulator, the same bits for every seed, with not one report."""
    results = []
    for seed in SEEDS:
        with simt.emulate(arch, seed) as session:
            results.append(call())
        assert session.launches, "no kernel was launched"
        assert not session.reports, "\n".join(map(str, session.reports))
    first, *others = results
    for other in others:
        for name, value in first.items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=0, equal_nan=True, msg=f"{name}: seeds differ")
    return first


def check(actual: Results, expected: Mapping[str, Tensor], baseline: Mapping[str, Tensor], factor: float) -> None:
    for name, value in expected.items():
        assert_close_to_fp64(actual[name], value, baseline[name], factor=factor, name=name)


def named(*names: str) -> Callable[[Any], Results]:
    return lambda out: dict(zip(names, out if isinstance(out, tuple) else (out,), strict=False))


def on_strides(args: dict[str, Any]) -> dict[str, Any]:
    return {n: strided(t, 1) if isinstance(t, Tensor) and t.ndim > 2 else t for n, t in args.items()}


# ---- norm_modulate: tokens of a run and a bit, channels no power of two, rows for a token, for a frame, for all

NORM_CASES = {
    "all-arguments": ({"tokens": 12, "channels": 53}, "rms"),
    "long-runs": ({"tokens": 130, "channels": 40, "rows": 2, "batch": 1}, "layer"),
    "one-token": ({"tokens": 1, "channels": 112, "rows": 1}, "layer"),
}


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("case", NORM_CASES)
def test_norm_modulate(case: str, dtype: torch.dtype) -> None:
    shape, norm = NORM_CASES[case]
    args = norms.arguments(**shape, dtype=dtype)
    wide = {n: t.double() for n, t in args.items()}
    outputs = named("y", "r")
    for arch in ARCHS:
        actual = emulated(lambda: outputs(hhattn.norm_modulate(**on_strides(args), norm=norm, impl="triton")), arch)
        expected, baseline = (outputs(norms.eager(**a, norm=norm)) for a in (wide, args))
        check(actual, expected, baseline, 2)
    gradients = norms.gradients
    got = emulated(lambda: gradients(lambda **a: hhattn.norm_modulate(**a, impl="triton"), args, norm))
    eager = norms.eager
    check(got, gradients(eager, wide, norm), gradients(eager, args, norm), 3)


# ---- qk_norm_rope: k has fewer heads, text before and after, heads of 40 and 112 dims, norms over a head and over all

ROPE_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "head": ({"dim": 40, "text": 3}, {"norm": "rms"}),
    "across": ({"dim": 112, "heads": 2, "kv_heads": 1, "across_heads": True}, {"norm": "rms", "rotate": "half"}),
    "layer": ({"video": 35, "dim": 10, "text": 2}, {"norm": "layer", "text_first": True}),
    "one-token": ({"batch": 1, "video": 1, "dim": 10}, {"norm": "rms"}),
}


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("case", ROPE_CASES)
def test_qk_norm_rope(case: str, dtype: torch.dtype) -> None:
    shape, how = ROPE_CASES[case]
    args = ropes.arguments(**shape, dtype=dtype)
    wide = ropes.in_double(args)
    outputs = named("q", "k")
    for arch in ARCHS:
        actual = emulated(lambda: outputs(hhattn.qk_norm_rope(**on_strides(args), **how, impl="triton")), arch)
        expected, baseline = (outputs(ropes.eager(**a, **how)) for a in (wide, args))
        check(actual, expected, baseline, 2)
    gradients, eager = ropes.gradients, ropes.eager
    got = emulated(lambda: gradients(lambda **a: hhattn.qk_norm_rope(**a, impl="triton"), args, **how))
    check(got, gradients(eager, wide, **how), gradients(eager, args, **how), 3)
