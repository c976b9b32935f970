"""The CUDA kernels of norm_modulate beyond the op's own tests: rows over many warps, pieces of tokens and their sums,
any order of threads."""

from __future__ import annotations

import os
import shutil

import pytest
import test_norm_modulate as norms
import test_norms_backward as norms_backward
import torch
from cuda_faults.norm_modulate import check_gradients
from helpers import assert_close_to_fp64, randn, strided

import hhattn
from hhattn import simt

pytestmark = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="the emulator is built with g++")
BF16 = torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("channels", [8, 520, 1534, 5120, 16384])
def test_rows_of_any_length(any_order, channels, dtype) -> None:
    """Vectors of 8, 4 and 1, the last ones beyond the row; from a warp that is mostly idle to a block of 32."""
    for norm in ("layer", "rms"):
        norms.check(norms.arguments(1, 5, channels, 5, dtype), "cuda", norm)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rows", [(1, 5, 40), (20, 8, 2), (10, 40, 4)], ids=str)
def test_sums_over_pieces(any_order, rows, shared) -> None:
    """Rows of modulation within a piece of 16 tokens, across two and over many; own or shared by the batch."""
    check_gradients(norms_backward.modulation(40, 24, rows, 3, shared), "layer")
    assert any_order.launches["norm_modulate_backward"] == 1


@pytest.mark.parametrize(
    "left_out", [("weight", "bias"), ("scale", "shift", "gate"), ("weight", "scale"), ("residual", "gate")]
)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_gradients_with_arguments_left_out(any_order, left_out, dtype) -> None:
    args = norms_backward.modulation(20, 264, (4, 5, 1), 2, False)
    check_gradients({n: t.to(dtype) for n, t in args.items() if n not in left_out}, "rms")


def test_gradients_of_long_rows(any_order) -> None:
    for channels in (5120, 8192):
        args = norms_backward.modulation(3, channels, (3, 1, 1), 1, False)
        check_gradients({n: t.to(BF16) for n, t in args.items()}, "layer")


def test_gradients_of_mixed_dtypes_on_strides(any_order) -> None:
    args = norms_backward.modulation(20, 72, (5, 2, 1), 2, False)
    args["residual"], args["gate"] = args["residual"].bfloat16(), args["gate"].half()
    expected = norms.gradients(lambda **a: hhattn.norm_modulate(**a, impl="reference"), args, "rms")

    def on_strides(**a):
        views = {n: strided(t, 1) if isinstance(t, torch.Tensor) and t.ndim == 3 else t for n, t in a.items()}
        return tuple(strided(out, 1) for out in hhattn.norm_modulate(**views, impl="cuda"))

    actual = norms.gradients(on_strides, args, "rms")
    for name, x in args.items():
        close = {"rtol": 2e-2, "atol": 2e-2} if x.dtype != torch.float32 else {"rtol": 1e-4, "atol": 1e-3}
        torch.testing.assert_close(actual[name], expected[name], **close, msg=name)


def test_the_same_bits_in_any_order_of_threads() -> None:
    args = norms_backward.modulation(50, 300, (2, 5, 1), 2, True)
    results = []
    for seed in (0, 1, 2):
        with simt.emulate(seed=seed):
            results.append(norms.gradients(lambda **a: hhattn.norm_modulate(**a, impl="cuda"), args, "layer"))
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_what_cuda_refuses() -> None:
    x = torch.zeros(1, 1, 8200)
    with simt.emulate():
        with pytest.raises(RuntimeError, match="cuda makes gradients of up to 8192"):
            hhattn.norm_modulate(x.clone().requires_grad_(), impl="cuda")
        hhattn.norm_modulate(x, impl="cuda")
        with pytest.raises(RuntimeError, match="16385 channels; cuda holds a row in registers"):
            hhattn.norm_modulate(torch.zeros(1, 1, 16385), impl="cuda")
        with pytest.raises(RuntimeError, match="last dim of x is not contiguous"):
            hhattn.norm_modulate(torch.zeros(1, 8, 4).transpose(1, 2), impl="cuda")
        with pytest.raises(RuntimeError, match="scale: its rows must divide the tokens"):
            torch.ops.hhattn_cuda.norm_modulate(x, torch.zeros(1, 2, 8200), *[None] * 5, False, 1e-6)
    with pytest.raises(RuntimeError, match=r"within hhattn.simt.emulate"):
        torch.ops.hhattn_cuda.norm_modulate(x, *[None] * 6, False, 1e-6)


def test_long_sums_stay_exact() -> None:
    """As many tokens as pieces take before they grow."""
    x, scale = randn(1, 300, 4), randn(1, 1, 4, seed=1)
    args = {"x": x, "scale": scale}
    expected = norms.gradients(norms.eager, {n: t.double() for n, t in args.items()}, "rms")
    with simt.emulate():
        actual = norms.gradients(lambda **a: hhattn.norm_modulate(**a, impl="cuda"), args, "rms")
    assert_close_to_fp64(actual["scale"], expected["scale"], expected["scale"].float(), 3, ulps=8)
