"""Build the native library ``hhattn._C``; everything else about the package is in pyproject.toml.

torch is never imported here: its headers and libraries are found on disk, in the environment being installed into, so
that a plain isolated ``pip install .`` uses the torch that is there. Where the library can't be built (or with
HHATTN_NATIVE=0) the package is installed pure Python, which works, slower; ``hhattn info`` tells. HHATTN_NATIVE=1 makes
that an error.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
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

    skipped: str | None = None  # why the library is not built

    def build_extension(self, ext: Extension) -> None:
        torch = torch_dir()
        self.skipped = self.why_not(torch)
        if torch and not self.skipped:
            try:
                self.build(ext, torch)
            except (CompilerFailed, CompileError, LinkError, OSError) as error:
                self.skipped = str(error)
        if reason := self.skipped:
            if os.environ.get("HHATTN_NATIVE") == "1":
                raise SystemExit(f"hhattn: HHATTN_NATIVE=1, but the native library can't be built: {reason}")
            print(f"\n*** hhattn: installing WITHOUT the native library: {reason}", file=sys.stderr)
            print("*** Everything works, on slower implementations; `hhattn info` shows which.\n", file=sys.stderr)

    def build(self, ext: Extension, torch: Path) -> None:
        """Compile and link, unless the library is newer than all it is made of."""
        target = self.get_ext_fullpath(ext.name)
        if not self.force and not newer_group([*ext.sources, *ext.depends], target, "newer"):
            return
        self.compiler.spawn = self.compiler.call = run_compiler  # the first before setuptools 84, the second since
        ext.extra_objects = self.compile_all(torch)
        ext.sources, ext.library_dirs, ext.libraries = [], [str(torch / "lib")], ["torch_cpu"]
        ext.extra_link_args = SANITIZE
        super().build_extension(ext)

    def get_outputs(self) -> list[str]:
        return [] if self.skipped else super().get_outputs()

    def get_output_mapping(self) -> dict[str, str]:
        return {} if self.skipped else super().get_output_mapping()

    def copy_extensions_to_source(self) -> None:
        if not self.skipped:
            super().copy_extensions_to_source()

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


def native() -> Extension:
    """The extension, with every file it depends on, so that an unchanged one isn't built again."""
    found = [p.relative_to(ROOT) for p in (ROOT / "csrc").rglob("*") if p.suffix in (".cpp", ".h")]
    files = sorted(str(p) for p in found if p.parts[1] != "simt")  # the emulator is for tests, and builds itself
    return Extension("hhattn._C", sources=[f for f in files if f.endswith(".cpp")], depends=files, language="c++")


setup(
    packages=[*find_packages(include=["hhattn", "hhattn.*"], exclude=["hhattn.simt"]), "hhattn.kernels"],
    package_dir={"hhattn.kernels": "kernels"},  # never a top-level `kernels`: another package has that name
    ext_modules=[native()],
    cmdclass={"build_ext": BuildNative},
)
