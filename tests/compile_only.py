"""Triton kernels compiled as they are launched, without a GPU, and what the compiled code is like."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sass
import triton
from gpu_model import GPUS, Occupancy, occupancy

from hhattn.simt import launch

ARCHS = tuple(GPUS)
SHARED_KIB = {arch: gpu.shared_block // 1024 for arch, gpu in GPUS.items()}  # a block's most
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Launch(launch.Launch):
    """A launch that can say what its compiled code is like."""

    def compile(self, arch: int) -> Compiled:
        return Compiled(self.binary(arch), arch)


@dataclass
class Compiled:
    """A compiled kernel and its figures."""

    kernel: Any
    arch: int

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.kernel.metadata.num_warps * self.kernel.metadata.warp_size

    @property
    def registers(self) -> int:
        """Of a thread."""
        return self.usage["REG"]

    @property
    def ptx(self) -> str:
        return self.kernel.asm["ptx"]

    def _dump(self, what: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.kernel.asm["cubin"])
            file.flush()
            run = [str(_TOOLS / "cuobjdump"), what, file.name]
            return subprocess.run(run, capture_output=True, text=True, check=True).stdout

    @cached_property
    def usage(self) -> dict[str, int]:
        """What `cuobjdump -res-usage` says: REG, STACK, SHARED, LOCAL, ... Shared memory that a launch asks for isn't
        in it, and on sm_90 and later 1 KiB that the system keeps is: see :attr:`shared`."""
        return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", self._dump("-res-usage"))}

    @cached_property
    def spills(self) -> int:
        """Instructions that read or write local memory."""
        return sum(i.name in ("LDL", "STL") for i in self.instructions)

    @cached_property
    def instructions(self) -> list[sass.Instruction]:
        """The machine code."""
        return sass.parse(self._dump("-sass"))

    @property
    def shared(self) -> int:
        """Bytes of shared memory a block takes, without what the system keeps."""
        static = self.usage["SHARED"] - (1024 if self.arch >= 90 else 0)  # if there is any
        return self.kernel.metadata.shared + max(0, static)

    def occupancy(self, threads: int | None = None) -> Occupancy:
        """Of an SM by blocks of as many threads as compiled for, unless other ``threads`` are given."""
        tmem = getattr(self.kernel.metadata, "tmem_size", 0)
        return occupancy(GPUS[self.arch], self.usage["REG"], self.shared, threads or self.threads, tmem)

    def tensor_ops(self) -> dict[str, int]:
        """Matrix products on tensor cores by opcode: HMMA... (mma.sync), HGMMA... (wgmma), UTCHMMA (tcgen05)."""
        return dict(Counter(i.opcode for i in self.instructions if sass.is_tensor(i)))

    def accesses(self, kind: str) -> dict[int, int]:
        """Global loads or stores (``kind`` "ld" or "st") by the bytes that a thread moves at once."""
        counts: dict[int, int] = {}
        for vector, bits in re.findall(rf"\b{kind}\.global(?:\.\w+)*?(?:\.v(\d))?\.[bfus](\d+)\b", self.ptx):
            size = int(vector or 1) * int(bits) // 8
            counts[size] = counts.get(size, 0) + 1
        return counts


def launches(call: Callable[[], object]) -> list[Launch]:
    """Every kernel that ``call`` launches; none of them runs."""
    seen: list[Launch] = []
    with launch.caught(lambda one: seen.append(Launch(one.kernel, one.grid, one.args, one.options))):
        call()
    return seen
