"""Translated kernels, compiled into libraries that are kept, each found again by a hash of all it is made of."""

from __future__ import annotations

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path

from hhattn.simt import runtime
from hhattn.simt.translate import translate

# Running takes tens of milliseconds, compiling seconds: of a kernel of attention 1.4 s at -O0 and 5 at -O1.
FLAGS = (*runtime.FLAGS, "-w", "-O0", "-fno-strict-aliasing", "-fwrapv")


def library(ptx: str) -> Path:
    """The shared library of the kernel in ``ptx``, made unless it is there. RuntimeError with the compiler's words if
    that fails, PtxError if it can't be translated."""
    code = translate(ptx)
    made = runtime.cache_dir() / f"ptx-{runtime.digest(FLAGS, code, *runtime.headers(), str(runtime.library()))}.so"
    if made.exists():
        return made
    with tempfile.TemporaryDirectory(prefix="hhattn-simt-") as folder:
        source, working = Path(folder) / "kernel.cpp", Path(folder) / "kernel.so"
        source.write_text(code)
        command = [runtime.compiler(), *FLAGS, str(source), *runtime.link_flags(), "-o", str(working)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            kept = made.with_suffix(".cpp")
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(code)
            raise RuntimeError(f"the C++ of a kernel, kept as {kept}, doesn't compile:\n{done.stderr[:4000]}")
        runtime.install(working, made)
    return made


@functools.cache
def _loaded(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_LOCAL)


def load(ptx: str) -> int:
    """The address of the function that one thread of the kernel runs."""
    address = ctypes.cast(_loaded(library(ptx)).simt_kernel, ctypes.c_void_p).value
    assert address is not None
    return address
