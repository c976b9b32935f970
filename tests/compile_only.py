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
from unittest import mock

import sass
import triton
from gpu_model import GPUS, Occupancy, occupancy
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

ARCHS = tuple(GPUS)
SHARED_KIB = {arch: gpu.shared_block // 1024 for arch, gpu in GPUS.items()}  # a block's most
_TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass
class Launch:
    """One launch, as the host code makes it. Tensors may be meta tensors: of any size, at an aligned address."""

    kernel: JITFunction
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def bind(self, arch: int) -> tuple[Any, ...]:
        backend = make_backend(GPUTarget("cuda", arch, 32))
        binder = create_function_from_signature(self.kernel.signature, self.kernel.params, backend)
        bound, specialization, options = binder(*self.args, **self.options)
        return specialization, *self.kernel._pack_args(backend, self.options, bound, specialization, options)

    def key(self, arch: int = 80) -> str:
        """What Triton looks a compiled kernel up by: launches with one key share one compilation."""
        specialization, options, *_ = self.bind(arch)
        return f"{self.name} {specialization} {options}"

    def compile(self, arch: int) -> Compiled:
        _, options, signature, constexprs, attrs = self.bind(arch)
        source = ASTSource(self.kernel, signature, constexprs, attrs)
        target = GPUTarget("cuda", arch, 32)
        return Compiled(triton.compile(source, target=target, options=options.__dict__), arch)


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

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        seen.append(Launch(self, grid, args, options))

    with mock.patch.object(JITFunction, "run", record):
        call()
    return seen
