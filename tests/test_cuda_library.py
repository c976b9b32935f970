"""Where the library of CUDA kernels is used, what its launches may ask for, and what its bindings make fit."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import randn
from torch import Tensor

import hhattn
from hhattn import BlockMask, simt
from hhattn.ops import _cuda
from hhattn.ops.block_sparse_attention import MAX_REACH, cuda_can_run, cuda_is_behind
from hhattn.simt import runtime
from hhattn.simt.cuda import Kernels

emulated = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="the emulator is built with g++")

EVERY = "80 90a 100 120"


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((8, 0), EVERY, True),
        ((8, 9), EVERY, True),  # by 8.0's code
        ((9, 0), EVERY, True),
        ((10, 3), EVERY, True),
        ((12, 1), EVERY, True),
        ((7, 5), EVERY, False),
        ((11, 0), EVERY, False),  # there is code for 10.0 and for 12.0, and none of it runs on 11.0
        ((13, 0), EVERY, False),
        ((9, 0), "80", False),
        ((8, 0), "86", False),
        ((9, 1), "90a", False),
        ((9, 1), "90", True),
        ((10, 3), "100f", True),
        ((10, 3), "100a", False),
    ],
    ids=str,
)
def test_a_gpu_without_code_is_refused(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], archs: str, runs: bool
) -> None:
    monkeypatch.setattr(_cuda, "_library", (SimpleNamespace(archs=archs), None))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    _cuda._no_code.cache_clear()
    reason = _cuda.why_not(None)
    _cuda._no_code.cache_clear()
    if runs:
        assert reason is None
    else:
        version = ".".join(map(str, capability))
        assert reason == f"GPU 3 has compute capability {version}; the CUDA kernels here were compiled for {archs}"


LAUNCHED = f"""
#include "{runtime.CUDA}/launch.cuh"
__global__ void nothing(int) {{}}
template <size_t... MOST> int call(int kib) {{
  return hh::launch<MOST...>("nothing", nothing, dim3(1), dim3(32), kib << 10, nullptr, 0);
}}
extern "C" int everywhere(int kib) {{ return call(kib); }}
extern "C" int hopper(int kib) {{ return call<227 << 10>(kib); }}
"""


@emulated
def test_a_launch_asks_for_no_more_memory_than_every_gpu_has(tmp_path: Path) -> None:
    """8.6 and 12.0 have 99 KiB for a block. They run the code that is made for 8.0, which has 163, and 12.0."""
    source = tmp_path / "nothing.cu"
    source.write_text(LAUNCHED)
    library = runtime.build_cu(source)
    runtime.runtime().reset()
    assert (library.everywhere(99), library.hopper(227)) == (0, 0)
    assert (library.everywhere(100), library.hopper(228)) == (1, 1)  # cudaErrorInvalidValue
    assert not runtime.runtime().reports()


def beginning_at(x: Tensor, byte: int) -> Tensor:
    """A copy of x, the first element of its memory, at an address that is ``byte`` modulo 16."""
    raw = bytearray(x.numel() * x.element_size() + 16)
    begin = (byte - torch.frombuffer(raw, dtype=torch.uint8).data_ptr()) % 16
    moved = torch.frombuffer(raw, dtype=x.dtype, count=x.numel(), offset=begin).view(x.shape).copy_(x)
    assert moved.data_ptr() % 16 == byte
    assert moved.storage_offset() == 0
    return moved


@emulated
@pytest.mark.parametrize("arch", [80, 90])
def test_memory_may_begin_anywhere(arch: int) -> None:
    """A mask's bits and tensors of another library: nothing in torch says that they begin at multiples of 16 bytes."""
    q, k, v = (randn(1, 64, 1, 32, seed=i).to(torch.float16) for i in range(3))
    mask = BlockMask.from_dense(torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(1)) < 0.7)
    moved = dataclasses.replace(mask, tiles=beginning_at(mask.tiles, 1))

    def run(mask: BlockMask, *qkv: Tensor) -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in qkv]
        out, lse = hhattn.block_sparse_attention(*leaves, mask, return_lse=True, impl="cuda")
        return [out, lse, *torch.autograd.grad(out.float().square().sum() + lse.sum(), leaves)]

    with simt.emulate(arch, seed=1) as session:
        expected = run(mask, q, k, v)
        for got, wanted in zip(run(moved, *(beginning_at(x, 2) for x in (q, k, v))), expected, strict=True):
            assert torch.equal(got, wanted)
        assert not session.reports, "\n".join(map(str, session.reports))


def test_rows_too_far_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_cuda, "why_not", lambda x: None)
    q = torch.empty_strided((2, 4, 1, 8), (MAX_REACH - 24, 8, 8, 1), dtype=torch.float16, device="meta")
    assert cuda_can_run(q, q, q) == f"q reaches over more than 64 GB (strides {q.stride()})"
    near = q.as_strided(q.shape, (MAX_REACH - 32, 8, 8, 1))
    assert cuda_can_run(near, near, near) is None


@emulated
def test_without_tensor_maps_the_other_kernel_runs(tmp_path: Path) -> None:
    """A driver that has none leaves Hopper's kernel undone, not the call."""
    folder = tmp_path / "cuda"
    shutil.copytree(runtime.CUDA, folder)
    source = folder / "block_sparse_attention_sm90.cu"
    text, encode = (
        source.read_text(),
        "return simt::encode_tiled(map, 2, 4, x.in.data, sizes, strides, box, LINE_BYTES);",
    )
    assert text.count(encode) == 1
    source.write_text(text.replace(encode, "return false;"))
    q, k, v = (randn(1, 64, 1, 32, seed=i).to(torch.float16) for i in range(3))
    mask = BlockMask.from_dense(torch.ones(1, 1, 64, 64, dtype=torch.bool))
    shape = ("-DHH_ONE_SHAPE=hh::f16,32,64,1",)
    with simt.emulate(90, cuda=Kernels(folder, shape)) as session:
        out = hhattn.block_sparse_attention(q, k, v, mask, impl="cuda")
    assert not session.reports
    assert session.launches["block_sparse_attention"] == session.launches["block_sparse_attention_sm90"] == 1
    with simt.emulate(80):
        assert torch.equal(out, hhattn.block_sparse_attention(q, k, v, mask, impl="cuda"))


@pytest.mark.parametrize(
    ("capability", "block", "gradients", "behind"),
    [
        ((8, 0), 64, True, None),
        ((12, 0), 64, True, None),
        ((9, 0), 64, False, None),
        ((9, 0), 64, True, "wgmma, this one mma.sync"),
        ((9, 0), 32, False, "wgmma takes multiples of 64"),
        ((10, 0), 64, False, "tcgen05"),
    ],
    ids=str,
)
def test_triton_is_left_what_the_model_says_it_is_faster_at(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], block: int, gradients: bool, behind: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    q = torch.empty(1, 128, 1, 64, device="meta", requires_grad=gradients)
    mask = BlockMask.from_blocks(
        torch.ones(1, 1, 128 // block, 128 // block, dtype=torch.bool), block_size=(block, block)
    )
    why = cuda_is_behind(q, q, q, mask, 1.0)
    assert why is None if behind is None else behind in (why or "")
