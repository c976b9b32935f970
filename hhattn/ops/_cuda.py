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
OLDEST = (8, 0)  # compute capability

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


@functools.cache
def _too_old(device: int) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= OLDEST:
        return None
    return (
        f"GPU {device} has compute capability {capability[0]}.{capability[1]}; the kernels need {OLDEST[0]}.{OLDEST[1]}"
    )


def why_not(x: Tensor | None) -> str | None:
    """None, or the reason why kernels can't run on ``x``, or, for None, on this machine at all."""
    if emulated is not None:
        return None if x is None or x.device.type == "cpu" else f"x is on {x.device}; the emulator runs on CPU tensors"
    if reason := load()[1]:
        return reason
    if x is None:
        return _too_old(torch.cuda.current_device()) if torch.cuda.is_available() else "no CUDA GPU here"
    if x.device.type != "cuda":
        return f"x is on {x.device}; cuda runs on CUDA GPUs"
    return _too_old(torch.cuda.current_device() if x.device.index is None else x.device.index)


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
