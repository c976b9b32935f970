"""The Hopper kernel of block_sparse_attention: wgmma and TMA on the emulator, with nothing reported, the same bits
under every schedule and within the accuracy rule; and nvcc's code, in which softmax runs beside matrix products."""

from __future__ import annotations

import os
import re
import shutil
from typing import Any

import pytest
import torch
from helpers import assert_close_to_fp64, randn, strided
from test_block_sparse_attention import dense_formula, random_keep
from torch import Tensor
from torch.testing import assert_close

import hhattn
from hhattn import BlockMask, simt

emulated = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="the emulator is built with g++")
SEEDS = (0, 1)
HOPPER = "block_sparse_attention_sm90"
DTYPES = (torch.float16, torch.bfloat16)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, seed: int = 0, kernel: str = HOPPER) -> tuple[Any, ...]:
    """out and lse; whatever is reported fails the test."""
    with simt.emulate(90, seed) as session:
        result = hhattn.block_sparse_attention(q, k, v, mask, return_lse=True, impl="cuda")
    assert set(session.launches) == {kernel}
    assert not session.reports, "\n".join(map(str, session.reports))
    return tuple(result)


# block size, tokens of q and k, heads, key heads, dims of q and v: one tile and several of a block, keys cut by the
# end, dims that are less than what the kernel is made for
CASES = {
    "two-groups": ((128, 128), (200, 300), (2, 1), (128, 128)),
    "parts-of-blocks": ((256, 256), (258, 200), (2, 2), (104, 112)),
    "one-group": ((64, 64), (70, 200), (2, 1), (64, 40)),
    "one-group-long-blocks": ((192, 128), (100, 300), (1, 1), (120, 128)),
    "half-tiles": ((128, 64), (130, 150), (1, 1), (24, 64)),
    "narrow-heads": ((128, 128), (100, 150), (1, 1), (32, 24)),
    "wide-heads": ((128, 64), (70, 130), (1, 1), (256, 200)),
    "one-token": ((64, 64), (1, 1), (1, 1), (112, 112)),
}


@emulated
@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_numbers(case: str, dtype: torch.dtype) -> None:
    """Full and partial blocks, masks of each batch entry and head, rows that attend nothing, keys that serve two heads,
    strided inputs; scores that grow along the keys, so that sums are scaled anew."""
    (bq, bk), (sq, sk), (h, h_kv), (d, dv) = CASES[case]
    keep = random_keep(2, h, sq, sk, share=0.4)
    keep[:, :, :bq, :bk] = True
    keep[1, :, :, -1] = True
    keep[:, h - 1, (sq + 1) // 2 :, : sk // 2] = False
    keep[0, h - 1, sq - 1 :] = False
    q, k, v = (
        strided(randn(2, *shape, dtype=dtype, seed=i))
        for i, shape in enumerate([(sq, h, d), (sk, h_kv, d), (sk, h_kv, dv)])
    )
    k *= torch.linspace(0.2, 3, sk)[:, None, None].to(dtype)
    mask = BlockMask.from_dense(keep, block_size=(bq, bk))
    first, *others = (attend(q, k, v, mask, seed) for seed in SEEDS)
    for other in others:
        assert all(map(torch.equal, first, other)), "seeds differ"
    expected = dense_formula(q.double(), k.double(), v.double(), keep)
    baseline = dense_formula(q, k, v, keep)[0], dense_formula(q.float(), k.float(), v.float(), keep)[1]
    for name, *values in zip(("out", "lse"), first, expected, baseline, strict=True):
        assert_close_to_fp64(*values, name=name)


@emulated
@pytest.mark.parametrize("shape", [(64, 64, 64), (128, 128, 112), (128, 64, 256)], ids=str)
def test_what_is_masked_does_not_matter(shape: tuple[int, int, int]) -> None:
    """Infinities and NaNs in keys and values that nobody attends, or some do."""
    bq, bk, d = shape
    keep = random_keep(1, 1, 100, 200, share=0.6)
    keep[..., [7, 60, 150]] = False
    q, k, v = (randn(1, n, 1, d, dtype=torch.bfloat16, seed=i) for i, n in enumerate((100, 200, 200)))
    mask = BlockMask.from_dense(keep, block_size=(bq, bk))
    clean, lse = attend(q, k, v, mask)
    k[:, 7], v[:, 7] = torch.inf, torch.inf
    k[:, 60], v[:, 60, :, 3] = torch.nan, -torch.inf
    v[:, 150] = torch.nan
    out, same_lse = attend(q, k, v, mask)
    assert torch.equal(lse, same_lse)
    assert_close(out, clean, rtol=2**-7, atol=2**-7)
    v[:, 20, :, 5] = torch.inf  # attended by some
    out, _ = attend(q, k, v, mask)
    reached = keep[0, 0, :, 20]
    assert (out[0, reached, 0, 5] == torch.inf).all()
    assert out[0, ~reached].isfinite().all()
    assert out[..., 6].isfinite().all()
    v[:] = torch.nan
    out, _ = attend(q, k, v, mask)
    assert out[0].isnan().all()


@emulated
def test_what_tma_cannot_bring_goes_to_the_other_kernel() -> None:
    """Blocks that aren't whole 64 tokens; keys that all heads share by a stride of 0."""
    q, k, v = (randn(1, n, 2, 64, dtype=torch.float16, seed=i) for i, n in enumerate((40, 60, 60)))
    keep = random_keep(1, 1, 40, 60, share=0.6)
    expected = dense_formula(q.double(), k.double(), v.double(), keep)[0]
    odd, whole = (BlockMask.from_dense(keep, block_size=(bq, 64)) for bq in (32, 64))
    assert_close(attend(q, k, v, odd, kernel="block_sparse_attention")[0].double(), expected, rtol=0, atol=4e-3)
    shared = k[:, :, :1].expand(-1, -1, 2, -1)
    one, other = attend(q, shared, v, whole, kernel="block_sparse_attention"), attend(q, shared.contiguous(), v, whole)
    assert_close(one[0], other[0], rtol=0, atol=4e-3)
    assert_close(one[1], other[1])


def test_softmax_runs_beside_the_product_with_v() -> None:
    """In the loop's machine code all weights are made between the wait for scores and the wait for the product with V
    that was issued before; products follow one another with no wait between; registers change hands."""
    pytest.importorskip("triton")  # for its cuobjdump
    import cuda_code
    import sass

    if cuda_code.nvcc() is None:
        pytest.skip("no nvcc here")
    code = cuda_code.compiled(cuda_code.CUDA / f"{HOPPER}.cu", "90a")
    assert len(code.kernels) == 28
    for kernel in code.kernels:
        _, head, keys, _groups = re.split(r"[<>,]+", kernel.name)[1:5]
        (loop,) = sass.hot_loops(kernel.instructions)
        body = [f"{i.opcode} {i.operands}" for i in (kernel.instructions[j] for j in sorted(loop.body))]
        products = [i for i, text in enumerate(body) if text.startswith("HGMMA")]
        waits = {n: [i for i, text in enumerate(body) if text == f"WARPGROUP.DEPBAR.LE gsb0, 0x{n}"] for n in (0, 1)}
        weights = [i for i, text in enumerate(body) if text.startswith("MUFU.EX2")]
        assert len(products) == int(head) // 16 + int(keys) // 16, kernel.name
        assert len(waits[1]) == 1, kernel.name
        assert len(waits[0]) == 2, kernel.name
        assert products[-1] < waits[1][0] < waits[0][0], kernel.name
        inside = [i for i in weights if waits[1][0] < i < waits[0][0]]
        assert len(inside) == len(weights) >= int(keys) // 2, kernel.name
        assert kernel.count("USETMAXREG") == 2, kernel.name
