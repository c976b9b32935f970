"""The Triton kernels of block_linear_attention, compiled as their host code launches them for real models' shapes,
without a GPU."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from compile_only import ARCHS, SHARED_KIB, Compiled, Launch, launches

from hhattn.kernels import block_linear_attention, block_linear_attention_backward
from hhattn.ops import _triton

pytestmark = pytest.mark.skipif(_triton.interpreted(), reason="interpreted kernels aren't compiled")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PRODUCTS = {80: "mma.sync", 90: "(?:wgmma.mma_async|mma.sync)", 100: "(?:tcgen05.mma|mma.sync)"}


def meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def linear_launches(
    dtype: torch.dtype,
    heads: int,
    dim: int,
    tokens: int = 36_800,
    chunk: int = 9_200,
    batch: int = 1,
    gated: bool = False,
    backward: bool = True,
) -> list[Launch]:
    """SANA-Video's attention: ReLU, rotated in the numerator, normalised; as 2.0 has it with ``gated``."""
    x, table = meta(batch, tokens, heads, dim, dtype=dtype), meta(tokens, dim // 2)
    gate, psi = (meta(batch, tokens, heads), 1) if gated else (None, 0)
    chunks = -(-tokens // chunk)
    state = meta(batch, heads, chunks, dim, dim), meta(batch, heads, chunks, dim)
    how = (table, table, chunk, [], 0, psi)
    forward, back = block_linear_attention, block_linear_attention_backward
    calls = [
        lambda: forward.block_linear_sums(x, x, gate, *how),
        lambda: forward.block_linear_outputs(x, *state, *how, True, 1e-15),
    ]
    if backward:
        calls += [
            lambda: back.block_linear_sums_backward(*state, x, x, gate, *how),
            lambda: back.block_linear_outputs_backward(x, x, *state, x, *how, True, 1e-15),
        ]
    return [launch for call in calls for launch in launches(call)]


def check(launch: Launch, arch: int, spills: int = 0) -> Compiled:
    """No spills, shared memory within the part, and global accesses of 16 bytes but for a number a token or channel."""
    compiled = launch.compile(arch)
    assert compiled.spills <= spills, f"{launch.name}: {compiled.spills} accesses of local memory"
    assert compiled.kernel.metadata.shared <= SHARED_KIB[arch] * 1024
    for kind in ("ld", "st"):
        wide = compiled.accesses(kind)
        assert set(wide) <= {16, 4}, f"{launch.name}: {kind} by their bytes: {wide}"
        assert wide.get(4, 0) <= 4, f"{launch.name}: {kind} by their bytes: {wide}"
    copies = Counter(
        int(n, 16) for n in re.findall(r"cp\.async\.c[ag]\.\S+ \[[^]]*\], \[[^]]*\], (0x\w+)", compiled.ptx)
    )
    assert set(copies) <= {16, 4}, f"{launch.name}: asynchronous copies by their bytes: {copies}"
    assert copies[4] <= 4, f"{launch.name}: asynchronous copies by their bytes: {copies}"
    if launch.name != "_fold":
        assert re.search(PRODUCTS[arch], compiled.ptx) or launch.args[0].dtype == FP32
    return compiled


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("heads", "dim"), [(20, 112), (5, 32)], ids=["SANA-Video 2B", "bundled"])
def test_models_in_bfloat16(heads: int, dim: int, arch: int) -> None:
    for launch in linear_launches(BF16, heads, dim):
        # ptxas settles on 96 registers a thread for sm_100, and is one short at 32 channels
        check(launch, arch, spills=2 if launch.name == "_gradients" and (dim, arch) == (32, 100) else 0)


def test_lengths_compile_nothing_anew() -> None:
    """Tokens, chunks, their lengths and the batch: one compilation a kernel."""
    clips = [(36_800, 9_200, 1), (9_200, 9_200, 1), (36_801, 1, 1), (220_800, 9_200, 2), (1, 1, 3), (17, 16, 1)]
    seen = {launch.key() for s, chunk, b in clips for launch in linear_launches(BF16, 20, 112, s, chunk, b)}
    # the sums, the outputs and the gradients, of q and of k each; and one that adds up pieces
    assert len(seen) == 3 * 2 + 1
