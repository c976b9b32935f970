"""Every Triton kernel, compiled as its host code launches it for the shapes of real models, without a GPU: no spills
where it counts, wide loads, within what a block may use, and one compilation for clips of any length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from compile_only import ARCHS, SHARED_KIB, Launch, launches

from hhattn.kernels import norm_modulate, qk_norm_rope
from hhattn.ops import _triton

pytestmark = pytest.mark.skipif(_triton.interpreted(), reason="interpreted kernels aren't compiled")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def meta(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def norm_launches(
    batch: int, tokens: int, channels: int, rows: int, dtype: torch.dtype, norm: str = "layer", affine: bool = False
) -> list[Launch]:
    """Forward and backward with everything a block of a video transformer gives."""
    x = meta(batch, tokens, channels, dtype=dtype)
    row = meta(batch, rows, channels, dtype=dtype)
    weight = meta(channels, dtype=dtype) if affine else None
    args = (x, row, row, weight, weight, x, row, norm == "layer", 1e-6)
    return launches(lambda: norm_modulate.norm_modulate(*args)) + launches(
        lambda: norm_modulate.norm_modulate_backward(x, x, *args)
    )


def rope_launches(
    batch: int,
    tokens: int,
    heads: int,
    dim: int,
    across: bool,
    dtype: torch.dtype,
    rotate: str = "interleaved",
    tiles: bool = False,
) -> list[Launch]:
    """Forward and backward of q; those of k are the same with its own number of heads."""
    x, angles = meta(batch, tokens, heads, dim, dtype=dtype), meta(1, tokens, 1, dim, dtype=FP32)
    weight = meta(heads * dim if across else dim, dtype=dtype)
    order = meta(tokens, dtype=torch.int64) if tiles else None
    args = (x, x, angles, angles, weight, weight, None, None, 1, across, rotate == "interleaved", 1e-6, 0, order)
    forward = launches(lambda: qk_norm_rope.qk_norm_rope(*args))
    return [forward[0], launches(lambda: qk_norm_rope.qk_norm_rope_backward(x, x, *args, False))[0]]


MODELS = {"bundled": 160, "Wan 1.3B": 1536, "SANA-Video 2B": 2240, "HunyuanVideo": 3072, "Wan 14B": 5120}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("model", MODELS)
def test_norm_modulate(model: str, dtype: torch.dtype, arch: int) -> None:
    for launch in norm_launches(1, 9680, MODELS[model], 11, dtype):
        compiled = launch.compile(arch)
        usage, wide = compiled.usage, {16}
        assert compiled.shared <= SHARED_KIB[arch] * 1024
        assert set(compiled.accesses("ld")) == wide, f"{launch.name}: loads by their bytes: {compiled.accesses('ld')}"
        assert set(compiled.accesses("st")) == wide, f"{launch.name}: stores by their bytes: {compiled.accesses('st')}"
        if launch.name == "_forward":
            assert usage["REG"] <= 64, "64 registers leave room for half of the threads an SM can hold, or more"
        # three sums and a row of 8,192 channels are more than 512 threads can hold: some are in local memory
        assert compiled.spills <= (100 if launch.name == "_backward" and MODELS[model] > 4096 else 0)


HEADS = {  # heads, head dim, one norm over all heads
    "bundled": (5, 32, False),
    "Wan 1.3B": (12, 128, True),
    "SANA-Video 2B": (20, 112, True),
    "HunyuanVideo": (24, 128, False),
    "Wan 14B": (40, 128, True),
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("rotate", ["interleaved", "half"])
@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("model", HEADS)
def test_qk_norm_rope(model: str, dtype: torch.dtype, rotate: str, arch: int) -> None:
    for launch in rope_launches(1, 9680, *HEADS[model], dtype, rotate):
        compiled = launch.compile(arch)
        assert compiled.shared <= SHARED_KIB[arch] * 1024
        assert set(compiled.accesses("st")) == {16}, compiled.accesses("st")
        # a row of angles serves all heads: a block of threads shares it out in small pieces
        assert set(compiled.accesses("ld")) <= {16, 4}, compiled.accesses("ld")
        assert max(compiled.accesses("ld")) == 16
        if launch.name == "_forward":
            assert compiled.usage["REG"] <= 64
        # at 8,192 channels two sums beside a token are a little more than 512 threads can hold
        assert compiled.spills <= (32 if launch.name == "_backward" and model == "Wan 14B" else 0)


def test_lengths_compile_nothing_anew() -> None:
    clips = [(1, 9680, 11), (1, 9681, 1), (2, 220_800, 60), (3, 1, 1), (1, 17, 17), (1, 3_000_017, 1)]
    norm = {launch.key() for b, s, rows in clips for launch in norm_launches(b, s, 1536, rows, BF16, affine=True)}
    rope = {launch.key() for b, s, _ in clips for launch in rope_launches(b, s, 12, 128, True, BF16, tiles=True)}
    assert len(norm) == len(rope) == 2, "the forward and the backward"
