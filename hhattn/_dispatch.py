"""Choose which implementation of an op runs.

Order of authority: ``impl=`` of the call, then :func:`use_impl`, then the environment variable ``HHATTN_IMPL``, then
the first implementation of :data:`ORDER` that accepts the call, unless it says itself that a later one is faster. An
explicit choice that cannot run raises with its reason; an automatic choice falls through and logs the reason once.

A compiled function chooses while it is traced. It is guarded by :func:`use_impl`, inside the function or around its
call, and by ``impl=``: under another choice it is traced again. Dynamo doesn't guard the environment: set HHATTN_IMPL
before the first call, for a function compiled under another value may keep it until ``torch.compiler.reset()``. What
``torch.export`` makes keeps its choice for good.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from hhattn import _transforms

log = logging.getLogger("hhattn")

ORDER = ("cuda", "triton", "cpp", "reference")
NAMES = (*ORDER, "flash")


def always(*_: Any, **__: Any) -> None:
    """``can_run`` of an implementation that takes every valid call."""


@dataclass(frozen=True)
class Impl:
    """One implementation of one op.

    ``can_run(*args, **kwargs)`` takes the arguments of ``fn`` and returns None, or the reason why it can't run them.
    Called without arguments by :func:`hhattn.info`, it must answer for this machine alone. ``transforms`` says that
    ``fn`` is made of torch's own functions, so that derivatives of every kind pass through it. ``behind``, of the
    arguments of a call that it can run, says why a later one of :data:`ORDER`, the reference excepted, is to be
    preferred where it can run too; an explicit choice doesn't ask.
    """

    op: str
    name: str
    fn: Callable[..., Any]
    can_run: Callable[..., str | None]
    transforms: bool = False
    behind: Callable[..., str | None] = always

    def refuses(self, *args: Any, **kwargs: Any) -> str | None:
        """None, or the reason why it can't run this call, here and now."""
        if not self.transforms and _transforms.derivative():
            return "it has a backward only, for torch.autograd, and no rule for torch.func's grad, vjp and jvp"
        return self.can_run(*args, **kwargs)


class _Forced(threading.local):
    """What :func:`use_impl` asks for in this thread. Not a context variable: Dynamo can't trace one, and would not see
    a compiled function's choice change. Set in ``__init__``, because Dynamo doesn't guard a default of the class."""

    def __init__(self) -> None:
        self.name: str | None = None


_registry: dict[str, dict[str, Impl]] = {}
_forced = _Forced()
_logged: set[tuple[str, str, str]] = set()


def register(
    op: str,
    name: str,
    can_run: Callable[..., str | None] = always,
    *,
    transforms: bool = False,
    behind: Callable[..., str | None] = always,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: make ``fn`` the implementation ``name`` of ``op``."""

    def add(fn: Callable[..., Any]) -> Callable[..., Any]:
        _registry.setdefault(op, {})[name] = Impl(op, name, fn, can_run, transforms, behind)
        return fn

    return add


def implementations(op: str | None = None) -> list[Impl]:
    """Every registered implementation (of ``op``), in order of preference."""
    ops = _registry if op is None else {op: _registry[op]}
    return [impls[n] for impls in ops.values() for n in NAMES if n in impls]


def _check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}={name!r}: unknown implementation; accepted: {', '.join(NAMES)} or None")
    return name


@contextmanager
def use_impl(name: str | None) -> Iterator[None]:
    """Within the block every hhattn op runs on implementation ``name`` ("reference", "cpp", "triton", "cuda", "flash";
    None restores the automatic choice). Raises ValueError for an unknown name, and the op raises if ``name`` can't run
    it.

    It holds in the thread that entered it, and in no other; HHATTN_IMPL is for all. Coroutines of one event loop share
    a thread: don't ``await`` within the block, or give ``impl=`` to the ops instead."""
    if name is not None:
        _check_name(name, "use_impl")
    before, _forced.name = _forced.name, name
    try:
        yield
    finally:
        _forced.name = before


def _log_fallback(op: str, name: str, reason: str) -> None:
    if torch.compiler.is_compiling() or (op, name, reason) in _logged:
        return
    _logged.add((op, name, reason))
    log.info("hhattn.%s: %s not used: %s", op, name, reason)


def call(op: str, impl: str | None, *args: Any, **kwargs: Any) -> Any:
    """Run ``op`` on the implementation that the rules above choose.

    Raises ValueError for an unknown implementation name, RuntimeError when an explicit choice can't run these
    arguments.
    """
    impls = _registry[op]
    chosen: str | None
    if impl is not None:
        chosen, source = _check_name(impl, "impl"), "impl"
    elif _forced.name is not None:
        chosen, source = _forced.name, "use_impl"
    else:
        env = os.environ.get("HHATTN_IMPL", "")
        chosen, source = (_check_name(env, "HHATTN_IMPL"), "HHATTN_IMPL") if env else (None, "")
    if chosen is not None:
        if chosen not in impls:
            raise RuntimeError(
                f"hhattn.{op}: {source}={chosen!r} has no such implementation; it has: {', '.join(impls)}"
            )
        if reason := impls[chosen].refuses(*args, **kwargs):
            others = [i.name for i in implementations(op) if i.name != chosen and i.refuses(*args, **kwargs) is None]
            raise RuntimeError(
                f"hhattn.{op}: {source}={chosen!r} can't run this: {reason}; can run it: {', '.join(others) or 'none'}"
            )
        return impls[chosen].fn(*args, **kwargs)
    reasons, spare = [], None
    for name in ORDER:
        if name not in impls:
            continue
        reason = impls[name].refuses(*args, **kwargs)
        if reason is None and spare is None and (reason := impls[name].behind(*args, **kwargs)):
            spare = impls[name]
        elif reason is None:
            return (spare if spare and name == "reference" else impls[name]).fn(*args, **kwargs)
        _log_fallback(op, name, reason)
        reasons.append(f"{name}: {reason}")
    if spare:
        return spare.fn(*args, **kwargs)
    raise RuntimeError(f"hhattn.{op}: no implementation can run this call; {'; '.join(reasons)}")
