"""The CUDA kernels of qk_norm_rope beyond the op's own tests: every way in which threads share heads, tokens by the
block, sums over many blocks, any order of threads."""

from __future__ import annotations

import os
import shutil

import pytest
import test_qk_norm_rope as ropes
import torch
from cuda_faults.qk_norm_rope import check_gradients
from helpers import randn, strided

import hhattn
from hhattn import simt

pytestmark = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="the emulator is built with g++")
BF16 = torch.bfloat16


@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("dim", [2, 32, 36, 112, 128, 250, 256])
def test_heads_of_any_length(any_order, dim, dtype, across_heads) -> None:
    """A head takes 1 to 32 lanes, some idle; vectors of 8 and 4 and single channels; a norm over heads takes warps."""
    for rotate, norm in (("interleaved", "rms"), ("half", "layer")):
        args = ropes.arguments(1, 3, 2, 4, 2, dim, dtype, across_heads=across_heads)
        ropes.check(args, "cuda", rotate=rotate, norm=norm)


@pytest.mark.parametrize("across_heads", [False, True])
def test_models(any_order, across_heads) -> None:
    """Wan's 14 and SANA-Video's heads, more tokens than a block of single norms takes."""
    for heads, dim in ((40, 128), (20, 112)):
        args = ropes.arguments(1, 3 if across_heads else 18, 0, heads, heads, dim, BF16, across_heads=across_heads)
        ropes.check(args, "cuda")


@pytest.mark.parametrize("rotate", ["interleaved", "half"])
@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_gradients_over_pieces(any_order, dtype, across_heads, rotate) -> None:
    """Three pieces of 16 tokens, the last not full; a block has 16 or 8 at a time, or one."""
    args = ropes.arguments(2, 20, 2, 4, 2, 64, dtype, across_heads=across_heads)
    for norm in ("rms", "layer"):
        check_gradients(args, rotate=rotate, norm=norm)


@pytest.mark.parametrize("shape", [(1, 20, 1, 6), (2, 20, 1, 6), (1, 20, 4, 6), (2, 20, 4, 6)], ids=str)
@pytest.mark.parametrize("across_heads", [False, True])
def test_tables_of_any_shape(any_order, shape, across_heads) -> None:
    """Shared by the batch and the heads, or not; in tile order, with text before."""
    layout = hhattn.VideoLayout(1, 5, 4, tile=(2, 2, 3), text_len=3, text_first=True)
    args = ropes.arguments(2, 20, 3, 4, 4, 6, across_heads=across_heads)
    args |= {"cos": randn(*shape, seed=3), "sin": randn(*shape, seed=4)}
    check_gradients(args, rotate="half", text_first=True, layout=layout)


def test_gradients_of_strided_queries(any_order) -> None:
    args = ropes.arguments(2, 18, 0, 6, 6, 10)
    expected = ropes.gradients(lambda **a: hhattn.qk_norm_rope(**a, impl="reference"), args)

    def on_strides(**a):
        views = a | {n: strided(a[n], 2) for n in "qk"} | {n: strided(a[n], 0) for n in ("cos", "sin")}
        return tuple(strided(out, 1) for out in hhattn.qk_norm_rope(**views, impl="cuda"))

    torch.testing.assert_close(ropes.gradients(on_strides, args), expected, rtol=1e-4, atol=1e-4)


def test_the_same_bits_in_any_order_of_threads() -> None:
    args = ropes.arguments(2, 30, 0, 4, 2, 36)
    results = []
    for seed in (0, 1, 2):
        with simt.emulate(seed=seed):
            results.append(ropes.gradients(lambda **a: hhattn.qk_norm_rope(**a, impl="cuda"), args))
    for other in results[1:]:
        assert all(torch.equal(other[name], value) for name, value in results[0].items())


def test_what_cuda_refuses() -> None:
    def call(heads: int, dim: int, **how) -> None:
        q = torch.zeros(1, 1, heads, dim)
        hhattn.qk_norm_rope(q, q.clone(), None, None, impl="cuda", **how)

    with simt.emulate():
        with pytest.raises(RuntimeError, match="q has D = 258; cuda takes up to 256"):
            call(1, 258)
        with pytest.raises(RuntimeError, match="q has 65 heads of 128 channels; cuda holds 64 such heads"):
            call(65, 128, across_heads=True)
        call(64, 128, across_heads=True)
        call(65, 128)
        q, cos, order = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 1, 8), torch.zeros(3, dtype=torch.int64)
        with pytest.raises(RuntimeError, match=r"order must be contiguous int64 \[S\]"):
            torch.ops.hhattn_cuda.qk_norm_rope(q, q, *[None] * 6, 1, False, True, 1e-6, 0, order)
        with pytest.raises(RuntimeError, match="start is out of range"):
            torch.ops.hhattn_cuda.qk_norm_rope(q, q, cos, cos, *[None] * 4, 1, False, True, 1e-6, 1, None)
