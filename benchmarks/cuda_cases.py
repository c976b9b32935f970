"""The CUDA kernels of the report, as real models launch them. Each op's host code is called through its binding with
meta tensors; the emulator records the launches, and nvcc's code for the very instantiations is looked up.

To add a kernel, add a function that returns a :class:`CudaCase` and name it in :data:`CASES`.
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import cuda_code
import torch
from gpu_model import Occupancy
from kernel_cases import (
    BLOCK,
    MODELS,
    RELU,
    Case,
    Model,
    counted,
    linear_arguments,
    mask_blocks,
    mask_flops,
    meta,
    norm_arguments,
    rope_arguments,
    sparse_arguments,
    sparse_backward_arguments,
)
from torch import Tensor

from hhattn.simt import cuda
from hhattn.simt.runtime import Recorded, runtime

ARCHS = {80: "80", 90: "90a", 100: "100a"}


@dataclass(frozen=True)
class CudaCompiled:
    """A launch's compiled kernel: what the report asks of it."""

    kernel: cuda_code.Kernel
    threads: int
    dynamic: int

    @property
    def instructions(self) -> Any:
        return self.kernel.instructions

    @property
    def registers(self) -> int:
        return self.kernel.registers

    @property
    def shared(self) -> int:
        return self.kernel.static + self.dynamic

    @property
    def spills(self) -> int:
        return self.kernel.spills

    def occupancy(self) -> Occupancy:
        return self.kernel.occupancy(self.threads, self.dynamic)


@dataclass(frozen=True)
class CudaLaunch:
    """A launch as the host code makes it. ``name`` is the kernel's, ``parameters`` its template's arguments."""

    op: str
    recorded: Recorded
    defines: tuple[str, ...] = ()

    @cached_property
    def plain(self) -> str:
        return cuda_code.plain_name(self.recorded.kernel)

    @property
    def name(self) -> str:
        return self.plain.split("<")[0]

    @property
    def parameters(self) -> list[str]:
        return [word for word in re.split(r"[<>,]+", self.plain)[1:] if word]

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.recorded.grid

    def compile(self, arch: int) -> CudaCompiled:
        """The code of this instantiation. LookupError unless it is in exactly one of the op's sources."""
        sources = [source for source in cuda_code.sources() if source.stem.startswith(self.op)]
        able = [source for source in sources if ARCHS[arch] in cuda_code.archs(source)]
        every = [kernel for source in able for kernel in cuda_code.compiled(source, ARCHS[arch], self.defines).kernels]
        found = [kernel for kernel in every if kernel.name == self.plain]
        if len(found) != 1:
            raise LookupError(f"{self.plain}: {len(found)} kernels of that name in {[s.name for s in able]}")
        x, y, z = self.recorded.block
        return CudaCompiled(found[0], x * y * z, self.recorded.shared)


@dataclass(frozen=True)
class CudaCase(Case):
    """A call of ``torch.ops.hhattn_cuda``. ``moved``: names of the tensors that a launch moves, or None where it moves
    all that the operator has. ``defines``: under which nvcc compiles the sources.
    """

    moved: Callable[[CudaLaunch], Sequence[str] | None] = lambda launch: None
    defines: tuple[str, ...] = ()

    by = "CUDA"

    def moved_bytes(self, launch: CudaLaunch) -> int:
        names = self.moved(launch)
        return sum(size for name, size in launch.recorded.tensors if names is None or name in names)

    def counted(self, arch: int) -> list[tuple[CudaLaunch, int]]:
        """What the call launches on a GPU of that architecture."""
        importlib.import_module(f"hhattn.ops.{self.op}")  # defines the operators
        kernels = cuda.Kernels()
        cuda.prepare(kernels, arch)
        runtime().reset()
        with runtime().recording() as made:
            self.call()
        if kernels.error is not None:
            raise kernels.error
        launches = (CudaLaunch(self.op, each, self.defines) for each in made)
        return counted(launches, lambda launch: (launch.plain, launch.grid))


def operator(name: str, *args: object) -> Callable[[], object]:
    """A call of the binding with meta tensors: they get where CPU tensors do."""

    def call() -> object:
        cuda.bindings()
        overload = getattr(getattr(torch.ops, cuda.NAMESPACE), name).default
        return overload._op_dk(torch._C.DispatchKey.CPU, *args)

    return call


#: Kernels that look at dtypes when they run: only what bfloat16 executes is counted.
BF16 = ("HH_ONE_DTYPE=hh::bf16",)


def norm_forward(model: Model) -> CudaCase:
    x, scale, shift, residual, gate = norm_arguments(model)
    call = operator("norm_modulate", x, scale, shift, None, None, residual, gate, True, 1e-6)
    return CudaCase("norm_modulate", "forward", model, call, defines=BF16)


def norm_backward(model: Model) -> CudaCase:
    x, scale, shift, residual, gate = norm_arguments(model)
    call = operator(
        "norm_modulate_backward", x.clone(), x.clone(), x, scale, shift, None, None, residual, gate, True, 1e-6
    )
    return _norm_backward("norm_modulate", model, call, "dscale")


def _norm_backward(op: str, model: Model, call: Callable[[], object], summed: str) -> CudaCase:
    """Blocks take pieces of the tokens, row by row; then what pieces hold of a row of modulation, ``summed`` or another
    of its size, is added up by 8 threads."""

    def times(launch: CudaLaunch) -> Sequence[float]:
        if launch.name == "sum_parts":  # a loop over about so many pieces, unrolled or not
            run = math.ceil(math.ceil(model.seq / 4096) / 16) * 16
            return [max(1.0, model.seq / model.rows / run / 8)]
        x, y, _ = launch.recorded.block
        if op == "qk_norm_rope" and not model.across:  # some lanes of 8 channels have a token, and go over its heads
            return [model.seq / launch.grid[0] / (x // (model.dim // 8)) * model.heads]
        return [model.seq / launch.grid[0] / y]

    def moved(launch: CudaLaunch) -> Sequence[str] | None:
        return (summed,) if launch.name == "sum_parts" else None

    return CudaCase(op, "backward", model, call, times, moved=moved, defines=BF16)


def rope_forward(model: Model) -> CudaCase:
    """Where heads are normed apart, threads go over the heads of a token."""
    call = operator("qk_norm_rope", *rope_arguments(model))
    times = () if model.across else (float(model.heads),)
    return CudaCase("qk_norm_rope", "forward", model, call, lambda launch: times, defines=BF16)


def rope_backward(model: Model) -> CudaCase:
    dq, dk = (meta(1, model.seq, model.heads, model.dim) for _ in range(2))
    call = operator("qk_norm_rope_backward", dq, dk, *rope_arguments(model), False)
    return _norm_backward("qk_norm_rope", model, call, "dweight")


def _sparse(model: Model, phase: str, call: Callable[[], object]) -> CudaCase:
    """Programs follow both lists of their line, some keys or queries a run; blocks of the mask have as many of both."""
    products = {"forward": 2, "backward_dq": 3, "backward_dkv": 4}
    full, partial = mask_blocks(model)

    def hopper(launch: CudaLaunch) -> tuple[int, int, int] | None:
        """Dims, keys a run, and warpgroups that multiply, of the kernel on wgmma."""
        _, *sizes = launch.parameters
        return (int(sizes[0]), int(sizes[1]), int(sizes[2])) if len(sizes) == 3 and sizes[0].isdigit() else None

    def times(launch: CudaLaunch) -> Sequence[float]:
        if launch.name not in products:
            return ()
        if shape := hopper(launch):
            return [(full + partial) * BLOCK / shape[1] - 1]  # the first run is taken out of the loop
        dims = int(launch.parameters[2])
        # above 64 dims the forward's warps lie along the queries alone where a block has 128 of them, and take 32 keys
        few = dims > 128 or (launch.name == "forward" and dims > 64 and int(launch.parameters[3]) == 1)
        return [(full + partial) * BLOCK / (32 if few else 64)]

    def flops(launch: CudaLaunch) -> float:
        return products.get(launch.name, 0) * mask_flops(model)

    def copied(launch: CudaLaunch) -> float:
        shape = hopper(launch)
        return 2 * 2.0 * shape[0] * shape[1] if shape else 0.0  # keys and values

    def inner(launch: CudaLaunch) -> float | None:
        """dk and dv take 16 of a run's queries at a time."""
        dims = int(launch.parameters[2]) if launch.name == "backward_dkv" else 0
        return (4.0 if dims <= 128 else 2.0) if dims else None

    def warps(launch: CudaLaunch) -> int | None:
        shape = hopper(launch)
        return 4 * shape[2] if shape else None

    rare = partial / (full + partial)
    how = {"copied": copied, "inner": inner, "warps": warps, "moved": _sparse_moved}
    return CudaCase("block_sparse_attention", phase, model, call, times, flops, rare=rare, **how)


def _sparse_moved(launch: CudaLaunch) -> Sequence[str] | None:
    """What each kernel of the backward reads and writes; it has more scratch memory than the operator's tensors."""
    return {
        "delta": ("dout", "out", "lse", "dlse", "delta", "log2"),
        "backward_dq": ("dout", "q", "k", "v", "delta", "log2", "dq"),
        "backward_dkv": ("dout", "q", "k", "v", "delta", "log2", "dk", "dv"),
    }.get(launch.name)


def sparse_forward(model: Model) -> CudaCase:
    call = operator("block_sparse_attention", *sparse_arguments(model), *[None] * 5)
    return _sparse(model, "forward", call)


def sparse_backward(model: Model) -> CudaCase:
    lines = math.ceil(model.seq / BLOCK)
    full, partial = (lines * count for count in mask_blocks(model))
    sizes = (lines + 1, partial, partial, lines + 1, full)  # where lines begin, rows, tiles; where lines begin, rows
    by_key = [meta(1, 1, n, dtype=torch.int32) for n in sizes]
    call = operator("block_sparse_attention_backward", *sparse_backward_arguments(model), *by_key, True, True)
    return _sparse(model, "backward", call)


def _linear(model: Model, phase: str, call: Callable[[], object]) -> CudaCase:
    """Programs take a piece of a chunk, 16 tokens a warp and run; sums in tiles of 32 tokens for all warps."""
    chunks = math.ceil(model.frames / model.chunk)

    def pieces(launch: CudaLaunch) -> float:
        return launch.grid[0] / model.heads / chunks

    def times(launch: CudaLaunch) -> Sequence[float]:
        if launch.name == "linear_fold":
            sizes = dict(launch.recorded.tensors)
            rest = sizes["kv of pieces"] // sizes["kv"] - 1  # the first piece is what the sum begins with
            return [rest // 4, rest % 4]  # unrolled by four, and the rest
        return [model.seq / chunks / pieces(launch) / (32 if launch.name == "linear_sums" else 64)]

    def flops(launch: CudaLaunch) -> float:
        return 0.0 if launch.name == "linear_fold" else 2.0 * model.seq * model.channels * model.dim

    def inner(launch: CudaLaunch) -> float | None:
        return 2.0 if launch.name == "linear_sums" else None

    def moved(launch: CudaLaunch) -> Sequence[str]:
        names = [name for name, _ in launch.recorded.tensors]
        rows = ("k", "q", "v", "dout", "cos", "sin", "gate", "factor", "weight")
        if launch.name == "linear_fold":
            return ("kv of pieces", "kv", "dkv") if launch.grid[1] > 1 else ("k_sum of pieces", "k_sum", "dk_sum")
        if launch.name == "linear_outputs":
            return ("k", "q", "kv", "dkv", "k_sum", "cos", "sin", "gate", "out", "dv")
        if launch.name == "linear_gradients":
            return (*rows, "kv", "k_sum", "dkv", "dk_sum", "dgate", "dx")
        return (*rows, *(("kv of pieces",) if "kv of pieces" in names else ("kv", "dkv")))

    return CudaCase("block_linear_attention", phase, model, call, times, flops, inner=inner, moved=moved)


def linear_forward(model: Model) -> CudaCase:
    (q, k, v, _), tables, state = linear_arguments(model)
    how = (*(halved(x) for x in tables), model.chunk * model.tokens, [], RELU, RELU)
    sums = operator("block_linear_sums", k, v, None, *how)
    outputs = operator("block_linear_outputs", q, *state, *how, True, 1e-15)
    return _linear(model, "forward", lambda: (sums(), outputs()))


def linear_backward(model: Model) -> CudaCase:
    (q, k, v, dout), tables, state = linear_arguments(model)
    how = (*(halved(x) for x in tables), model.chunk * model.tokens, [], RELU, RELU)
    outputs = operator("block_linear_outputs_backward", dout, q, *state, q.clone(), *how, True, 1e-15)
    sums = operator("block_linear_sums_backward", *state, k, v, None, *how)
    return _linear(model, "backward", lambda: (outputs(), sums()))


def halved(table: Tensor) -> Tensor:
    """One number a pair, as the op gives tables to GPU kernels."""
    return table[:, ::2].contiguous()


CASES: tuple[Callable[[Model], CudaCase], ...] = (
    norm_forward,
    norm_backward,
    rope_forward,
    rope_backward,
    sparse_forward,
    sparse_backward,
)


def cases() -> list[CudaCase]:
    """Every call."""
    linear = [case(model) for case in (linear_forward, linear_backward) for model in MODELS if model.chunk]
    return [case(model) for case in CASES for model in MODELS] + linear
