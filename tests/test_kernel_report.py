"""The kernel report: machine code taken apart, occupancy against NVIDIA's own calculator, and what is predicted from
kernels whose work is known."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import gpu_model
import kernel_cases
import kernel_report
import sass
import triton
import triton.language as tl
from compile_only import ARCHS, Compiled, Launch, launches
from gpu_model import GPUS, Work, occupancy

from hhattn.ops import _triton

compiles = pytest.mark.skipif(_triton.interpreted(), reason="interpreted kernels aren't compiled")
ROOT = Path(__file__).resolve().parents[1]

# Two loops, one in the other; a wait moved behind the end, from where it jumps back; a subroutine; padding.
CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                  /* 0x00000a0000017a02 */
                                                                           /* 0x000fe40000000f00 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P1 LDS R8, [R9] ;
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0040*/               @P0 BRA 0x20 ;
        /*0050*/                   UMOV UR7, 0x8100490 ;
        /*0060*/              @!P2 BRA 0xd0 ;
        /*0070*/                   UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR12], tmem[UR6], idesc[UR7], UPT ;
        /*0080*/                   BRA.U !UP1, 0x10 ;
        /*0090*/                   CALL.REL.NOINC 0x100 ;
        /*00a0*/                   STG.E [R2.64], R4 ;
        /*00b0*/                   EXIT ;
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [R3], R5 ;
        /*00e0*/              @!P2 BRA 0xd0 ;
        /*00f0*/                   BRA 0x70 ;
        /*0100*/                   MUFU.RCP R6, R7 ;
        /*0110*/                   RET.REL.NODEC R20 0x0 ;
        /*0120*/                   BRA 0x120;
        /*0130*/                   NOP;
"""


def test_parse() -> None:
    code = sass.parse(CODE)
    assert [i.opcode for i in code[:4]] == ["MOV", "LDG.E.128", "LDS", "HMMA.16816.F32.BF16"]
    assert code[2].predicate == "@!P1"
    assert code[2].operands == "R8, [R9]"
    assert [i.target for i in code if i.name == "BRA"] == [0x20, 0xD0, 0x10, 0xD0, 0x70]
    assert [i.target for i in code if i.name == "CALL"] == [0x100]
    assert code[-1].name == "RET", "the trap behind the end and the padding are no code"
    assert code[7].shape == (128, 64, 16), "the descriptor: m = 8 · 16, n = 8 · 8"
    assert {i.shape for i in code if i.name != "UTCHMMA"} == {None}


def test_loops() -> None:
    code = sass.parse(CODE)
    found = [sorted(code[i].address for i in loop.body) for loop in sass.loops(code)]
    waiting = [0xD0, 0xE0]
    inner = [0x20, 0x30, 0x40]
    outer = [0x10, *inner, 0x50, 0x60, 0x70, 0x80, *waiting, 0xF0]
    assert found == [outer, inner, waiting]
    assert [sorted(code[i].address for i in loop.body) for loop in sass.hot_loops(code)] == [inner]
    assert [i.address for i, there in zip(code, sass.reached(code), strict=True) if not there] == [0x100, 0x110]


# A loop that is left by a call of where a branch leads too; lanes that part wait behind the end.
CALLED = """
        /*0000*/              @!P0 BRA 0x60 ;
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0020*/                   BRA.DIV ~URZ, 0x90 ;
        /*0030*/               @P1 CALL.REL.NOINC 0x60 ;
        /*0040*/                   BRA 0x10 ;
        /*0060*/                   STG.E [R2.64], R4 ;
        /*0070*/               @P2 BRA 0x0 ;
        /*0080*/                   EXIT ;
        /*0090*/                   WARPSYNC R3 ;
        /*00a0*/                   BRA 0x30 ;
"""


def test_a_call_may_be_a_jump() -> None:
    code = sass.parse(CALLED)
    found = [sorted(code[i].address for i in loop.body) for loop in sass.loops(code)]
    assert found == [[0x0, 0x10, 0x20, 0x30, 0x40, 0x60, 0x70], [0x10, 0x20, 0x30, 0x40]]
    assert [i.address for i, there in zip(code, sass.reached(code), strict=True) if not there] == [0x90, 0xA0]


def test_the_loop_around_counts_where_it_is_said_to() -> None:
    code = sass.parse(CODE)

    def counts(**how: float) -> dict[int, float]:
        times = kernel_report.execution(code, [10.0], **how)
        return {code[i].address: n for i, n in enumerate(times)}

    alone, around = counts(), counts(inner=3.0)
    assert (alone[0x00], alone[0x10], alone[0x30], alone[0xE0], alone[0x100]) == (1, 1, 10, 1, 0)
    assert (around[0x00], around[0x10], around[0x30], around[0xE0], around[0x100]) == (1, 10, 30, 10, 0)
    rarely = counts(inner=3.0, rare=0.1)
    assert (rarely[0x10], rarely[0x30], rarely[0xE0]) == (10, 30, 1), "the wait is seldom repeated"


@pytest.mark.parametrize("opcode", ["HMMA.9", "UTCHMMA"])
def test_a_matrix_product_of_unknown_shape_is_refused(opcode: str) -> None:
    with pytest.raises(ValueError, match=f"{opcode} R0: a matrix product of unknown shape"):
        gpu_model.cycles(sass.Instruction(0, "", opcode, "R0"), GPUS[100])


CALCULATOR = """
#include <cstddef>
#include <climits>
#include <cuda_occupancy.h>
extern "C" int blocks(int major, int shared_sm, int shared_block, int registers, int shared, int threads) {
    cudaOccDeviceProp gpu;
    gpu.computeMajor = major; gpu.computeMinor = 0;
    gpu.maxThreadsPerBlock = 1024; gpu.maxThreadsPerMultiprocessor = 2048;
    gpu.regsPerBlock = gpu.regsPerMultiprocessor = 65536; gpu.warpSize = 32; gpu.sharedMemPerBlock = 49152;
    gpu.sharedMemPerMultiprocessor = shared_sm; gpu.numSms = 100; gpu.sharedMemPerBlockOptin = shared_block;
    gpu.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024; kernel.numRegs = registers; kernel.sharedSizeBytes = 0;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF; kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = shared_block; kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    state.carveoutConfig = 100;
    cudaOccResult result;
    return cudaOccMaxActiveBlocksPerMultiprocessor(&result, &gpu, &kernel, &state, threads, shared)
        ? -1 : result.activeBlocksPerMultiprocessor;
}
"""


def test_occupancy_is_that_of_nvidias_calculator(tmp_path: Path) -> None:
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    compiler = shutil.which("c++")
    if compiler is None or not (include / "cuda_occupancy.h").exists():
        pytest.skip("no C++ compiler, or a Triton without cuda_occupancy.h")
    source, library = tmp_path / "occupancy.cpp", tmp_path / "occupancy.so"
    source.write_text(CALCULATOR)
    subprocess.run([compiler, "-shared", "-fPIC", f"-I{include}", source, "-o", library], check=True)
    blocks = ctypes.CDLL(str(library)).blocks
    registers = (16, 24, 32, 33, 40, 64, 65, 72, 96, 100, 128, 129, 160, 168, 200, 248, 255)
    shared = (
        0,
        16,
        1000,
        5000,
        16384,
        33000,
        49152,
        65536,
        98304,
        100_000,
        163 * 1024,
        164 * 1024,
        227 * 1024,
        232_000,
    )
    threads = (1, 32, 64, 96, 100, 128, 160, 256, 384, 512, 640, 768, 1024)
    for gpu, r, s, t in itertools.product(GPUS.values(), registers, shared, threads):
        expected = blocks(gpu.arch // 10, gpu.shared, gpu.shared_block, r, s, t)
        assert expected >= 0
        assert occupancy(gpu, r, s, t).blocks == expected, (gpu.name, r, s, t)


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "tmem", "expected"),
    [
        (80, 32, 0, 1024, 0, (2, 1.0, "warps")),
        (80, 128, 0, 256, 0, (2, 0.25, "registers")),
        (90, 168, 0, 384, 0, (1, 12 / 64, "registers")),  # FlashAttention-3's three warp groups
        (80, 32, 80 * 1024, 128, 0, (2, 8 / 64, "shared memory")),
        (100, 64, 1024, 128, 256, (2, 8 / 64, "tensor memory")),
        (90, 32, 0, 32, 0, (32, 0.5, "blocks")),
        (90, 255, 0, 512, 0, (0, 0.0, "registers")),
    ],
)
def test_occupancy(arch: int, registers: int, shared: int, threads: int, tmem: int, expected: tuple) -> None:
    found = occupancy(GPUS[arch], registers, shared, threads, tmem)
    assert (found.blocks, found.share, found.limit) == expected


def test_occupancy_refuses_a_block_that_no_gpu_takes() -> None:
    with pytest.raises(ValueError, match="threads=1056; accepted: 1 to 1024"):
        occupancy(GPUS[80], 32, 0, 1056)


def test_clock_is_the_one_of_the_datasheet() -> None:
    assert GPUS[80].ghz == pytest.approx(1.41, abs=0.005), "A100's boost clock"
    assert GPUS[90].ghz == pytest.approx(1.83, abs=0.005)


@triton.jit
def _products(a, b, c, rows, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """c[M, N] = Σ a[M, K]·b[K, N] over `rows` pieces, in a loop round another that only adds."""
    m, n, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    total = tl.zeros([M, N], tl.float32)
    for i in range(rows):
        left = tl.load(a + i * M * K + m * K + k[None, :])
        right = tl.load(b + i * K * N + k[:, None] * N + n)
        total = tl.dot(left, right, total)
    tl.store(c + m * N + n, total)


def compiled_product(arch: int, m: int, n: int, k: int, dtype: torch.dtype, warps: int) -> Compiled:
    a, b, c = (torch.empty(64, 64, dtype=t, device="meta") for t in (dtype, dtype, torch.float32))
    (launch,) = launches(lambda: _products[(1,)](a, b, c, 7, M=m, N=n, K=k, num_warps=warps, num_stages=1))
    return launch.compile(arch)


@compiles
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("m", "n", "k", "warps"), [(128, 64, 64, 4), (64, 128, 32, 4), (16, 32, 64, 1), (128, 128, 32, 8)]
)
def test_products_are_counted(arch: int, dtype: torch.dtype, m: int, n: int, k: int, warps: int) -> None:
    """Whatever instructions an architecture has, they add up to the multiplications of the source."""
    compiled = compiled_product(arch, m, n, k, dtype, warps)
    assert compiled.tensor_ops()
    code = compiled.instructions
    (loop,) = sass.hot_loops(code)

    def flops(times: list[float]) -> float:
        return Work(code, times, warps, programs=3, moved_bytes=0).flops

    step = 3 * 2 * m * n * k
    assert flops([float(i in loop.body) for i in range(len(code))]) == step
    peeled = flops([float(i not in loop.body) for i in range(len(code))])
    assert peeled in (0, step), "the compiler may take the first step out of the loop"
    assert flops(kernel_report.execution(code, [7.0])) == 7 * step + peeled


@compiles
@pytest.mark.parametrize(
    ("arch", "opcode", "shape"), [(80, "HMMA.16816", 64), (90, "HGMMA.64x64x16", 64), (100, "UTCHMMA", 128)]
)
def test_tensor_pipe_reaches_the_datasheet(arch: int, opcode: str, shape: int) -> None:
    """Code of nothing but matrix products, on every SM, takes the time that the datasheet's TFLOP/s give."""
    compiled = compiled_product(arch, shape, 64, 64, torch.bfloat16, 4)
    assert all(name.startswith(opcode) for name in compiled.tensor_ops())
    products = [i for i in compiled.instructions if sass.is_tensor(i)]
    gpu = GPUS[arch]
    work = Work(products, [1000.0] * len(products), 4, programs=gpu.sms, moved_bytes=0)
    seconds = work.predict(gpu).pipes["tensor"]
    assert work.flops / seconds / 1e12 == pytest.approx(gpu.tflops, rel=1e-6)


@triton.jit
def _copy(x, y, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at))


@compiles
@pytest.mark.parametrize("arch", ARCHS)
def test_a_copy_is_bound_by_memory(arch: int) -> None:
    x, y = (torch.empty(1 << 30, dtype=torch.float32, device="meta") for _ in range(2))
    (launch,) = launches(lambda: _copy[((1 << 30) // 4096,)](x, y, BLOCK=4096))
    case = kernel_cases.Case("copy", "forward", kernel_cases.MODELS[0], lambda: None)
    assert case.moved_bytes(launch) == 8 << 30
    row = kernel_report.examine(case, launch, launch.compile(arch), GPUS[arch])
    assert not row.problem
    assert row.mix["LDG"] == row.mix["STG"] == 4096 // 128 // 4, "16 bytes at once"
    assert row.prediction.limit == "memory"
    assert row.prediction.overlapped == pytest.approx((8 << 30) / GPUS[arch].bandwidth / 1e12)
    assert row.prediction.serial > row.prediction.overlapped


def test_bytes_shared_by_stride_count_once() -> None:
    x = torch.empty(8, 100, dtype=torch.bfloat16, device="meta")
    launch = Launch(_copy, (1,), (x, x, x[:1].expand(50, 100), 3), {})
    case = kernel_cases.Case("copy", "forward", kernel_cases.MODELS[0], lambda: None)
    assert case.moved_bytes(launch) == 2 * (8 * 100 + 100)


@compiles
def test_a_wrong_number_of_loops_is_said() -> None:
    x = torch.empty(64, 64, dtype=torch.bfloat16, device="meta")
    call = lambda: _products[(1,)](x, x, x, 7, M=64, N=64, K=64, num_stages=1)  # noqa: E731
    (launch,) = launches(call)
    times = lambda launch: [7.0, 8.0]  # noqa: E731
    case = kernel_cases.Case("product", "forward", kernel_cases.MODELS[0], call, times)
    row = kernel_report.examine(case, launch, launch.compile(80), GPUS[80])
    assert row.problem == "1 hot loops in the code, times of 2 are given"
    assert "product" in "\n".join(kernel_report.sections([row]))
    assert row.problem in "\n".join(kernel_report.sections([row]))


def test_without_a_gpu_make_gpu_says_so_and_succeeds() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    run = subprocess.run([sys.executable, ROOT / "benchmarks/gpu.py"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("make gpu: no CUDA GPU here")
    assert run.stdout.count("\n") == 1
    assert not run.stderr


@compiles
def test_every_case_launches_for_its_architecture() -> None:
    """Calls launch kernels, no two of which share a compilation; tiles are those of the architecture."""
    for case in kernel_cases.cases():
        keys = [launch.key(90) for launch in case.launches(90)]
        assert keys
        assert len(set(keys)) == len(keys)
    tiles = {arch: kernel_cases.sparse_forward(kernel_cases.MODELS[0]).launches(arch)[0].options for arch in ARCHS}
    assert tiles[80]["BLOCK_N"] < tiles[90]["BLOCK_N"]


@compiles
@pytest.mark.slow
def test_the_page_is_what_the_command_writes() -> None:
    assert kernel_report.PAGE.read_text() == kernel_report.page(kernel_report.rows(kernel_report.cases()))
