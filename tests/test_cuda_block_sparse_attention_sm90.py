"""The Hopper kernel of block_sparse_attention on the emulator, called through its launcher: wgmma and TMA with nothing
reported, the same bits under every schedule, within the accuracy rule."""

from __future__ import annotations

import ctypes
import os
import shutil
from ctypes import c_float, c_int32, c_int64, c_void_p
from typing import Any

import pytest
import torch
from helpers import assert_close_to_fp64, randn, strided
from test_block_sparse_attention import dense_formula, random_keep
from torch import Tensor

from hhattn import BlockMask

pytestmark = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="the emulator is built with g++")
SEEDS = (0, 1)
LISTS = ("kv_num_blocks", "kv_indices", "kv_tiles", "full_kv_num_blocks", "full_kv_indices", "tiles")
DTYPES = {torch.float16: 1, torch.bfloat16: 2}


class Heads(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("dtype", c_int32), *((n, c_int64) for n in ("batch", "token", "head")))


class Mask(ctypes.Structure):
    _fields_ = (
        *((n, c_void_p) for n in LISTS),
        *((n, c_int64) for n in ("batch", "head", "width", "full_width")),
        *((n, c_int32) for n in ("bq", "bk", "lines")),
    )


class Arguments(ctypes.Structure):
    """hh::BlockSparseArgs."""

    _fields_ = (
        *((n, Heads) for n in "qkv"),
        ("mask", Mask),
        *((n, c_void_p) for n in ("out", "lse")),
        *((n, c_int32) for n in ("batch", "q_len", "k_len", "heads", "kv_heads", "dim", "v_dim")),
        ("scale", c_float),
    )


@pytest.fixture(scope="module")
def launcher() -> Any:
    from hhattn.simt.runtime import CUDA, build_cu

    return build_cu(CUDA / "block_sparse_attention_sm90.cu").hh_cuda_block_sparse_attention_sm90


def attend(launcher: Any, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, seed: int = 0) -> tuple[Tensor, Tensor]:
    """out and lse; whatever is reported fails the test."""
    from hhattn.simt.runtime import READ_ONLY, WRITE_FIRST, runtime

    (b, sq, h, d), (_, sk, h_kv, dv) = q.shape, v.shape
    out, lse = torch.empty(b, sq, h, dv, dtype=q.dtype), torch.empty(b, h, sq)
    emulator = runtime()
    emulator.reset()
    emulator.options(seed=seed)
    lists = {name: getattr(mask, name) for name in LISTS}
    for name, t in {"q": q, "k": k, "v": v, **lists}.items():
        emulator.register(t, name, READ_ONLY)
    emulator.register(out, "out", WRITE_FIRST)
    emulator.register(lse, "lse", WRITE_FIRST)
    masks, heads, lines, width = mask.kv_indices.shape
    steps = heads if masks > 1 else 0, int(heads > 1), width, mask.full_kv_indices.shape[3]
    args = Arguments(
        *(Heads(x.data_ptr(), DTYPES[x.dtype], *x.stride()[:3]) for x in (q, k, v)),
        Mask(*(t.data_ptr() for t in lists.values()), *steps, *mask.block_size, lines),
        out.data_ptr(), lse.data_ptr(), b, sq, sk, h, h_kv, d, dv, d**-0.5,
    )  # fmt: skip
    assert launcher(ctypes.byref(args), None) == 0
    reports = emulator.reports()
    emulator.reset()
    assert not reports, "\n".join(map(str, reports))
    return out, lse


# block size, tokens of q and k, heads, key heads, dims of q and v: one tile and several of a block, keys cut by the
# end, dims that are less than what the kernel is made for
CASES = {
    "two-groups": ((128, 128), (200, 300), (2, 1), (128, 128)),
    "parts-of-blocks": ((256, 256), (258, 200), (2, 2), (104, 112)),
    "one-group": ((64, 64), (70, 200), (2, 1), (64, 40)),
    "one-group-long-blocks": ((192, 128), (100, 300), (1, 1), (120, 128)),
    "half-tiles": ((128, 64), (130, 150), (1, 1), (24, 64)),
    "wide-heads": ((128, 64), (70, 130), (1, 1), (256, 200)),
    "one-token": ((64, 64), (1, 1), (1, 1), (112, 112)),
}


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_numbers(launcher: Any, case: str, dtype: torch.dtype) -> None:
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
    first, *others = (attend(launcher, q, k, v, mask, seed) for seed in SEEDS)
    for other in others:
        assert all(map(torch.equal, first, other)), "seeds differ"
    expected = dense_formula(q.double(), k.double(), v.double(), keep)
    baseline = dense_formula(q, k, v, keep)[0], dense_formula(q.float(), k.float(), v.float(), keep)[1]
    for name, *values in zip(("out", "lse"), first, expected, baseline, strict=True):
        assert_close_to_fp64(*values, name=name)


@pytest.mark.parametrize("shape", [(64, 64, 64), (128, 128, 112), (128, 64, 256)], ids=str)
def test_what_is_masked_does_not_matter(launcher: Any, shape: tuple[int, int, int]) -> None:
    """Infinities and NaNs in keys and values that nobody attends, or some do."""
    bq, bk, d = shape
    keep = random_keep(1, 1, 100, 200, share=0.6)
    keep[..., [7, 60, 150]] = False
    q, k, v = (randn(1, n, 1, d, dtype=torch.bfloat16, seed=i) for i, n in enumerate((100, 200, 200)))
    mask = BlockMask.from_dense(keep, block_size=(bq, bk))
    clean, lse = attend(launcher, q, k, v, mask)
    k[:, 7], v[:, 7] = torch.inf, torch.inf
    k[:, 60], v[:, 60, :, 3] = torch.nan, -torch.inf
    v[:, 150] = torch.nan
    out, same_lse = attend(launcher, q, k, v, mask)
    assert torch.equal(lse, same_lse)
    torch.testing.assert_close(out, clean, rtol=2**-7, atol=2**-7)
    v[:, 20, :, 5] = torch.inf  # attended by some
    out, _ = attend(launcher, q, k, v, mask)
    reached = keep[0, 0, :, 20]
    assert (out[0, reached, 0, 5] == torch.inf).all()
    assert out[0, ~reached].isfinite().all()
    assert out[..., 6].isfinite().all()
