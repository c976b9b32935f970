"""Every Triton kernel, compiled as its host code launches it for the shapes of real models, without a GPU: no spills
where it counts, wide loads, within what a block may use, and one compilation for clips of any length."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from compile_only import ARCHS, SHARED_KIB, Launch, launches

from hhattn.kernels import norm_modulate
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


MODELS = {"bundled": 160, "Wan 1.3B": 1536, "SANA-Video 2B": 2240, "HunyuanVideo": 3072, "Wan 14B": 5120}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("model", MODELS)
def test_norm_modulate(model: str, dtype: torch.dtype, arch: int) -> None:
    for launch in norm_launches(1, 9680, MODELS[model], 11, dtype):
        compiled = launch.compile(arch)
        usage, wide = compiled.usage, {16}
        assert usage["SHARED"] <= SHARED_KIB[arch] * 1024
        assert set(compiled.accesses("ld")) == wide, f"{launch.name}: loads by their bytes: {compiled.accesses('ld')}"
        assert set(compiled.accesses("st")) == wide, f"{launch.name}: stores by their bytes: {compiled.accesses('st')}"
        if launch.name == "_forward":
            assert usage["REG"] <= 64, "64 registers leave room for half of the threads an SM can hold, or more"
        # three sums and a row of 8,192 channels are more than 512 threads can hold: some are in local memory
        assert compiled.spills <= (100 if launch.name == "_backward" and MODELS[model] > 4096 else 0)


def test_lengths_compile_nothing_anew() -> None:
    clips = [(1, 9680, 11), (1, 9681, 1), (2, 220_800, 60), (3, 1, 1), (1, 17, 17), (1, 3_000_017, 1)]
    keys = {launch.key() for b, s, rows in clips for launch in norm_launches(b, s, 1536, rows, BF16, affine=True)}
    assert len(keys) == 2, "the forward and the backward"
