"""The CUDA kernels of block_linear_attention on the emulator: what tests of every implementation don't ask of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import linear_oracle as linear
import pytest
import torch
from helpers import assert_close_to_fp64
from torch import Tensor

from hhattn import block_linear_attention, simt

pytestmark = [
    pytest.mark.any_device,
    pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="the emulator is built with g++"),
]
BF16 = torch.bfloat16


def emulated(call: Callable[[], list[Tensor]], seeds: tuple[int, ...] = (0, 1, 2)) -> list[Tensor]:
    """What ``call`` returns, the same bits for every seed, with not one report."""
    results = []
    for seed in seeds:
        with simt.emulate(80, seed) as session:
            results.append(call())
        assert session.launches
        assert not session.reports, "\n".join(map(str, session.reports))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)
    return results[0]


def test_the_same_bits_in_any_order() -> None:
    """Outputs, state and gradients; the chunk has two pieces, every head its own gate."""
    given = [x.to(BF16) for x in linear.inputs(1, 300, 2, 1, 32, 32)]
    extra = linear.options(1, 300, 2, 32, 32, 1, linear.EVERY)
    extra = {n: linear.to(x, torch.float32) for n, x in extra.items()}

    def call() -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in given]
        out, state = block_linear_attention(*leaves, **extra, eps=1e-3, output_final_state=True, impl="cuda")
        loss = out.float().square().sum() + state.kv.square().sum()
        return [out, *state, *torch.autograd.grad(loss, leaves)]

    emulated(call)


@pytest.mark.parametrize("dtype", [torch.float16, BF16], ids=str)
@pytest.mark.parametrize("dim", [32, 20])
def test_a_chunk_of_several_pieces(dtype: torch.dtype, dim: int) -> None:
    """The state is as good as float32's, of rotated keys too, which 16 bits of each would not be."""
    k, _, v = (x.to(dtype) for x in linear.inputs(1, 300, 1, 1, dim, dim))
    rope = tuple(x.float() for x in linear.tables(300, dim))

    def call() -> list[Tensor]:
        out, state = block_linear_attention(k, k, v, rope=rope, output_final_state=True, impl="cuda")
        return [*state, out]

    kv, k_sum, out = emulated(call, seeds=(1,))
    expected, baseline = (
        linear.oracle(k.to(wide), k.to(wide), v.to(wide), [300], rope=linear.to(rope, wide))
        for wide in (torch.float64, torch.float32)
    )
    assert_close_to_fp64(kv, expected[1], baseline[1], name="kv")
    assert_close_to_fp64(k_sum, expected[2], baseline[2], name="k_sum")
    assert_close_to_fp64(out, expected[0], baseline[0].to(dtype), name="out")


def test_listed_lengths_are_runs_of_equal_ones() -> None:
    """Equal chunks, listed, are what their length is, to the bit; runs of several lengths are right."""
    qkv = [x.to(BF16) for x in linear.inputs(1, 107, 1, 1, 20, 12)]
    lens = [7, 20, 20, 9, 9, 11, 31]

    def call(chunk_lens: int | list[int]) -> list[Tensor]:
        out, state = block_linear_attention(*qkv, chunk_lens=chunk_lens, output_final_state=True, impl="cuda")
        return [out, *state]

    found = emulated(lambda: call(20) + call([20, 20, 20, 20, 20, 7]) + call(lens), seeds=(1,))
    for a, b in zip(found[:3], found[3:6], strict=True):
        assert torch.equal(a, b)
    wide = [linear.oracle(*(x.to(dtype) for x in qkv), lens) for dtype in (torch.float64, torch.float32)]
    for name, a, e, b in zip(("out", "kv", "k_sum"), found[6:], *wide, strict=True):
        assert_close_to_fp64(a, e, b.to(a.dtype), name=name)


@pytest.mark.parametrize(
    ("dtype", "dim", "dim_v", "reason"),
    [
        (torch.float32, 8, 8, "q is float32; cuda takes float16 and bfloat16"),
        (BF16, 130, 8, "q has a head dim of 130; cuda takes up to 128"),
        (BF16, 8, 129, "v has a head dim of 129; cuda takes up to 128"),
    ],
    ids=["float32", "D", "Dv"],
)
def test_what_it_refuses(dtype: torch.dtype, dim: int, dim_v: int, reason: str) -> None:
    given = [x.to(dtype) for x in linear.inputs(1, 4, 1, 1, dim, dim_v)]
    with simt.emulate(80), pytest.raises(RuntimeError, match=reason):
        block_linear_attention(*given, impl="cuda")
