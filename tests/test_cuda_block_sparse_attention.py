"""block_sparse_attention's kernels on mma.sync, on the emulator, beside what the op's own tests ask of every
implementation: every head dim's kernel, blocks that tiles don't divide, the same bits in every order of warps and
blocks, and what they refuse."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from helpers import randn, strided
from test_block_sparse_attention import compare_with_formula, random_keep
from torch import Tensor

import hhattn
from hhattn import BlockMask, simt

pytestmark = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="the emulator is built with g++")


def _inputs(tokens: tuple[int, int], heads: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    shapes = [(1, tokens[0], heads[0], dims[0]), (1, tokens[1], heads[1], dims[0]), (1, tokens[1], heads[1], dims[1])]
    return [strided(randn(*shape, dtype=dtype, seed=i)) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("block_size", "tokens", "dims", "dtype"),
    [
        ((128, 64), (200, 150), (128, 128), torch.bfloat16),  # four warps along the queries
        ((64, 128), (70, 300), (112, 112), torch.bfloat16),  # two, and two along the keys
        ((192, 80), (200, 170), (96, 96), torch.float16),
        ((64, 96), (100, 200), (64, 24), torch.bfloat16),
        ((128, 128), (130, 140), (16, 32), torch.float16),
        ((80, 48), (100, 100), (256, 136), torch.bfloat16),
    ],
    ids=str,
)
def test_every_head_dims_kernel(
    block_size: tuple[int, int], tokens: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype
) -> None:
    """Full, partial and no blocks, rows that attend nothing, heads that share keys, strided inputs."""
    keep = random_keep(1, 2, *tokens)
    keep[:, :, : block_size[0], : block_size[1]] = True
    keep[:, :, 17] = False
    keep[:, 1, 64:96] = False
    with simt.emulate(seed=1) as session, hhattn.use_impl("cuda"):
        compare_with_formula(keep, block_size, _inputs(tokens, (2, 1), dims, dtype), empty=True)
    assert not session.reports, "\n".join(map(str, session.reports))
    assert set(session.launches) == {"block_sparse_attention", "block_sparse_attention_backward"}


def test_the_same_bits_in_every_order() -> None:
    keep = random_keep(1, 2, 100, 200)
    mask = BlockMask.from_dense(keep, block_size=(64, 64))
    leaves = [x.requires_grad_() for x in _inputs((100, 200), (2, 1), (64, 64), torch.bfloat16)]
    results = []
    for seed in (0, 1, 2):
        with simt.emulate(seed=seed) as session:
            out, lse = hhattn.block_sparse_attention(*leaves, mask, return_lse=True, impl="cuda")
            results.append([out, lse, *torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), leaves)])
        assert not session.reports
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    ("dim", "dtype", "offset", "words"),
    [
        (64, torch.float32, 0, "q is float32; cuda takes float16 and bfloat16"),
        (20, torch.float16, 0, "q has a head dim of 20; cuda takes multiples of 8"),
        (64, torch.float16, 4, "rows of q don't all lie on edges of 16 bytes"),
    ],
)
def test_what_is_refused(dim: int, dtype: torch.dtype, offset: int, words: str) -> None:
    q = torch.zeros(1, 16, 1, dim + offset, dtype=dtype)[..., offset:]
    mask = BlockMask.from_dense(torch.ones(1, 1, 16, 16, dtype=torch.bool), block_size=(16, 16))
    with simt.emulate(), pytest.raises(RuntimeError, match=words):
        hhattn.block_sparse_attention(q, q, q, mask, impl="cuda")
