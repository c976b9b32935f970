"""Builds and loads the emulator, and speaks to it.

``runtime()`` is what everything else uses: a :class:`Runtime` with ``register``, ``options``, ``launch``, ``reports``
and ``counters``. Built files lie under ``$HHATTN_SIMT_CACHE`` (default: ``~/.cache/hhattn/simt``), in folders named by
a hash of what they were made from.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hhattn.simt import Counter, Report

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "simt"
CUDA = SOURCES.parent / "cuda"
HEADERS = ("machine", "numbers", "ptx", "simt")
LIBRARY = ("async", "hooks", "instructions", "launch", "memory", "reports", "sync", "tensor_map", "wgmma")
#: What every file is compiled with. The CPU's own instructions are right here: it is built where it runs.
FLAGS = ("-std=c++20", "-fPIC", "-fno-gnu-unique", "-march=native", "-ffp-contract=off", f"-I{SOURCES}")
#: Sanitizers' calls into the emulator, for sources that don't announce their accesses.
CU_FLAGS = (
    *("-x", "c++", "-include", "cuda.h", "-O1", "-g1", "-fsanitize=thread,alignment"),
    *("--param", "tsan-instrument-func-entry-exit=0"),
    "-fno-tree-sra",  # scalar replacement would split vector accesses, and their alignment would go unchecked
    *("-Wno-unknown-pragmas", f"-I{CUDA}"),
)

READ_ONLY, READ_WRITE, WRITE_FIRST = range(3)


def cache_dir() -> Path:
    """Where built files are kept."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hhattn" / "simt"
    return Path(os.environ.get("HHATTN_SIMT_CACHE") or default)


def compiler() -> str:
    """The C++ compiler: ``$CXX`` or g++. RuntimeError if there is none."""
    name = os.environ.get("CXX", "g++")
    if not (path := shutil.which(name.split()[0])):
        raise RuntimeError(f"hhattn.simt builds its emulator with {name}, which isn't here; install g++ or set CXX")
    return path


def run_compiler(command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        shown = " ".join(str(c) for c in command)
        raise RuntimeError(f"hhattn.simt: status {done.returncode} of\n{shown}\n{done.stderr.strip()[-4000:]}")


@functools.cache
def compiler_version() -> str:
    """What the compiler calls itself and what it takes this CPU for: part of what is hashed."""
    command = [compiler(), "-march=native", "-Q", "--help=target"]
    native = subprocess.run(command, capture_output=True, text=True).stdout
    return subprocess.run([compiler(), "--version"], capture_output=True, text=True).stdout + native


def digest(*parts: str | bytes | Path | Iterable[str]) -> str:
    """A name for what is made of these (text, bytes, files' contents, sequences of flags) by this compiler."""
    h = hashlib.sha256(compiler_version().encode())
    for part in parts:
        if isinstance(part, Path):
            part = part.read_bytes()
        elif not isinstance(part, str | bytes):
            part = "\0".join(part)
        data = part.encode() if isinstance(part, str) else part
        h.update(len(data).to_bytes(8, "little") + data)
    return h.hexdigest()[:20]


def headers() -> list[Path]:
    """What compiled kernels depend on besides their source."""
    return sorted(SOURCES.glob("*.h"))


def included(source: Path) -> list[Path]:
    """The source and every file of ``csrc`` that it includes, directly or not: what its object is made of."""
    found, left = [], [source.resolve()]
    while left:
        if (file := left.pop()) in found:
            continue
        found.append(file)
        for name in re.findall(r'^\s*#include "([^"]+)"', file.read_text(), re.MULTILINE):
            left += [p for folder in (file.parent, CUDA, SOURCES) if (p := (folder / name).resolve()).is_file()][:1]
    return sorted(found)


def install(made: Path, target: Path) -> None:
    """Moves a built file to its place; several processes may build the same one, and the last wins whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.move(made, temporary)
    temporary.replace(target)


@functools.cache
def library() -> Path:
    """libsimt.so, built if it isn't there. Compiled kernels link against it."""
    if not SOURCES.is_dir():
        raise RuntimeError(f"hhattn.simt is built from the source tree's csrc/simt, and {SOURCES} isn't there")
    files = [SOURCES / f"{name}.cpp" for name in (*LIBRARY, "python")]
    flags = (*FLAGS, "-O3", "-g1", "-Wall")
    own = [SOURCES / f"{name}.h" for name in HEADERS]
    folder = cache_dir() / f"lib-{digest(flags, sys.version, *files, *own)}"
    target = folder / "libsimt.so"
    if not (folder / "_simt.so").exists():
        _build_library(files, flags, folder)
    return target


def _build_library(files: list[Path], flags: Sequence[str], folder: Path) -> None:
    try:
        import pybind11
    except ImportError as error:
        raise RuntimeError("hhattn.simt needs pybind11 to build its module: pip install 'hhattn[test]'") from error
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    with tempfile.TemporaryDirectory(prefix="hhattn-simt-") as name, ThreadPoolExecutor() as pool:
        made = Path(name)
        objects = [made / f"{f.stem}.o" for f in files]
        list(pool.map(lambda f, o: run_compiler([compiler(), *flags, *python, "-c", f, "-o", o]), files, objects))
        *core, module = objects
        link = [compiler(), "-shared", "-ldl"]
        run_compiler([*link, "-Wl,-soname,libsimt.so", "-o", made / "libsimt.so", *core])
        run_compiler([*link, "-Wl,-rpath,$ORIGIN", "-o", made / "_simt.so", module, f"-L{made}", "-lsimt"])
        for file in ("libsimt.so", "_simt.so"):
            install(made / file, folder / file)


def link_flags() -> list[str]:
    """How a compiled kernel is linked: -shared, against the emulator."""
    folder = library().parent
    return ["-shared", f"-L{folder}", f"-Wl,-rpath,{folder}", "-lsimt"]


def build_cu(source: Path, defines: Sequence[str] = ()) -> ctypes.CDLL:
    """Compiles a .cu file for the emulator and loads it: its ``extern "C"`` functions launch its kernels on the CPU."""
    flags = (*FLAGS, *CU_FLAGS, *defines)
    source = source.resolve()
    made_of: tuple[str | Path, ...] = (*included(source), *headers(), str(library()))
    target = cache_dir() / f"cu-{digest(flags, *made_of)}" / f"{source.stem}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(prefix="hhattn-simt-") as name:
            made = Path(name)
            run_compiler([compiler(), *flags, "-c", source, "-o", made / "kernel.o"])
            run_compiler([compiler(), made / "kernel.o", *link_flags(), "-o", made / "kernel.so"])
            install(made / "kernel.so", target)
    return ctypes.CDLL(str(target), mode=ctypes.RTLD_LOCAL)


@functools.cache
def _resolve(library: str, offset: int) -> tuple[str, int]:
    """File and line of code in a library: the caller's, where an instruction's wrapper was inlined."""
    command = ["addr2line", "-i", "-e", library, hex(offset)]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        return library, 0
    for line in lines:
        file, _, number = line.partition(" ")[0].rpartition(":")
        if file and Path(file).parent != SOURCES and not Path(file).name.startswith("ptx"):
            return file, int(number) if number.isdigit() else 0
    return library, 0


@functools.cache
def _function(library: str, offset: int) -> str:
    """The C++ function at a place in a library; RuntimeError if that isn't known."""
    command = ["addr2line", "-f", "-C", "-e", library, hex(offset)]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0]
    if name == "??":
        raise RuntimeError(f"hhattn.simt: no function at {offset:#x} of {library}; it is compiled without -g")
    return name


def _place(place: tuple[str, int, bool]) -> tuple[str, int]:
    file, line, is_counter = place
    return _resolve(file, line) if is_counter else (file, line)


@dataclass(frozen=True)
class Recorded:
    """A launch of a CUDA kernel that was not run: the kernel with its template arguments and parameters' types, what
    the source calls it, blocks, threads of a block, bytes of dynamic shared memory, and the name and bytes of each
    tensor that was registered for it."""

    kernel: str
    name: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    tensors: list[tuple[str, int]]


class Runtime:
    """The emulator in this process. Launches run one at a time; its state is the process's."""

    def __init__(self, module: Any) -> None:
        self._module = module
        self._kept: list[torch.Tensor] = []

    def register(self, tensor: torch.Tensor, name: str, access: int = READ_WRITE) -> None:
        """Let kernels touch the tensor's storage.

        ``access``: READ_ONLY (a write is reported and ends the launch), READ_WRITE, or WRITE_FIRST (poisoned now, and
        reading what was not written yet is reported). Raises ValueError unless it is a CPU tensor.
        """
        if tensor.device.type != "cpu":
            raise ValueError(f"tensor {name!r}: the emulator reads CPU memory, this is on {tensor.device}")
        storage = tensor.untyped_storage()
        self._module.register(storage.data_ptr(), storage.nbytes(), name, access)
        self._kept.append(tensor)

    def register_range(self, begin: int, end: int, name: str, access: int = READ_WRITE) -> None:
        """The same for the bytes from address ``begin`` to ``end``; who calls it keeps them alive."""
        self._module.register(begin, end - begin, name, access)

    def unregister_all(self) -> None:
        """Forget the tensors; call it between launches whose tensors may share memory over time."""
        self._module.unregister_all()
        self._kept.clear()

    def reset(self) -> None:
        """Forget tensors, reports and counters."""
        self._module.reset()
        self._kept.clear()

    def options(self, *, seed: int = 0, checks: bool = True, counters: bool = False, resident: int = 1) -> None:
        """``seed`` of the schedule (0: plain order); access checks; counters; blocks that run interleaved."""
        self._module.options(seed, checks, counters, resident)

    def launch(
        self, kernel: str, body: int, params: bytes, grid: Sequence[int], block: Sequence[int], shared_bytes: int = 0
    ) -> None:
        """Run the kernel whose ``simt::Body`` lies at address ``body``, with ``params`` as its parameters."""
        self._module.launch(kernel, body, params, tuple(grid), tuple(block), shared_bytes)

    @contextmanager
    def recording(self) -> Iterator[list[Recorded]]:
        """While it is active, CUDA kernels are not run; the list holds their launches at its end. No memory is touched,
        so tensors may be meta tensors of any size."""
        launches: list[Recorded] = []
        self._module.record(True)
        try:
            yield launches
        finally:
            launches += [Recorded(_function(*where[:2]), *how) for where, *how in self._module.launches()]
            self._module.record(False)

    def reports(self) -> list[Report]:
        """What was found since the last reset."""
        out = []
        for r in self._module.reports():
            file, line = _place(r.pop("place"))
            out.append(Report(**r, file=file, line=line))
        return out

    def counters(self) -> list[Counter]:
        """What was counted since the last reset."""
        out = []
        for c in self._module.counters():
            file, line = _place(c.pop("place"))
            out.append(Counter(**c, file=file, line=line))
        return out


@functools.cache
def runtime() -> Runtime:
    """The emulator, built if need be. RuntimeError says what is missing where it can't be."""
    path = library().parent / "_simt.so"
    spec = importlib.util.spec_from_file_location("_simt", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Runtime(module)
