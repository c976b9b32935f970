"""What every op's Triton implementation shares: whether it can run, and its registration beside the native one."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "hhattn_triton"


emulated = False  # kernels run compiled, on a CPU: set while hhattn.simt.emulate is active
_INSTALLED = importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Kernels run in Triton's interpreter, on a CPU, for debugging. Triton reads the variable when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(x: Tensor | None) -> str | None:
    """None, or the reason why kernels can't run on ``x``, or, for None, on this machine at all."""
    if not _INSTALLED:
        return "triton is not installed: pip install triton"
    if interpreted():
        if x is not None and x.dtype == torch.bfloat16:
            return "Triton's interpreter (TRITON_INTERPRET=1) computes wrongly with bfloat16"
        return None
    if emulated:
        return None if x is None or x.device.type == "cpu" else f"x is on {x.device}; the emulator runs on CPU tensors"
    if x is None:
        return None if torch.cuda.is_available() else "no CUDA GPU here"
    return None if x.device.type == "cuda" else f"x is on {x.device}; triton runs on CUDA GPUs"


def kernels(op: str) -> Any:
    """The module ``hhattn.kernels.OP``, imported at the first call: Triton takes its time."""
    return importlib.import_module(f"hhattn.kernels.{op}")


def define(op: str, name: str, schema: str, fake: Callable[..., Any]) -> None:
    """Register ``torch.ops.hhattn_triton.NAME``, which calls NAME of ``hhattn.kernels.OP``; the schema is that of the
    native operator."""

    def call(*args: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, Tensor))
        # Triton launches on the current device, whatever the tensors' is
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return getattr(kernels(op), name)(*args)

    torch.library.define(f"{NAMESPACE}::{name}", schema)
    torch.library.impl(f"{NAMESPACE}::{name}", ("CUDA", "CPU"), call)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
