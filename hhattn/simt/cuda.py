"""The CUDA kernels of ``csrc/cuda``, compiled by g++ for the emulator, and called on CPU tensors through the very
bindings that a GPU build has.

A kernel file (``csrc/cuda/*.cu``) becomes a library of its own when one of its launchers is first called; the bindings
(``csrc/cuda/ops/*.cpp``) become one. Each is found again by a hash of all it is made of.
"""

from __future__ import annotations

import collections
import ctypes
import functools
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hhattn.simt import runtime

#: What the bindings define their operators in; hhattn_cuda's, on CPU tensors, call these.
NAMESPACE = "hhattn_cuda_emulated"
_GAP = 1 << 16  # bytes before and behind an argument; a multiple of 256
_FIND = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)


def _binding_flags() -> tuple[str, ...]:
    torch_include = Path(torch.__file__).parent / "include"
    stable = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10, as in setup.py
    folders = (f"-I{runtime.CUDA}", f"-I{runtime.SOURCES}", f"-isystem{torch_include}")
    return ("-std=c++20", "-O1", "-fPIC", "-Wall", "-DHH_EMULATED", stable, *folders)


def _object(source: Path) -> Path:
    """A binding's object file, built if it isn't there."""
    flags = _binding_flags()
    name = runtime.digest(flags, torch.__version__, *runtime.included(source))
    target = runtime.cache_dir() / "cuda-ops" / f"{source.stem}-{name}.o"
    if not target.exists():
        with tempfile.TemporaryDirectory(prefix="hhattn-simt-") as folder:
            made = Path(folder) / "made.o"
            runtime.run_compiler([runtime.compiler(), *flags, "-c", source, "-o", made])
            runtime.install(made, target)
    return target


@functools.cache
def bindings() -> ctypes.CDLL:
    """The library that registers ``torch.ops.hhattn_cuda_emulated``, built and loaded."""
    sources = sorted((runtime.CUDA / "ops").glob("*.cpp"))
    if not sources:
        raise RuntimeError(f"CUDA kernels are built from the source tree's csrc/cuda, and {runtime.CUDA} isn't there")
    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(_object, sources))
    target = runtime.cache_dir() / f"cuda-ops-{runtime.digest(map(str, objects), str(runtime.library()))}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(prefix="hhattn-simt-") as folder:
            made = Path(folder) / "ops.so"
            torch_flags = (f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu")
            runtime.run_compiler([runtime.compiler(), *objects, *runtime.link_flags(), *torch_flags, "-o", made])
            runtime.install(made, target)
    return ctypes.CDLL(str(target))


class Kernels:
    """The kernel files of a folder, built as they are called; another folder than csrc/cuda for seeded faults."""

    def __init__(self, folder: Path = runtime.CUDA, defines: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.defines = defines
        self.calls: collections.Counter[str] = collections.Counter()
        self.error: Exception | None = None
        self._found: dict[str, Any] = {}

    def sources(self) -> list[Path]:
        return sorted(self.folder.glob("*.cu"))

    def build(self) -> None:
        """Build every file, several at a time."""
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._build, self.sources()))

    def _build(self, source: Path) -> ctypes.CDLL:
        return runtime.build_cu(source, self.defines)

    def launcher(self, name: str) -> Any:
        """The function ``extern "C" int NAME(const Args*, void* stream)``. RuntimeError if no file has it."""
        if name not in self._found:
            definition = re.compile(rf"\bint {name}\(")
            source = next((f for f in self.sources() if definition.search(f.read_text())), None)
            if source is None:
                raise RuntimeError(f"no kernel file in {self.folder} has the launcher {name}")
            self._found[name] = getattr(self._build(source), name)
        return self._found[name]

    def find(self, name: bytes) -> int | None:
        """What bindings call: the launcher's address, or None, the error being kept for :func:`call`."""
        try:
            self.calls[name.decode().removeprefix("hh_cuda_")] += 1
            return ctypes.cast(self.launcher(name.decode()), ctypes.c_void_p).value
        except Exception as error:
            self.error = error
            return None


def prepare(kernels: Kernels, arch: int) -> None:
    """From now on the bindings call these kernels, as on sm_``arch``."""
    library = bindings()
    callback = _FIND(kernels.find)
    ctypes.c_void_p.in_dll(library, "hh_find_launcher").value = ctypes.cast(callback, ctypes.c_void_p).value
    ctypes.c_int.in_dll(library, "hh_arch").value = arch
    _kept[:] = [callback]


_kept: list[Callable[..., Any]] = []  # or the callback would be collected


def call(kernels: Kernels, arch: int, name: str, args: tuple[Any, ...], launches: collections.Counter[str]) -> Any:
    """The operator ``name`` on CPU tensors. What is out of a tensor's bounds is reported however far off it is, since
    each argument is copied to where nothing is near it. ``launches`` counts the launchers it called."""
    prepare(kernels, arch)
    kernels.error, kernels.calls = None, launches
    try:
        return getattr(getattr(torch.ops, NAMESPACE), name)(*(_apart(a) if isinstance(a, Tensor) else a for a in args))
    except RuntimeError:
        if kernels.error is not None:
            raise kernels.error from None
        raise


def _apart(t: Tensor) -> Tensor:
    """A copy of ``t`` with the same strides and the same alignment to 256 bytes, and unregistered memory around."""
    if not t.numel():
        return t
    extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    bytes_ = extent * t.element_size()
    arena = torch.empty(bytes_ + 2 * _GAP, dtype=torch.uint8, device="cpu")
    begin = _GAP + (t.data_ptr() - arena.data_ptr()) % 256
    ctypes.memmove(arena.data_ptr() + begin, t.data_ptr(), bytes_)
    return arena[begin : begin + bytes_].view(t.dtype).as_strided(t.shape, t.stride())
