"""What runs on this machine, and why the rest doesn't: ``hhattn.info()`` and ``hhattn info``."""

from __future__ import annotations

import importlib
import os
import pkgutil
import platform
from importlib import metadata
from typing import Any

import torch

from hhattn import _dispatch, _ext
from hhattn.ops import _cuda

PACKAGES = ("torch", "triton", "diffusers", "flash-attn", "av", "numpy")


class Info(dict[str, Any]):
    """The report as a dictionary of plain values (ready for JSON); printed, it is a table."""

    def __str__(self) -> str:
        lines = [f"hhattn {self['hhattn']}, Python {self['python']}, {self['platform']}"]
        lines += [f"  {name:<12}{version or 'not installed'}" for name, version in self["packages"].items()]
        cpu, gpu = self["cpu"], self["gpu"]
        lines.append(f"CPU: {cpu['machine']}, {cpu['threads']} threads")
        if cpu["reason"]:
            lines.append(f"  native kernels: none: {cpu['reason']}")
        else:
            lines.append(f"  native kernels: {cpu['isa']} in use")
            lines += [
                f"  {isa:<12}{'runs here' if ok else 'built; not on this CPU'}" for isa, ok in cpu["built"].items()
            ]
        lines.append(f"GPU: {gpu['name'] or 'none'}" + (f" (sm_{gpu['capability']})" if gpu["name"] else ""))
        cuda = self["cuda"]
        lines.append(
            f"  CUDA kernels: none: {cuda['reason']}" if cuda["reason"] else f"  CUDA kernels: {cuda['archs']}"
        )
        for op, impls in self["ops"].items():
            lines.append(op)
            lines += [f"  {name:<12}{reason or 'runs'}" for name, reason in impls.items()]
        return "\n".join(lines)

    __repr__ = __str__


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    reason = _ext.why_missing()
    report: dict[str, Any] = {"machine": platform.machine(), "threads": torch.get_num_threads(), "reason": reason}
    library = None if reason else _ext.library()
    report["isa"] = library.cpu_isa() if library else None
    report["built"] = dict(library.cpu_isas()) if library else {}
    report["cap"] = os.environ.get("HHATTN_CPU_ISA")
    return report


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {"name": None, "capability": None, "count": 0}
    major, minor = torch.cuda.get_device_capability()
    return {"name": torch.cuda.get_device_name(), "capability": f"{major}{minor}", "count": torch.cuda.device_count()}


def _cuda_kernels() -> dict[str, str | None]:
    """What the CUDA kernels are compiled for ("80 90a"), or the reason why there are none."""
    module, reason = _cuda.load()
    return {"archs": None if module is None else module.archs, "reason": reason}


def _ops() -> dict[str, dict[str, str | None]]:
    """For each op, each implementation with None, or the reason why it can't run on this machine."""
    package = importlib.import_module("hhattn.ops")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"hhattn.ops.{module.name}")
    table: dict[str, dict[str, str | None]] = {}
    for impl in _dispatch.implementations():
        table.setdefault(impl.op, {})[impl.name] = impl.can_run()
    return dict(sorted(table.items()))


def info() -> Info:
    """Versions, CPU instruction sets and the kernels built for them, GPU, and every implementation of every op with the
    reason where it can't run here.

    Returns an :class:`Info`: a dictionary with the keys ``hhattn``, ``python``, ``platform``, ``packages`` (name →
    version or None), ``cpu`` (``machine``, ``threads``, ``isa`` in use, ``built`` name → runs here, ``cap``,
    ``reason``), ``gpu`` (``name``, ``capability``, ``count``), ``cuda`` (``archs``, ``reason``) and
    ``ops`` (op → implementation → None or reason).
    """
    return Info(
        hhattn=importlib.import_module("hhattn").__version__,
        python=platform.python_version(),
        platform=platform.platform(),
        packages={name: _version(name) for name in PACKAGES},
        cpu=_cpu(),
        gpu=_gpu(),
        cuda=_cuda_kernels(),
        ops=_ops(),
    )
