"""The Triton kernels of block_sparse_attention, compiled as their host code launches them for shapes of real models:
tensor cores and asynchronous 16-byte copies in the loops, no spills in a forward, within what a block may use, and one
compilation for clips of any length and masks of any density."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from compile_only import ARCHS, SHARED_KIB, Launch, launches

from hhattn.kernels import block_sparse_attention as kernels
from hhattn.kernels import block_sparse_attention_tiles as tiles
from hhattn.ops import _triton

pytestmark = pytest.mark.skipif(_triton.interpreted(), reason="interpreted kernels aren't compiled")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

# Query heads, key heads, head dim. What differs in the number of heads alone compiles to the same code (tested below).
MODELS = {
    "bundled": (5, 5, 32),
    "D=64": (8, 8, 64),
    "SANA-Video 2B": (20, 20, 112),
    "Wan 1.3B": (12, 12, 128),
    "Wan 14B": (40, 40, 128),
    "HunyuanVideo": (24, 24, 128),
    "D=256": (8, 8, 256),
}
DIFFERENT = ["bundled", "D=64", "SANA-Video 2B", "Wan 1.3B", "D=256"]
# Two sums of 256 channels and the keys beside them are a little more than 256 threads hold with wgmma's tiles.
SPILLS = {("_dkv", "D=256", 90): 4}
TENSOR_CORES = {80: r"mma\.sync\.aligned\.m16n8k16", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def calls(
    heads: int,
    kv_heads: int,
    dim: int,
    dtype: torch.dtype = BF16,
    *,
    batch: int = 1,
    tokens: int = 9680,
    width: int = 20,
    full_width: int = 30,
    distinct: int = 9,
    mask_size: tuple[int, int] = (1, 1),
    block_size: tuple[int, int] = (128, 128),
) -> dict[str, Launch]:
    """The launches of a forward and a backward, by the kernel's name; "_exact" after those that compute infinities."""
    bq, bk = block_size
    rows = (*mask_size, -(-tokens // bq))
    index = torch.int32
    mask = [meta(*rows, dtype=index), *(meta(*rows, width, dtype=index) for _ in range(2)), meta(*rows, dtype=index)]
    mask += [meta(*rows, full_width, dtype=index), meta(distinct, bq, -(-bk // 8), dtype=torch.uint8)]
    q, k = meta(batch, tokens, heads, dim, dtype=dtype), meta(batch, tokens, kv_heads, dim, dtype=dtype)
    lse = meta(batch, heads, tokens, dtype=FP32)
    found = launches(lambda: kernels.block_sparse_attention(q, k, k, *mask, bk, 0.1))
    found += launches(lambda: kernels.block_sparse_attention_backward(q, lse, q, k, k, q, lse, *mask, bk, 0.1))
    return {launch.name + "_exact" * bool(launch.options.get("EXACT")): launch for launch in found}


@pytest.fixture
def arch(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The architecture compiled for, whose tiles the host code takes."""
    monkeypatch.setattr(tiles, "architecture", lambda x: request.param)
    return request.param


def check(launch: Launch, arch: int, spills: int = 0) -> str:
    """Compile, compare with what a block of threads may use, and return the PTX."""
    compiled = launch.compile(arch)
    assert compiled.shared <= SHARED_KIB[arch] * 1024
    assert compiled.spills <= spills, f"{launch.name}: {compiled.spills} accesses to local memory"
    assert compiled.occupancy().blocks >= 1
    return compiled.ptx


def check_loops(launch: Launch, arch: int, spills: int = 0) -> None:
    """Also that loops multiply on tensor cores what was copied 16 bytes at a time during the step before."""
    ptx = check(launch, arch, spills)
    rows = launch.options["BLOCK_N" if launch.name == "_dkv" else "BLOCK_M"]
    assert re.search(TENSOR_CORES[arch if rows >= 64 else 80], ptx), "wgmma and tcgen05 take 64 rows"
    assert re.search(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx)
    assert "cp.async.wait_group" in ptx


# The rest takes minutes.
USUAL = [("Wan 1.3B", 80), ("Wan 1.3B", 90), ("Wan 1.3B", 100), ("SANA-Video 2B", 80), ("D=64", 80), ("D=64", 90)]
EVERY = [(model, arch) for model in DIFFERENT for arch in ARCHS if (model, arch) not in USUAL]
SLOW = [pytest.param(*pair, marks=pytest.mark.slow) for pair in EVERY]


@pytest.mark.parametrize(("model", "arch"), [*USUAL, *SLOW], indirect=["arch"])
def test_forward(model: str, arch: int) -> None:
    check_loops(calls(*MODELS[model])["_forward"], arch)


@pytest.mark.parametrize(
    ("model", "arch"),
    [(model, arch) if (model, arch) == ("Wan 1.3B", 80) else pytest.param(model, arch, marks=pytest.mark.slow)
     for model in DIFFERENT for arch in ARCHS],
    indirect=["arch"],
)  # fmt: skip
def test_backward(model: str, arch: int) -> None:
    every = calls(*MODELS[model])
    check(every["_delta"], arch)
    for name in ("_dq", "_dkv"):
        check_loops(every[name], arch, SPILLS.get((name, model, arch), 0))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS, indirect=True)
@pytest.mark.parametrize("block_size", [(64, 64), (384, 384), (24, 200), (100, 100)], ids=str)
def test_blocks_of_any_size(block_size: tuple[int, int], arch: int) -> None:
    check_loops(calls(*MODELS["Wan 1.3B"], block_size=block_size)["_forward"], arch)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS, indirect=True)
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
@pytest.mark.parametrize("model", DIFFERENT)
def test_other_dtypes(model: str, dtype: torch.dtype, arch: int) -> None:
    """float32 is multiplied exactly, without tensor cores."""
    launch = calls(*MODELS[model], dtype)["_forward"]
    if dtype == FP16:
        check_loops(launch, arch)
    else:
        assert not re.search(TENSOR_CORES[arch], check(launch, arch))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS, indirect=True)
def test_exact_kernels_compile(arch: int) -> None:
    """They compute again what met an infinity, and needn't be fast."""
    every = calls(*MODELS["Wan 1.3B"])
    for name in ("_forward_exact", "_dq_exact", "_dkv_exact"):
        check(every[name], arch, 10_000)


def test_nothing_is_compiled_anew() -> None:
    """Lengths, batches, heads, densities, lists and masks by batch and head share one compilation of each kernel."""
    clips = [
        calls(12, 12, 128, tokens=9680),
        calls(40, 40, 128, tokens=220_800, width=1, full_width=900),
        calls(24, 24, 128, tokens=1, width=1, full_width=0, distinct=1),
        calls(16, 16, 128, batch=3, tokens=17, mask_size=(3, 16), distinct=16),
        calls(1, 1, 128, batch=16, tokens=3_000_017, mask_size=(16, 1), width=16, full_width=16),
    ]
    assert all(set(clip) == set(clips[0]) for clip in clips)
    for name in clips[0]:
        assert len({clip[name].key() for clip in clips}) == 1, name
    full = calls(12, 12, 128, width=0)
    assert not any(name.endswith("_exact") for name in full), "without partial blocks nothing is masked"
    assert all(launch.key() == clips[0][name].key() for name, launch in full.items())
