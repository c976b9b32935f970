"""The tool that looks at nvcc's output: names, resources, loops and what of them a branch may leave out, on kernels
whose machine code is known. And launches that are recorded, to know what to look at."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("triton")

import cuda_code
import sass

GATES = Path(__file__).parent / "simt" / "gates.cu"
compiles = pytest.mark.skipif(cuda_code.nvcc() is None, reason="no nvcc here")


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("void hh::products<4, false>(float*, unsigned int const*, int)", "products<4,0>"),
        ("hh::copy(uint4*, uint4 const*, int)", "copy"),
        ("void hh::(anonymous namespace)::rows<hh::bf16, (int)128, 64u>(hh::Args)", "rows<bf16,128,64>"),
        ("void hh::tiles<hh::Shape<128, (bool)1>, float>(void (*)(int))", "tiles<Shape<128,1>,float>"),
    ],
)
def test_names(name: str, plain: str) -> None:
    assert cuda_code.plain_name(name) == plain


def kernels(arch: str) -> dict[str, cuda_code.Kernel]:
    return {kernel.name: kernel for kernel in cuda_code.compiled(GATES, arch).kernels}


@compiles
def test_what_a_kernel_uses() -> None:
    found = kernels("80")
    assert set(found) == {"copy", "products<4,0>", "products<4,1>", "spilling"}
    assert found["copy"].symbol == "_ZN2hh4copyEP5uint4PKS0_i"
    assert [found[name].threads for name in ("copy", "products<4,0>", "spilling")] == [64, 128, 1024]
    assert found["copy"].count("LDG.E.128") == found["copy"].count("STG.E.128") == 1
    assert found["spilling"].spills > 100
    assert found["spilling"].registers == 64, "65536 for 1024 threads"
    assert not any(kernel.spills for name, kernel in found.items() if name != "spilling")
    assert "spilled" in "\n".join(cuda_code.compiled(GATES, "80").warnings)
    assert found["copy"].occupancy(64, 100 * 1024).blocks == 1
    assert kernels("86")["copy"].occupancy(64, 100 * 1024).blocks == 0, "99 KiB are all that a block gets there"


@compiles
@pytest.mark.parametrize(("arch", "clocks"), [("80", 2.0), ("90a", 2048 / 1290)])
def test_a_loop_and_what_branches_leave_out(arch: str, clocks: float) -> None:
    found = kernels(arch)
    for name, every in (("products<4,0>", 4), ("products<4,1>", 5)):
        code = found[name].instructions
        (loop,) = sass.hot_loops(code)
        assert sum(sass.is_tensor(code[i]) for i in loop.body) == every
        assert sum(sass.is_tensor(code[i]) for i in loop.always) == 4
    text = cuda_code.describe(found["products<4,0>"], 128, 4, 0, instructions=False)
    assert f"tensor {16 * clocks:.0f} " in text, "four warps of four products"
    assert "bound by tensor, tensor / tensor = 1.00" in text
    assert "no branch leaves out" not in text
    text = cuda_code.describe(found["products<4,1>"], 128, 4, 0, instructions=True)
    assert f"tensor {20 * clocks:.0f} " in text
    assert f"no branch leaves out: tensor {16 * clocks:.0f} " in text
    assert sum("HMMA.16816" in line for line in text.splitlines()) == 5


@compiles
def test_a_changed_header_is_a_new_compilation(tmp_path: Path) -> None:
    source, header = tmp_path / "one.cu", tmp_path / "one.cuh"
    source.write_text('#include "one.cuh"\n__global__ void k(float* y) { y[threadIdx.x] = VALUE; }\n')
    header.write_text("#define VALUE 1.0f\n")
    before = cuda_code.compiled(source, "80")
    header.write_text('#define VALUE __ldg(y + 64)\n#include "two.cuh"\n')
    (tmp_path / "two.cuh").write_text("#error no\n")
    cuda_code.compiled.cache_clear()
    with pytest.raises(RuntimeError, match=r"#error"):
        cuda_code.compiled(source, "80")
    (tmp_path / "two.cuh").write_text("")
    after = cuda_code.compiled(source, "80")
    assert (before.kernels[0].count("LDG"), after.kernels[0].count("LDG")) == (0, 1)


# A loop that copies for its next run unless it is the last, and seldom does something else.
PREFETCHING = """
        /*0000*/                   MOV R1, RZ ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0020*/               @P0 BRA 0x60 ;
        /*0030*/                   IADD3 R2, R2, 0x10, RZ ;
        /*0040*/                   LDGSTS.E.128 [R3], [R2.64] ;
        /*0050*/                   IADD3 R3, R3, 0x10, RZ ;
        /*0060*/               @P1 BRA 0x80 ;
        /*0070*/                   FMUL R4, R4, R5 ;
        /*0080*/               @P2 BRA 0x10 ;
        /*0090*/                   EXIT ;
"""


def test_copies_for_the_next_run_are_usual() -> None:
    code = sass.parse(PREFETCHING)
    (loop,) = sass.hot_loops(code)
    assert sorted(code[i].address for i in loop.always) == [0x10, 0x20, 0x60, 0x80]
    assert sorted(code[i].address for i in loop.usual) == [0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x80]
    assert sorted(code[i].address for i in loop.body - loop.usual) == [0x70]


RECORDED = f"""
#include "{cuda_code.CUDA}/launch.cuh"
namespace hh {{ namespace {{
template <class T, int D> __global__ void fill(T* y, const uint4* x, size_t n) {{
  if (blockIdx.y == 1 && threadIdx.x == 95) y[blockIdx.x] = T{{}};
}}
}} }}
extern "C" int fill(void* y, size_t n) {{
  const auto* x = static_cast<const uint4*>(y);
  const auto kernel = hh::fill<hh::bf16, 128>;
  return hh::launch("fill", kernel, dim3(n, 2), dim3(96), 1000, nullptr, static_cast<hh::bf16*>(y), x, n);
}}
"""


@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="the emulator is built with g++")
def test_launches_are_recorded_instead_of_run(tmp_path: Path) -> None:
    from hhattn.simt.runtime import READ_ONLY, Recorded, build_cu, runtime

    source = tmp_path / "fill.cu"
    source.write_text(RECORDED)
    fill = build_cu(source).fill
    runtime().reset()
    with runtime().recording() as launches:
        runtime().register_range(0, 8, "x", READ_ONLY)
        runtime().register_range(0, 1 << 50, "y")
        assert fill(None, ctypes.c_size_t(1 << 20)) == 0
        assert fill(None, ctypes.c_size_t(0)) == 0
    assert launches == [
        Recorded(launches[0].kernel, "fill", (1 << 20, 2, 1), (96, 1, 1), 1000, [("x", 8), ("y", 1 << 50)])
    ]
    assert cuda_code.plain_name(launches[0].kernel) == "fill<bf16,128>"
    out = (ctypes.c_uint16 * 4)(1, 1, 1, 1)
    runtime().register_range(ctypes.addressof(out), ctypes.addressof(out) + 8, "out")
    assert fill(out, ctypes.c_size_t(3)) == 0
    assert list(out) == [0, 0, 0, 1]
    assert not runtime().reports()
    runtime().reset()
