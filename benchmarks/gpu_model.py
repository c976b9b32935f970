"""What GPUs can do in a clock, and what that predicts for compiled code. **Uncalibrated: never compared with a GPU.**

docs/kernels.md explains the model; `benchmarks/kernel_report.py` writes it. Every figure has its source beside it:

[guide]   NVIDIA, CUDA C++ Programming Guide: technical specifications per compute capability, arithmetic throughput.
[sheet]   NVIDIA's datasheets of A100 SXM 80 GB, H100 SXM and HGX B200: dense bf16 TFLOP/s and memory bandwidth.
[white]   NVIDIA's architecture white papers (A100, H100): SMs, tensor cores and what they do in a clock.
[hopper]  Luo et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", arXiv 2402.13499.
[b200]    SemiAnalysis, "Dissecting Nvidia Blackwell", 2026: operands of tcgen05 are read at 128 bytes a clock.
[assumed] no public source known; a guess, chosen from the neighbours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sass import Instruction, is_tensor


@dataclass(frozen=True)
class Gpu:
    """One GPU: limits of an SM, and what it does in a clock."""

    name: str
    arch: int
    sms: int
    tflops: float  # dense bf16 [sheet]
    bandwidth: float  # of memory, TB/s [sheet]
    mma: int  # 16-bit multiply-adds a clock and SM, of the newest instruction there: mma.sync, wgmma, tcgen05 [white]
    mma_sync: int  # the same by mma.sync
    fp32: int  # float32 operations of 32 bits a clock and SM [guide]
    shared: int  # bytes an SM [guide]
    shared_block: int  # bytes a block may use, the system's 1 KiB left out [guide]
    warps: int = 64  # an SM holds [guide]
    blocks: int = 32
    registers: int = 65536

    @property
    def ghz(self) -> float:
        """The clock at which the datasheet's TFLOP/s are reached."""
        return self.tflops * 1e3 / (2 * self.mma * self.sms)


KIB = 1024
GPUS = {
    80: Gpu("A100", 80, 108, 312, 2.04, 1024, 1024, 64, 164 * KIB, 163 * KIB),
    # mma.sync reaches 63 % of wgmma's peak [hopper]
    90: Gpu("H100", 90, 132, 989.4, 3.35, 2048, 1290, 128, 228 * KIB, 227 * KIB),
    # mma.sync as on A100 [assumed]
    100: Gpu("B200", 100, 148, 2250, 8.0, 4096, 1024, 128, 228 * KIB, 227 * KIB),
}

# For code that is compiled and not predicted: their SMs' limits alone count. The rest is not used. [guide]
PARTS = GPUS | {
    86: Gpu("sm_86", 86, 84, 0, 0, 512, 512, 128, 100 * KIB, 99 * KIB, warps=48, blocks=16),
    120: Gpu("sm_120", 120, 170, 0, 0, 512, 512, 128, 100 * KIB, 99 * KIB, warps=48, blocks=24),
}

PIPES = ("tensor", "fp32", "alu", "mufu", "shared", "l2", "tmem", "issue")


@dataclass(frozen=True)
class Occupancy:
    """Blocks that an SM holds at once, their warps over the most that it could hold, and what allows no more."""

    blocks: int
    share: float
    limit: str


def occupancy(gpu: Gpu, registers: int, shared: int, threads: int, tmem: int = 0) -> Occupancy:
    """As NVIDIA's `cuda_occupancy.h` has it.

    ``registers`` a thread, ``shared`` bytes a block without the system's 1 KiB, ``threads`` a block, ``tmem`` columns
    of tensor memory a block. A block that the GPU can't run gives 0 blocks.
    """
    if not 1 <= threads <= 1024:
        raise ValueError(f"threads={threads}; accepted: 1 to 1024")
    warps = math.ceil(threads / 32)
    limits = {"warps": gpu.warps // warps, "blocks": gpu.blocks}
    if registers:
        warp = math.ceil(registers * 32 / 256) * 256
        fits = registers <= 255 and warp * math.ceil(warps / 4) * 4 <= gpu.registers
        # a warp's registers are those of one of the SM's four parts
        limits["registers"] = gpu.registers // 4 // warp * 4 // warps if fits else 0
    block = math.ceil((shared + KIB) / 128) * 128
    limits["shared memory"] = gpu.shared // block if shared <= gpu.shared_block else 0
    if tmem:
        limits["tensor memory"] = 512 // tmem
    limit = min(limits, key=lambda name: limits[name])
    return Occupancy(limits[limit], limits[limit] * warps / gpu.warps, limit)


@dataclass(frozen=True)
class _Product:
    """A matrix product: its shape, the bytes of an element of its operands, and the warps that execute it together. Of
    tcgen05 one thread issues it for the whole block."""

    m: int
    n: int
    k: int
    width: int
    warps: int = 1


def _product(instruction: Instruction) -> _Product:
    opcode = instruction.opcode
    if instruction.shape:
        m, n, k = instruction.shape
        return _Product(m, n, k, 32 // k)
    width = 4 if "TF32" in opcode else 1 if opcode[0] in "IQ" else 2
    if found := re.match(r"\wGMMA\.(\d+)x(\d+)x(\d+)", opcode):
        return _Product(int(found[1]), int(found[2]), int(found[3]), width, warps=4)
    if found := re.match(r"\wMMA\.168(\d+)\b", opcode):  # m16n8k4, k8, k16, k32
        return _Product(16, 8, int(found[1]), width)
    raise ValueError(f"{opcode} {instruction.operands}: a matrix product of unknown shape")


def flops(instruction: Instruction) -> float:
    """Floating-point operations of a matrix product, one warp's part; 0 of anything else."""
    if not is_tensor(instruction):
        return 0.0
    product = _product(instruction)
    return 2 * product.m * product.n * product.k / product.warps


def _tensor(instruction: Instruction, gpu: Gpu) -> dict[str, float]:
    """A matrix product holds the tensor cores, and the port of shared memory while operands are read through it."""
    product = _product(instruction)
    synchronous = product.warps == 1 and not instruction.shape
    rate = (gpu.mma_sync if synchronous else gpu.mma) * 2 / product.width
    if instruction.shape:
        rate *= min(product.m, 128) / 128  # fewer rows leave tensor cores idle [assumed]
    found = {"tensor": product.m * product.n * product.k / rate / product.warps}
    if not synchronous:  # B comes from shared memory; so does A, unless it is in registers or tensor memory
        a_elsewhere = re.match(r"R\d+, R\d+", instruction.operands) or instruction.operands.startswith("tmem")
        rows = product.n + (0 if a_elsewhere else product.m)
        found["shared"] = rows * product.k * product.width / 128 / product.warps
    return found


_CLASSES = [  # opcode -> pipe and lanes of a warp that an SM serves in a clock [guide]
    (r"MUFU", "mufu", 16),
    (r"[FI]2[FI]|I2FP|FRND|POPC|FLO|BREV", "mufu", 16),  # conversions: [assumed]
    (r"F2FP", "alu", 64),  # [assumed]: two float32 to one pair of halves
    (r"(FFMA|FMUL|FADD)2", "fp32", -2),  # two operations a lane
    (r"FFMA|FMUL|FADD|FSWZADD", "fp32", 0),
    (r"HFMA2|HMUL2|HADD2|HMNMX2", "fp32", 0),
    (r"IMAD|IDP|IMUL", "fp32", 64),  # the half of the float32 lanes that also multiplies integers
    (r"SHFL|REDUX", "shared", 32),
]
_MEMORY = re.compile(r"LDS|STS|LDSM|STSM|LDG|STG|LDGSTS|LDL|STL|ATOMS?|ATOMG|RED|LD|ST")
_CONTROL = re.compile(
    r"U(?!TC\w*MMA)\w+|BRA|BSSY|BSYNC|BAR|EXIT|NOP|S2U?R|S2UR|R2UR|CS2R|LDCU?|DEPBAR|LDGDEPBAR|WARPSYNC|WARPGROUP|SYNCS|"
    r"MEMBAR|FENCE|ERRBAR|CCTL\w*|CALL|RET|VOTEU?|ELECT|BPT|NANOSLEEP|BREAK|YIELD|ACQBULK|PREEXIT|BMOV|ARRIVES"
)


def access_bytes(instruction: Instruction) -> int:
    """Bytes that a lane moves."""
    if instruction.name in ("LDSM", "STSM"):
        return 4 * int((re.search(r"\.(\d)$", instruction.opcode) or [0, 1])[1])
    size = re.search(r"\.[US]?(8|16|32|64|128|256)\b", instruction.opcode)
    return int(size[1]) // 8 if size else 4


def cycles(instruction: Instruction, gpu: Gpu) -> dict[str, float]:
    """The clocks that one warp's instruction holds each pipe of an SM."""
    if is_tensor(instruction):
        return _tensor(instruction, gpu) | {"issue": 0.25}
    found = {"issue": 0.25}  # each of the SM's four parts issues an instruction a clock
    if instruction.name in ("LDTM", "STTM"):
        columns = re.search(r"\.x(\d+)", instruction.opcode)
        half = 2 if "16dp" in instruction.opcode else 1
        found["tmem"] = int(columns[1] if columns else 1) / 4 / half  # [assumed]: 32 lanes of 4 bytes a clock and part
    elif _MEMORY.fullmatch(instruction.name):
        size = access_bytes(instruction)
        found["shared"] = max(1, size / 4)  # one port of 128 bytes a clock, global accesses included
        if instruction.name in ("LDG", "STG", "LDGSTS", "LDL", "STL", "ATOMG", "RED", "LD", "ST"):
            found["l2"] = size / 2  # 64 bytes a clock between L2 and an SM
    elif not _CONTROL.fullmatch(instruction.name):
        for pattern, pipe, lanes in _CLASSES:
            if re.fullmatch(pattern, instruction.name):
                found[pipe] = 32 / (lanes or gpu.fp32) if lanes >= 0 else 64 / gpu.fp32
                break
        else:
            found["alu"] = 32 / 64
    return found


@dataclass
class Prediction:
    """Predicted times of a launch, in seconds, on a GPU that does nothing else.

    ``overlapped``: the busiest pipe, or memory, works all the time while all else hides behind it. ``serial``: pipes
    and memory take turns. Neither counts latency, so a kernel of low occupancy may take longer than both.
    """

    pipes: dict[str, float]  # the time each pipe is held
    memory: float  # the time of the bytes that must move

    @property
    def limit(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])

    @property
    def parts(self) -> dict[str, float]:
        return {**self.pipes, "memory": self.memory}

    @property
    def overlapped(self) -> float:
        return max(self.parts.values())

    @property
    def serial(self) -> float:
        return sum(time for name, time in self.parts.items() if name not in ("issue", "l2"))


@dataclass
class Work:
    """What a launch executes: the instructions of a program (a block of threads) with the times that each is executed,
    its warps, the programs, and the bytes that memory must read and write at least once. ``copied``: bytes that TMA
    brings to a program's shared memory, of which its instructions don't say how many they are."""

    instructions: Sequence[Instruction]
    times: Sequence[float]
    warps: int
    programs: int
    moved_bytes: int
    copied: float = 0.0

    def _executed(self) -> Iterator[tuple[Instruction, float]]:
        """Instructions and how many warps of a program execute each, how many times."""
        for instruction, times in zip(self.instructions, self.times, strict=True):
            yield instruction, times * (1 if instruction.shape else self.warps)

    def cycles(self, gpu: Gpu) -> dict[str, float]:
        """The clocks that a program holds each pipe of an SM."""
        held = dict.fromkeys(PIPES, 0.0) | {"shared": self.copied / 128, "l2": self.copied / 64}
        for instruction, times in self._executed():
            for pipe, clocks in cycles(instruction, gpu).items():
                held[pipe] += clocks * times
        return held

    def predict(self, gpu: Gpu) -> Prediction:
        # a program stays on one SM: the SM with most of them has this many, one after another or at once
        each = math.ceil(self.programs / gpu.sms)
        pipes = {pipe: each * clocks / (gpu.ghz * 1e9) for pipe, clocks in self.cycles(gpu).items()}
        return Prediction(pipes, self.moved_bytes / (gpu.bandwidth * 1e12))

    @property
    def flops(self) -> float:
        """Operations that the tensor cores execute, padding and masked elements included."""
        return self.programs * sum(flops(instruction) * times for instruction, times in self._executed())
