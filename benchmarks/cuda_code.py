"""CUDA sources compiled by nvcc without a GPU: what each kernel uses, and how long its loops hold each pipe of an SM.

    python benchmarks/cuda_code.py csrc/cuda/OP.cu                       every kernel in it, for A100
    python benchmarks/cuda_code.py FILE --arch 90a --kernel 'forward.*128' --shared 98304 -D NAME=VALUE
    python benchmarks/cuda_code.py FILE --instructions                   the loops' instructions too

Clocks are predictions of an uncalibrated model (docs/kernels.md), to compare two versions of a kernel with.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import sass
from gpu_model import GPUS, PARTS, PIPES, Occupancy, Work, occupancy

from hhattn.simt import runtime

CUDA = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
ARCHS = ("80", "86", "90a", "100a", "120")
#: As setup.py compiles them; ptxas says what it spills and what it can't overlap.
FLAGS = ("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v,-warn-spills", "-cubin")


def nvcc() -> str | None:
    """The compiler, or None: that of $CUDA_HOME, or on the path."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc", path=f"{home}/bin" if home else None) or shutil.which("nvcc")


@functools.cache
def nvcc_version() -> str:
    return subprocess.run([nvcc() or "nvcc", "--version"], capture_output=True, text=True, check=True).stdout


def _tool(name: str) -> str:
    """A tool of CUDA's: on the path, or the one that comes with Triton."""
    if found := shutil.which(name):
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def sources() -> list[Path]:
    """Every .cu of the project."""
    return sorted(CUDA.glob("*.cu"))


def archs(source: Path) -> tuple[str, ...]:
    """What a source is compiled for: `*_sm90.cu` has instructions that only sm_90a knows."""
    return ("90a",) if source.stem.endswith("_sm90") else ARCHS


#: What leaves the instantiations that most calls take, by the beginning of a source's name: quick to compile.
NARROW = {
    "block_sparse_attention_sm90": ("HH_ONE_SHAPE=hh::bf16,128,128,2",),
    "block_sparse_attention": ("HH_HEAD_DIMS=128", "HH_ONE_DTYPE=hh::bf16"),
    "block_linear_attention": ("HH_HEAD_DIMS=112",),
    "norm_modulate": ("HH_ONE_DTYPE=hh::bf16", "HH_VEC=8"),
    "qk_norm_rope": ("HH_ONE_DTYPE=hh::bf16",),
}


def narrow(source: Path) -> tuple[str, ...]:
    """The defines under which few kernels of a source are left; none for one that isn't listed."""
    return next((defines for begin, defines in NARROW.items() if source.stem.startswith(begin)), ())


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel. ``symbol`` is its mangled name, ``name`` the plain one, without parameters; ``threads`` a
    block by its launch bounds, 0 where it has none; ``static`` bytes of shared memory that no launch asks for."""

    symbol: str
    name: str
    arch: int
    registers: int
    stack: int
    static: int
    threads: int
    text: str = field(repr=False)

    @cached_property
    def instructions(self) -> list[sass.Instruction]:
        return sass.parse(self.text)

    @cached_property
    def spills(self) -> int:
        """Instructions that read or write local memory."""
        return sum(i.name in ("LDL", "STL") for i in self.instructions)

    def count(self, pattern: str) -> int:
        """Instructions whose opcode, with its modifiers, matches from its start."""
        return sum(bool(re.match(pattern, i.opcode)) for i in self.instructions)

    def occupancy(self, threads: int, dynamic: int) -> Occupancy:
        return occupancy(PARTS[self.arch], self.registers, self.static + dynamic, threads)


@dataclass(frozen=True)
class Code:
    """A compiled source: its kernels, and what the compiler said."""

    kernels: tuple[Kernel, ...]
    log: str

    @property
    def warnings(self) -> list[str]:
        return [line for line in self.log.splitlines() if re.search(r"\bwarning\b|serializ", line, re.I)]


def _demangled(names: Sequence[str]) -> list[str]:
    """Without return types, parameters, and what compilers spell differently."""
    out = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True).stdout.splitlines()
    return [plain_name(name) for name in out]


def plain_name(name: str) -> str:
    """`void ns::kernel<__nv_bfloat16, (int)128>(float*)` as `kernel<__nv_bfloat16,128>`."""
    name = re.sub(r"\(anonymous namespace\)::|\((?:int|unsigned int|bool|unsigned|long)\)", "", name)
    name = re.sub(r"\b(true|false)\b", lambda match: str(int(match[1] == "true")), name)
    depth, end = 0, len(name)
    for i, character in enumerate(name):  # the parameters' bracket is the first outside of <>
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            end = i
            break
    name = re.sub(r"\b(?:\w+::)+", "", name[:end]).removeprefix("void ")
    return re.sub(r"\s+|(?<=\d)u\b", "", name)


def _kernels(dump: str, arch: int) -> Iterator[Kernel]:
    """From the output of `cuobjdump -elf -res-usage -sass`."""
    usage = {
        name: {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
        for name, line in re.findall(r"^ Function (\S+?):\n(.*)$", dump, re.M)
    }
    bounds = {}
    for name, section in re.findall(r"^\.nv\.info\.(\S+)\n(.*?)(?=^\.\w|\Z)", dump, re.M | re.S):
        found = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+((?:0x[0-9a-f]+ ?)+)", section)
        threads = [int(n, 16) for n in found[1].split()] if found else [0]
        bounds[name] = threads[0] * (threads[1] * threads[2] if len(threads) == 3 else 1)
    parts = re.split(r"^\s*Function : (\S+)\n", dump, flags=re.M)
    bodies = dict(zip(parts[1::2], parts[2::2], strict=True))
    for name, plain in zip(bodies, _demangled(list(bodies)), strict=True):
        used = usage[name]
        static = max(0, used["SHARED"] - (1024 if arch >= 90 else 0))  # what the system keeps
        yield Kernel(name, plain, arch, used["REG"], used["STACK"], static, bounds.get(name, 0), bodies[name])


@functools.cache
def compiled(source: Path, arch: str, defines: tuple[str, ...] = ()) -> Code:
    """The source's kernels for sm_<arch>. Kept in the emulator's cache, by all that it is made of. RuntimeError with
    the compiler's words if it doesn't compile."""
    escaped = (define.replace(",", r"\,") for define in defines)  # nvcc takes a comma for the end of an option
    flags = (*FLAGS, f"-arch=sm_{arch}", *(f"-D{define}" for define in escaped))
    made = runtime.cache_dir() / f"nvcc-{runtime.digest(nvcc_version(), flags, *runtime.included(source))}"
    if not (made / "dump").exists():
        _compile(source, flags, made)
    number = int(re.sub(r"\D", "", arch))
    return Code(tuple(_kernels((made / "dump").read_text(), number)), (made / "log").read_text())


def _compile(source: Path, flags: Sequence[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="hhattn-nvcc-") as name:
        folder = Path(name)
        command = [nvcc() or "nvcc", *flags, "-o", str(folder / "cubin"), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"status {done.returncode} of\n{' '.join(command)}\n{done.stderr.strip()[-4000:]}")
        (folder / "log").write_text(done.stdout + done.stderr)
        dump = [_tool("cuobjdump"), "-elf", "-res-usage", "-sass", str(folder / "cubin")]
        (folder / "dump").write_text(subprocess.run(dump, capture_output=True, text=True, check=True).stdout)
        for file in ("log", "dump"):  # the dump last: it says that all is there
            runtime.install(folder / file, target / file)


def _clocks(body: list[sass.Instruction], warps: int, arch: int) -> str:
    """The pipes that a run holds, and the one that is held longest."""
    pipes = Work(body, [1.0] * len(body), warps, 1, 0).cycles(GPUS[arch])
    limit = max(pipes, key=lambda pipe: pipes[pipe])
    shown = "  ".join(f"{pipe} {pipes[pipe]:.0f}" for pipe in PIPES if pipes[pipe])
    return f"{shown}: bound by {limit}, tensor / {limit} = {pipes['tensor'] / pipes[limit]:.2f}"


def describe(kernel: Kernel, threads: int, warps: int, dynamic: int, instructions: bool) -> str:
    """A kernel and its hot loops in a few lines."""
    held = kernel.occupancy(threads, dynamic)
    out = [
        f"{kernel.name}  sm_{kernel.arch}: {kernel.registers} registers, {kernel.spills} spills, {threads} threads, "
        f"{(kernel.static + dynamic) / 1024:.3g} KiB, {held.blocks} blocks an SM ({held.limit}), "
        f"{len(kernel.instructions)} instructions"
    ]
    loops = sass.hot_loops(kernel.instructions) if kernel.arch in GPUS else []
    for n, loop in enumerate(loops):
        body, usual = ([kernel.instructions[i] for i in sorted(part)] for part in (loop.body, loop.usual))
        out.append(f"  loop {n} at {kernel.instructions[loop.start].address:#x}, {len(body)} instructions:")
        out.append(f"    {_clocks(body, warps, kernel.arch)}")
        if len(usual) < len(body):
            out.append(f"    the {len(usual)} that no branch leaves out: {_clocks(usual, warps, kernel.arch)}")
        out.append("    " + ", ".join(f"{n} {name}" for name, n in Counter(i.name for i in body).most_common(16)))
        if instructions:
            for i in sorted(loop.body):
                one, mark = kernel.instructions[i], " " if i in loop.usual else "?"
                out.append(f"    {one.address:05x} {mark}{one.predicate:5} {one.opcode} {one.operands}")
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--arch", action="append", choices=ARCHS, help="may be given again; default: 80 (sm90: 90a)")
    parser.add_argument("--kernel", default="", metavar="PATTERN", help="only kernels whose names hold this")
    parser.add_argument("--threads", type=int, default=0, help="of a block; default: the launch bounds")
    parser.add_argument("--warps", type=int, default=0, help="that run the loops; default: all of a block")
    parser.add_argument("--shared", type=int, default=0, metavar="BYTES", help="that the launch asks for")
    parser.add_argument("-D", dest="defines", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--instructions", action="store_true", help="list the loops' instructions")
    args = parser.parse_args()
    if nvcc() is None:
        parser.error("no nvcc on the path, nor in $CUDA_HOME/bin")
    for arch in args.arch or archs(args.source)[:1]:
        code = compiled(args.source, arch, tuple(args.defines))
        for kernel in code.kernels:
            if re.search(args.kernel, kernel.name):
                threads = args.threads or kernel.threads or 128
                warps = args.warps or math.ceil(threads / 32)
                print(describe(kernel, threads, warps, args.shared, args.instructions))
        for line in code.warnings:
            print(line, file=sys.stderr)


if __name__ == "__main__":
    main()
