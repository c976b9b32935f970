"""A Triton launch, caught before it reaches a driver and bound exactly as Triton binds it: what the emulator runs,
and what the tests of compiled code look at. Needs triton; no GPU, no driver."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


@functools.cache
def _binder(kernel: JITFunction, arch: int) -> tuple[Any, Callable[..., Any]]:
    backend = make_backend(GPUTarget("cuda", arch, 32))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


@dataclass
class Launch:
    """One launch, as the host code makes it. Tensors may be meta tensors: of any size, at an aligned address."""

    kernel: JITFunction
    grid: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    _bound: dict[int, tuple[Any, Any, Any]] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def _bind(self, arch: int) -> tuple[dict[str, Any], Any, Any]:
        if arch not in self._bound:
            backend, binder = _binder(self.kernel, arch)
            bound, specialization, options = binder(*self.args, **self.options)
            packed = self.kernel._pack_args(backend, self.options, bound, specialization, options)
            self._bound[arch] = bound, specialization, packed
        return self._bound[arch]

    def bind(self, arch: int) -> tuple[Any, ...]:
        """Triton's specialization of the arguments, its options, the signature, the constants and the attributes."""
        _, specialization, packed = self._bind(arch)
        return specialization, *packed

    def key(self, arch: int = 80) -> str:
        """What Triton looks a compiled kernel up by: launches with one key share one compilation."""
        specialization, options, *_ = self.bind(arch)
        return f"{self.name} {specialization} {options}"

    def binary(self, arch: int) -> Any:
        """Triton's compiled kernel."""
        _, options, signature, constexprs, attrs = self.bind(arch)
        source = ASTSource(self.kernel, signature, constexprs, attrs)
        return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options.__dict__)

    def parameters(self, arch: int) -> list[tuple[str, str, Any]]:
        """What the compiled kernel takes, in order: name, Triton's type ("*bf16", "i64", ...), value."""
        bound, _, (_, signature, _, _) = self._bind(arch)
        return [(name, type_, bound[name]) for name, type_ in signature.items() if type_ != "constexpr"]

    def blocks(self) -> tuple[int, int, int]:
        """The grid, with all three dimensions."""
        grid = self.grid(self._bind(80)[0]) if callable(self.grid) else self.grid
        x, y, z = (*grid, 1, 1)[:3]
        return x, y, z


@contextmanager
def caught(handle: Callable[[Launch], None]) -> Iterator[None]:
    """While it is active, every launch is passed to ``handle`` instead of being run."""

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        handle(Launch(self, grid, args, options))

    with mock.patch.object(JITFunction, "run", run):
        yield
