"""Every wrapper of csrc/cuda/ptx.cuh does in the emulator what its comment says; nvcc compiles the same source."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="the emulator is built with g++")
SOURCE = Path(__file__).parent / "simt" / "cuda_ptx.cu"


@pytest.fixture(scope="module")
def kernels():
    from hhattn.simt.runtime import build_cu

    return build_cu(SOURCE)


@pytest.fixture(params=[0, 1], ids="seed{}".format)
def run(request, kernels):
    """run(name, inputs, output): the kernel's output; whatever is reported fails the test."""
    from hhattn.simt.runtime import READ_ONLY, WRITE_FIRST, runtime

    emulator = runtime()

    def run(name, *args):
        emulator.reset()
        emulator.options(seed=request.param)
        *inputs, output = (a for a in args if isinstance(a, torch.Tensor))
        for i, t in enumerate(inputs):
            emulator.register(t, f"input {i}", READ_ONLY)
        emulator.register(output, "output", WRITE_FIRST)
        plain = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, torch.Tensor) else a for a in args]
        assert getattr(kernels, f"run_{name}")(*plain, None) == 0
        assert not emulator.reports(), emulator.reports()[0]
        return output

    yield run
    emulator.reset()


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float32).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [16, 5])
def test_product(run, dtype, rows):
    a, b = random(16, 16, dtype=dtype), random(8, 16, dtype=dtype)
    c = run("product", dtype == torch.float16, a, b, torch.empty(16, 8), rows)
    a[rows:] = 0
    torch.testing.assert_close(c, a.float() @ b.float().T)


def test_transposed_product(run):
    a, b = random(16, 16, dtype=torch.bfloat16), random(16, 8, dtype=torch.bfloat16)
    c = run("transposed", a.T.contiguous(), b, torch.empty(16, 8))
    torch.testing.assert_close(c, a.float() @ b.float())


def test_product_of_tf32(run):
    a, b = random(16, 8), random(8, 8)
    c = run("product_tf32", a, b, torch.empty(16, 8))
    torch.testing.assert_close(c, a @ b.T, rtol=0, atol=1e-2)
    assert (c - a @ b.T).abs().max() > 1e-6  # 10 bits of each, not all


def test_shared_memory_of_every_width(run):
    x = torch.arange(128, dtype=torch.int32)
    y = run("shared", x, torch.empty(128, dtype=torch.int32))
    assert y.tolist() == x.view(32, 4)[:, [1, 0, 3, 2]].flatten().tolist()


def test_numbers(run):
    x = random(32).abs() + 0.01
    y = run("numbers", x, torch.empty(10, 32))
    for got, expected in zip(y, (x.exp2(), x.log2(), 1 / x, x.rsqrt()), strict=False):
        torch.testing.assert_close(got, expected)
    bf16, f16 = x.bfloat16().float(), x.half().float()
    assert torch.equal(y[4:7], torch.stack((bf16, f16, bf16 - f16)))
    quads = x.view(8, 4)
    torch.testing.assert_close(y[7], x.sum().expand(32))
    assert torch.equal(y[8], x.max().expand(32))
    torch.testing.assert_close(y[9].view(8, 4), (quads.sum(1) + quads.amax(1))[:, None].expand(8, 4))


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc isn't here")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_nvcc_compiles_the_same_source(tmp_path, arch):
    from hhattn.simt.runtime import CUDA

    command = ["nvcc", "-std=c++20", f"-arch={arch}", "-Werror=all-warnings", f"-I{CUDA}", "-cubin", SOURCE]
    done = subprocess.run([*command, "-o", tmp_path / "out.cubin"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
