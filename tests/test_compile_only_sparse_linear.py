"""The Triton kernels of sparse_linear_attention's linear branch, compiled as their host code launches them for shapes
of real models: tensor cores, no spills in what every clip runs, within what a block may use, and one compilation for
clips of any length and masks of any density."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from compile_only import ARCHS, SHARED_KIB, Launch, launches

from hhattn.kernels import sparse_linear_attention as kernels
from hhattn.ops import _triton

pytestmark = pytest.mark.skipif(_triton.interpreted(), reason="interpreted kernels aren't compiled")
BF16, FP32 = torch.bfloat16, torch.float32
PRODUCTS = {80: "mma.sync", 90: "(?:wgmma.mma_async|mma.sync)", 100: "(?:tcgen05.mma|mma.sync)"}
# Linear attention's own kernel, with softmax features: 12 accesses at D = 32. float32 holds parts of TF32 besides.
SPILLS = {"_sums": 12}
FLOAT_SPILLS = {"_sums": 213, "_outputs": 17}
PARTS = ("_part_sums", "_part_queries", "_part_keys")  # of blocks that aren't whole, which are few


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def calls(
    heads: int,
    kv_heads: int,
    dim: int,
    *,
    dtype: torch.dtype = BF16,
    tokens: int = 9680,
    width: int = 3,
    full_width: int = 90,
    distinct: int = 9,
    mask_heads: int = 1,
    complement: bool = False,
    block: int = 64,
) -> list[Launch]:
    """The launches of a forward and a backward; softmax features."""
    rows = (1, mask_heads, -(-tokens // block))
    index = torch.int32
    mask = [meta(*rows, dtype=index), *(meta(*rows, width, dtype=index) for _ in range(2)), meta(*rows, dtype=index)]
    mask += [meta(*rows, full_width, dtype=index), meta(distinct, block, -(-block // 8), dtype=torch.uint8)]
    q, k = meta(1, tokens, heads, dim, dtype=dtype), meta(1, tokens, kv_heads, dim, dtype=dtype)
    den = meta(1, heads, tokens, dtype=FP32)
    found = launches(lambda: kernels.sparse_linear_marginal(q, k, k, *mask, block, complement, 4, 1e-15))
    how = (block, complement, 4)
    return found + launches(lambda: kernels.sparse_linear_marginal_backward(q, q, k, k, q, den, *mask, *how))


def check(launch: Launch, arch: int, spills: dict[str, int]) -> None:
    compiled = launch.compile(arch)
    assert compiled.shared <= SHARED_KIB[arch] * 1024
    assert compiled.occupancy().blocks >= 1
    if launch.name not in PARTS:
        assert compiled.spills <= spills.get(launch.name, 0), (
            f"{launch.name}: {compiled.spills} accesses to local memory"
        )
    if launch.name not in ("_upstream", "_fold"):
        assert re.search(PRODUCTS[arch], compiled.ptx) or launch.args[0].dtype == FP32, launch.name


def distinct(found: list[Launch], arch: int) -> list[Launch]:
    return list({launch.key(arch): launch for launch in found}.values())


@pytest.mark.parametrize(
    ("heads", "dim", "arch"),
    [
        (12, 128, 80),
        *(pytest.param(12, 128, arch, marks=pytest.mark.slow) for arch in ARCHS if arch != 80),
        *(pytest.param(20, 112, arch, marks=pytest.mark.slow) for arch in ARCHS),
        *(pytest.param(5, 32, arch, marks=pytest.mark.slow) for arch in ARCHS),
    ],
    ids=str,
)
def test_models(heads: int, dim: int, arch: int) -> None:
    for launch in distinct(calls(heads, heads, dim), arch):
        check(launch, arch, SPILLS)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 256])
def test_other_head_dims_in_float32(dim: int) -> None:
    for launch in distinct(calls(8, 2, dim, dtype=FP32), 80):
        check(launch, 80, FLOAT_SPILLS)


def test_lengths_densities_and_heads_share_one_compilation() -> None:
    def keys(found: list[Launch]) -> set[object]:
        return {launch.key(80) for launch in found}

    usual = keys(calls(12, 12, 128))
    assert keys(calls(12, 12, 128, tokens=1)) == usual
    assert keys(calls(12, 12, 128, tokens=32760, width=160, full_width=500, distinct=1000)) == usual
    assert keys(calls(40, 40, 128, mask_heads=40)) == usual
    assert keys(calls(40, 8, 128)) == usual
