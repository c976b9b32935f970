"""Build the native library ``hhattn._C``, and ``hhattn._C_cuda`` of the CUDA kernels; everything else about the package
is in pyproject.toml.

torch is never imported here: its headers and libraries are found on disk, in the environment being installed into, so
that a plain isolated ``pip install .`` uses the torch that is there. Where the library can't be built (or with
HHATTN_NATIVE=0) the package is installed pure Python, which works, slower; ``hhattn info`` tells. HHATTN_NATIVE=1 makes
that an error.

The CUDA library is built where nvcc and a CUDA torch are. HHATTN_CUDA=1 demands it, and builds it against a CPU torch
too, which proves the build: such a library lacks torch's stream and can't be loaded. HHATTN_CUDA=0 leaves it out.
HHATTN_CUDA_ARCHS="80 90a" narrows what it is compiled for.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError
from setuptools.modified import newer_group

ROOT = Path(__file__).parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
from build_backend import find_torch, is_usable  # noqa: E402  not installed, so its folder has to be named first

# Never -march=native: a wheel runs on other machines. Each set is one more compilation of csrc/cpu/kernels.cpp.
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
ISAS: dict[str, dict[str, list[str]]] = {
    "x86_64": {"baseline": [], "avx2x16": [*AVX2, "-DHHATTN_LANES=16"], "avx2": AVX2, "avx512": AVX512},
    "aarch64": {"neon": []},
}
MACHINE = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
FLAGS = ["-std=c++20", "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden"]
FLAGS += ["-Wall", "-Wno-psabi"]
FLAGS += ["-Wno-maybe-uninitialized"]  # GCC 12 warns inside its own avx512fintrin.h
# HHATTN_SANITIZE=address or thread: checked code, for `make asan` and `make tsan`.
SANITIZE = [f"-fsanitize={kind}" for kind in [os.environ.get("HHATTN_SANITIZE")] if kind]
FLAGS += [*SANITIZE, "-O1", "-g1", "-fno-omit-frame-pointer"] if SANITIZE else []
# What kernels are compiled for: code for 8.0 runs on 8.6 and 8.9 too, 10.0's on 10.3. csrc/cuda/*_sm90.cu is for 9.0a.
CUDA_ARCHS = ("80", "90a", "100", "120")
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]  # torch 2.10


def torch_dir() -> Path | None:
    """torch's folder in the environment being installed into, else in the build environment; None if there is none."""
    if torch := find_torch():
        return torch
    spec = importlib.util.find_spec("torch")
    torch = Path(spec.origin).parent if spec and spec.origin else None
    return torch if torch and is_usable(torch) else None


class CompilerFailed(Exception):
    """The last lines that the compiler said."""


def run_compiler(command: list[str], **settings: Any) -> None:
    """As setuptools runs it, but what it says is kept for :class:`CompilerFailed`."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False, **settings
    )
    print(done.stdout, end="", file=sys.stderr)
    if done.returncode:
        said = "\n".join(f"    {line}" for line in done.stdout.splitlines()[-12:])
        raise CompilerFailed(f"{command[0]} failed with exit code {done.returncode}; its last lines:\n{said}")


class BuildNative(build_ext):
    """Compile the CPU kernels once for each instruction set, several files at a time, and link everything into one
    library."""

    def build_extension(self, ext: Extension) -> None:
        torch = torch_dir()
        cuda = ext.name == CUDA_LIBRARY
        skipped = self.why_not(torch) or (why_no_cuda(torch) if cuda else None)
        if torch and not skipped:
            try:
                self.build(ext, self.compile_cuda if cuda else self.compile_all, torch)
            except (CompilerFailed, CompileError, LinkError, OSError) as error:
                skipped = str(error)
        if skipped:
            self.leave_out(ext, skipped)

    def leave_out(self, ext: Extension, reason: str) -> None:
        """Go on without the library, saying so; where it is demanded, stop."""
        self.extensions = [other for other in self.extensions if other is not ext]
        cuda = ext.name == CUDA_LIBRARY
        variable, what = ("HHATTN_CUDA", "library of CUDA kernels") if cuda else ("HHATTN_NATIVE", "native library")
        if os.environ.get(variable) == "1":
            raise SystemExit(f"hhattn: {variable}=1, but the {what} can't be built: {reason}")
        if cuda and reason == NO_CUDA:
            return  # as on most machines; `hhattn info` tells
        print(f"\n*** hhattn: installing WITHOUT the {what}: {reason}", file=sys.stderr)
        print("*** Everything works, on slower implementations; `hhattn info` shows which.\n", file=sys.stderr)

    def build(self, ext: Extension, compile_all: Callable[[Path], list[str]], torch: Path) -> None:
        """Compile and link, unless the library is newer than all it is made of."""
        target = self.get_ext_fullpath(ext.name)
        stamp = Path(self.build_temp) / f"{ext.name}.archs"
        archs = " ".join(wanted_archs()) if ext.name == CUDA_LIBRARY else ""
        same = not archs or (stamp.exists() and stamp.read_text() == archs)
        if not self.force and same and not newer_group([*ext.sources, *ext.depends], target, "newer"):
            return
        self.compiler.spawn = self.compiler.call = run_compiler  # the first before setuptools 84, the second since
        ext.extra_objects = compile_all(torch)
        ext.sources, ext.library_dirs, ext.libraries = [], [str(torch / "lib")], ["torch_cpu"]
        ext.extra_link_args = SANITIZE
        if ext.name == CUDA_LIBRARY:
            ext.library_dirs += cuda_libraries()
            ext.libraries += ["torch_cuda"] if has_cuda(torch) else []
            ext.libraries += ["cudart_static", "dl", "rt", "pthread"]
        super().build_extension(ext)
        if archs:
            stamp.write_text(archs)

    def why_not(self, torch: Path | None) -> str | None:
        if os.environ.get("HHATTN_NATIVE") == "0":
            return "HHATTN_NATIVE=0"
        if torch is None:
            return "torch >= 2.10 was not found, whose headers it needs"
        if importlib.util.find_spec("pybind11") is None:
            return "pybind11 was not found, whose headers it needs"
        if self.compiler.compiler_type != "unix":
            return f"it needs GCC or Clang, and the compiler here is of type {self.compiler.compiler_type!r}"
        command = (getattr(self.compiler, "compiler_so_cxx", None) or self.compiler.compiler_so)[0]
        return None if shutil.which(command) else f"no C++ compiler was found (looked for {command!r}; set CXX)"

    def compile_all(self, torch: Path) -> list[str]:
        import pybind11

        torch_flags = [*STABLE_ABI, "-isystem", str(torch / "include")]
        jobs = [("csrc/cpu/isa.cpp", "isa", []), ("csrc/python.cpp", "python", ["-isystem", pybind11.get_include()])]
        jobs += [(str(p.relative_to(ROOT)), p.stem, torch_flags) for p in sorted((ROOT / "csrc/ops").glob("*.cpp"))]
        for isa, flags in ISAS.get(MACHINE, {"baseline": []}).items():
            jobs.append(("csrc/cpu/kernels.cpp", isa, [*flags, f"-DHHATTN_ISA={isa}"]))

        def compile_one(job: tuple[str, str, list[str]]) -> list[str]:
            source, name, flags = job
            folder = os.path.join(self.build_temp, name)
            return self.compiler.compile([source], output_dir=folder, extra_postargs=[*FLAGS, *flags])

        with ThreadPoolExecutor(self.parallel or os.cpu_count() or 1) as pool:
            return [path for paths in pool.map(compile_one, jobs) for path in paths]

    def compile_cuda(self, torch: Path) -> list[str]:
        """Kernels by nvcc, bindings by the C++ compiler."""
        import pybind11

        archs = wanted_archs()
        nvcc = str(find_nvcc())
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        includes = ["-isystem", pybind11.get_include(), "-isystem", str(torch / "include")]
        includes += ["-isystem", str(cuda_home() / "include"), f'-DHH_ARCHS="{" ".join(archs)}"']

        def kernel(source: Path) -> str:
            wanted = [a for a in archs if a == "90a"] if source.stem.endswith("_sm90") else archs
            if not wanted:  # its launcher is called on sm_90 alone, but has to be there
                wanted = ["90a"]
            codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in wanted]
            made = str(folder / f"{source.stem}.o")
            compiler = [f"-ccbin={os.environ['CXX']}"] if os.environ.get("CXX") else []
            run_compiler([nvcc, *NVCC_FLAGS, *compiler, *codes, "-c", str(source), "-o", made])
            return made

        def binding(source: Path) -> str:
            flags = [*FLAGS, *STABLE_ABI, *includes]
            name = str(source.relative_to(ROOT))
            return self.compiler.compile([name], output_dir=str(folder), extra_postargs=flags)[0]

        bindings = [ROOT / "csrc/cuda/python.cpp", *sorted((ROOT / "csrc/cuda/ops").glob("*.cpp"))]
        with ThreadPoolExecutor(self.parallel or os.cpu_count() or 1) as pool:
            return [*pool.map(kernel, sorted((ROOT / "csrc/cuda").glob("*.cu"))), *pool.map(binding, bindings)]


# ---- CUDA
CUDA_LIBRARY = "hhattn._C_cuda"
NO_CUDA = "neither nvcc nor a torch for CUDA"


def find_nvcc() -> str | None:
    """nvcc of $CUDA_HOME, or on the path."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


@functools.cache
def cuda_home() -> Path:
    """CUDA's folder, of which nvcc knows where it is; what is on the path may be a link or a script."""
    nvcc = find_nvcc() or "nvcc"
    said = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True, check=False).stderr
    found = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return Path(found[1] if found else Path(nvcc).parents[1]).resolve()


def cuda_libraries() -> list[str]:
    """Folders in which the static runtime may be: a toolkit's own, those of a package of a distribution or of conda."""
    folders = [cuda_home() / name for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib")]
    return [str(folder) for folder in folders if (folder / "libcudart_static.a").exists()]


def has_cuda(torch: Path) -> bool:
    return (torch / "lib/libtorch_cuda.so").exists()


def other_cuda(torch: Path, nvcc: str) -> str | None:
    """What is wrong if nvcc's major version isn't that of the CUDA that torch was built with: nvcc's runtime is linked
    in, and two of different versions don't share a driver that fits the older one alone."""
    version = torch / "version.py"
    of_torch = re.search(r"^cuda\b[^=]*= '(\d+)\.", version.read_text() if version.exists() else "", re.MULTILINE)
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    of_nvcc = re.search(r"release (\d+)\.", said)
    if not of_torch or not of_nvcc or of_torch[1] == of_nvcc[1]:
        return None
    return (
        f"nvcc is CUDA {of_nvcc[1]}'s and torch CUDA {of_torch[1]}'s; set CUDA_HOME to a toolkit of CUDA {of_torch[1]}"
    )


def why_no_cuda(torch: Path | None) -> str | None:
    wanted = os.environ.get("HHATTN_CUDA", "")
    nvcc = find_nvcc()
    if wanted == "0":
        return "HHATTN_CUDA=0"
    if nvcc and torch and (wanted == "1" or has_cuda(torch)):
        return other_cuda(torch, nvcc)
    if torch and has_cuda(torch):
        return "nvcc was not found (on PATH, or in $CUDA_HOME/bin)"
    return NO_CUDA if not nvcc or not wanted else "torch was not found"


def wanted_archs() -> list[str]:
    """Those of $HHATTN_CUDA_ARCHS, or every one that can be."""
    return os.environ.get("HHATTN_CUDA_ARCHS", "").replace(",", " ").split() or known_archs()


def known_archs() -> list[str]:
    """Those of CUDA_ARCHS that this nvcc knows."""
    listed = subprocess.run(
        [str(cuda_home() / "bin/nvcc"), "--list-gpu-code"], capture_output=True, text=True, check=False
    )
    return [arch for arch in CUDA_ARCHS if f"sm_{arch}" in listed.stdout.split()]


def extensions() -> list[Extension]:
    """The libraries, each with every file it depends on, so that an unchanged one isn't built again."""
    suffixes = (".cpp", ".h", ".cu", ".cuh")
    files = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in suffixes)
    cuda = [f for f in files if Path(f).parts[1] == "cuda"]
    native = [f for f in files if Path(f).parts[1] not in ("cuda", "simt")]  # the emulator builds itself, for tests
    named = (("hhattn._C", native), (CUDA_LIBRARY, cuda))
    return [Extension(n, sources=[f for f in fs if f.endswith(".cpp")], depends=fs, language="c++") for n, fs in named]


setup(
    packages=[*find_packages(include=["hhattn", "hhattn.*"], exclude=["hhattn.simt"]), "hhattn.kernels"],
    package_dir={"hhattn.kernels": "kernels"},  # never a top-level `kernels`: another package has that name
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildNative},
)
