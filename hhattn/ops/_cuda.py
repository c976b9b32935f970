"""What every op's CUDA implementation shares: whether it can run, and its operators' registration beside the native
ones. The kernels are ``csrc/cuda``'s, in the library ``hhattn._C_cuda``; while :func:`hhattn.simt.emulate` is active
they run on CPU tensors instead."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hhattn.simt.session import Session

NAMESPACE = "hhattn_cuda"

emulated: Session | None = None  # kernels run on a CPU: set while hhattn.simt.emulate is active


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("hhattn._C_cuda"), None
    except ModuleNotFoundError as error:
        if error.name == "hhattn._C_cuda":
            return (
                None,
                "the library of CUDA kernels is not built (no nvcc, or no CUDA torch when hhattn was installed)",
            )
        return None, f"the library of CUDA kernels is broken: {error}"
    except (ImportError, OSError, RuntimeError) as error:
        return None, f"the library of CUDA kernels could not be loaded: {error}"


_library = _load()  # not at the first call, which torch.compile may be tracing


def load() -> tuple[ModuleType | None, str | None]:
    """The library of CUDA kernels, or the reason why there is none."""
    return _library


def has_code(capability: tuple[int, int], archs: str) -> bool:
    """Whether a library that was compiled for ``archs`` ("80 90a 100") runs on a GPU. Code for 8.0 runs on every later
    8.x, that for 9.0a on 9.0 alone; there is no PTX, of which a driver could make code for others."""
    for arch in archs.split():
        of = divmod(int(arch.rstrip("af")), 10)
        if capability == of or (arch[-1] != "a" and capability[0] == of[0] and capability[1] > of[1]):
            return True
    return False


@functools.cache
def _no_code(device: int, archs: str) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    if has_code((major, minor), archs):
        return None
    return f"GPU {device} has compute capability {major}.{minor}; the CUDA kernels here were compiled for {archs}"


def why_not(x: Tensor | None) -> str | None:
    """None, or the reason why kernels can't run on ``x``, or, for None, on this machine at all."""
    if emulated is not None:
        return None if x is None or x.device.type == "cpu" else f"x is on {x.device}; the emulator runs on CPU tensors"
    module, reason = load()
    if module is None:
        return reason
    if x is None:
        return _no_code(torch.cuda.current_device(), module.archs) if torch.cuda.is_available() else "no CUDA GPU here"
    if x.device.type != "cuda":
        return f"x is on {x.device}; cuda runs on CUDA GPUs"
    return _no_code(torch.cuda.current_device() if x.device.index is None else x.device.index, module.archs)


def arch(x: Tensor) -> int:
    """The architecture that kernels run on where ``x`` is: 80 for sm_80, as the emulator plays it."""
    if emulated is not None:
        return emulated.arch
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def define(name: str, schema: str, fake: Callable[..., Any]) -> None:
    """Define ``torch.ops.hhattn_cuda.NAME``, with the native operator's schema. ``csrc/cuda/ops`` implements it, on
    CUDA tensors, and in a namespace of its own for the emulator's CPU tensors."""

    def emulate(*args: Any) -> Any:
        if emulated is None:
            raise RuntimeError(
                f"{NAMESPACE}::{name} runs on CUDA tensors, and on the CPU's within hhattn.simt.emulate()"
            )
        return emulated.call(name, args)

    torch.library.define(f"{NAMESPACE}::{name}", schema)
    torch.library.define(f"{NAMESPACE}_emulated::{name}", schema)
    torch.library.impl(f"{NAMESPACE}::{name}", "CPU", emulate)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
