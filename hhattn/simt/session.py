"""Ops on CPU tensors, their Triton kernels compiled for a GPU, or their CUDA kernels, executed by the emulator."""

from __future__ import annotations

import collections
import ctypes
import importlib.util
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hhattn.ops import _cuda, _triton
from hhattn.simt import Counter, Report
from hhattn.simt import cuda as _cuda_kernels
from hhattn.simt.runtime import READ_ONLY, READ_WRITE, runtime

if TYPE_CHECKING:
    from hhattn.simt.launch import Launch

ARCHS = (80, 90)
_FORMATS = {"i1": "?", "u1": "?", "fp16": "<e", "fp32": "<f", "f32": "<f", "fp64": "<d", "f64": "<d"} | {
    f"{sign}{bits}": f"<{letter if sign == 'i' else letter.upper()}"
    for sign in "iu"
    for bits, letter in ((8, "b"), (16, "h"), (32, "i"), (64, "q"))
}

_FLOATS = {"fp16": "b16", "fp32": "f32", "f32": "f32", "fp64": "f64", "f64": "f64"}
_SCRATCH = 2  # pointers that Triton adds to a kernel's parameters

_GAP = 1 << 16  # bytes between tensors; a multiple of 512


@dataclass
class _Kernel:
    """A compiled kernel, ready to run."""

    address: int
    threads: int
    shared: int
    params: tuple[str, ...]  # their PTX types
    stored: set[int]


_KERNELS: dict[str, _Kernel] = {}  # of this process, whatever the session


@dataclass
class Session:
    """What ran while :func:`emulate` was active: ``reports`` of what a GPU would do wrong in silence, ``launches`` by
    name of the Triton kernel or the CUDA launcher, and ``counters`` of requests to memory if they were asked for."""

    arch: int
    seed: int
    rewrite: Callable[[str, str], str] | None = None
    kernels: _cuda_kernels.Kernels = field(default_factory=_cuda_kernels.Kernels)
    launches: collections.Counter[str] = field(default_factory=collections.Counter)
    _rewritten: dict[str, _Kernel] = field(default_factory=dict)

    @property
    def reports(self) -> list[Report]:
        return runtime().reports()

    @property
    def counters(self) -> list[Counter]:
        return runtime().counters()

    def _compiled(self, launch: Launch) -> _Kernel:
        kept = _KERNELS if self.rewrite is None else self._rewritten
        key = f"{self.arch} {launch.kernel.cache_key} {launch.key(self.arch)}"
        if key not in kept:
            kept[key] = self._compile(launch)
        return kept[key]

    def _compile(self, launch: Launch) -> _Kernel:
        from hhattn.simt import build
        from hhattn.simt._pointers import stored
        from hhattn.simt.ptx import parse

        binary = launch.binary(self.arch)
        text = binary.asm["ptx"]
        if self.rewrite is not None:
            text = self.rewrite(launch.name, text)
        kernel = parse(text)
        meta = binary.metadata
        return _Kernel(
            build.load(text),
            32 * meta.num_warps,
            meta.shared,
            tuple(type_ for type_, _ in kernel.params),
            stored(kernel),
        )

    def call(self, name: str, args: tuple[Any, ...]) -> Any:
        """Run the operator ``hhattn_cuda::NAME``."""
        return _cuda_kernels.call(self.kernels, self.arch, name, args, self.launches)

    def run(self, launch: Launch) -> None:
        """Run one launch of a Triton kernel to its end."""
        kernel = self._compiled(launch)
        parameters = launch.parameters(self.arch)
        _check_signature(launch.name, parameters, kernel.params)
        self.launches[launch.name] += 1
        emulator = runtime()
        emulator.unregister_all()
        spans = _spans(parameters, kernel.stored)
        arena = torch.empty(sum(end - begin + _GAP for begin, end, _, _ in spans), dtype=torch.uint8)
        moved, at = [], arena.data_ptr()
        for begin, end, name, writable in spans:  # apart, so that what lies beyond one is no other's
            at += (begin - at) % 256 + _GAP // 2
            ctypes.memmove(at, begin, end - begin)
            emulator.register_range(at, at + end - begin, name, READ_WRITE if writable else READ_ONLY)
            moved.append((begin, end, at))
            at += end - begin
        packed = b"".join(_pack(launch.name, *p, moved) for p in parameters).ljust(8 * len(kernel.params), b"\0")
        emulator.launch(launch.name, kernel.address, packed, launch.blocks(), (kernel.threads, 1, 1), kernel.shared)
        for (begin, end, at), (*_, writable) in zip(moved, spans, strict=True):
            if writable:
                ctypes.memmove(begin, at, end - begin)


def _check_signature(kernel: str, parameters: list[tuple[str, str, Any]], ptx: tuple[str, ...]) -> None:
    """ValueError unless the PTX takes these parameters, and after them Triton's own pointers to scratch memory."""
    given = [(name, _ptx_type(type_)) for name, type_, _ in parameters] + [("scratch memory", "u64")] * _SCRATCH
    if len(ptx) != len(given):
        raise ValueError(f"{kernel}: its PTX takes {len(ptx)} parameters, the launch gives {len(given)}")
    for (name, ours), theirs in zip(given, ptx, strict=True):
        if ours != theirs:
            raise ValueError(f"{kernel}: its PTX takes {name} as {theirs}, the launch gives {ours}")


def _ptx_type(type_: str) -> str:
    """How PTX declares a parameter of Triton's type."""
    if type_.startswith("*"):
        return "u64"
    if type_ in _FLOATS:
        return _FLOATS[type_]
    return f"u{max(8, int(type_[1:]))}"


def _pack(kernel: str, name: str, type_: str, value: Any, moved: list[tuple[int, int, int]]) -> bytes:
    """A parameter's 8 bytes. moved: begin, end and copy's address of each span."""
    if type_.startswith("*"):
        if value.device.type != "cpu":
            raise ValueError(f"{kernel}: {name} is on {value.device}; the emulator runs on CPU tensors")
        p = value.data_ptr()
        return struct.pack("<Q", next((p - begin + at for begin, end, at in moved if begin <= p < end), p))
    if type_ not in _FORMATS:
        raise ValueError(f"{kernel}: {name} is of Triton's type {type_}; the emulator passes {', '.join(_FORMATS)}")
    return struct.pack(_FORMATS[type_], value).ljust(8, b"\0")


def _spans(parameters: list[tuple[str, str, Any]], stored: set[int]) -> list[tuple[int, int, str, bool]]:
    """Memory that the tensors among ``parameters`` reach, from first to last element: begin, end, names, whether it is
    written. Where views overlap they are one."""
    found: list[tuple[int, int, str, bool]] = []
    for i, (name, _, t) in enumerate(parameters):
        if isinstance(t, Tensor) and t.numel():
            extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
            found.append((t.data_ptr(), t.data_ptr() + extent * t.element_size(), name, i in stored))
    merged: list[tuple[int, int, str, bool]] = []
    for begin, end, name, writable in sorted(found):
        if merged and begin < merged[-1][1]:
            before = merged.pop()
            begin, end = before[0], max(end, before[1])
            name, writable = f"{before[2]}, {name}", writable or before[3]
        merged.append((begin, end, name, writable))
    return merged


@contextmanager
def emulate(
    arch: int = 80,
    seed: int = 0,
    *,
    counters: bool = False,
    rewrite: Callable[[str, str], str] | None = None,
    cuda: _cuda_kernels.Kernels | None = None,
) -> Iterator[Session]:
    """While it is active, ops called on CPU tensors with ``impl="triton"`` run their kernels' PTX, compiled for
    ``sm_<arch>`` (80, or 90 as sm_90a), on the emulator, and with ``impl="cuda"`` their CUDA kernels. Needs pybind11
    and g++, and triton for Triton's.

    seed: another order of warps and blocks for each. counters: count bank conflicts and sectors too, which is slower.
    rewrite: called with a Triton kernel's name and PTX, returns the PTX to run instead; to seed faults.
    cuda: another folder's CUDA kernels instead of csrc/cuda's, for the same purpose.
    """
    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {ARCHS}, got {arch}")
    if _triton.interpreted():
        raise RuntimeError("emulate runs compiled kernels; TRITON_INTERPRET=1 compiles none: unset it")
    if _cuda.emulated is not None:
        raise RuntimeError("emulate is active already; it doesn't nest")
    runtime().reset()
    runtime().options(seed=seed, counters=counters)
    session = Session(arch, seed, rewrite, cuda or _cuda_kernels.Kernels())
    _triton.emulated = importlib.util.find_spec("triton") is not None
    _cuda.emulated = session
    try:
        with _caught(session.run) if _triton.emulated else nullcontext():
            yield session
    finally:
        _triton.emulated, _cuda.emulated = False, None
        runtime().unregister_all()


def _caught(handle: Callable[[Launch], None]) -> AbstractContextManager[None]:
    from hhattn.simt.launch import caught

    return caught(handle)
