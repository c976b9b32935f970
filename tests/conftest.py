"""Fixtures that every test file may use."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import pkgutil
import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from helpers import DEVICE
from hypothesis import settings
from rich.console import Console

import hhattn
from hhattn import _dispatch, _ext, simt
from hhattn import ops as hhattn_ops
from hhattn.ops import _cuda, _triton

SIMT = int(os.environ.get("HHATTN_SIMT", "0"))  # 80 or 90: Triton kernels compiled for it run on the emulator
# on the emulator an example may have to be compiled
settings.register_profile("hhattn", deadline=None, derandomize=True, max_examples=2 if SIMT else 25)
settings.load_profile("hhattn")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NATIVE_ISAS = (
    [] if DEVICE != "cpu" or _ext.why_missing() else [name for name, runs in _ext.library().cpu_isas() if runs]
)
IMPLS = ["reference", "cpp", "triton", "cuda"]
OP_OF = {"test_masks_attention": "block_sparse_attention"}  # others by name

CUDA_HALF = {"test_block_sparse_attention"}  # tests of kernels that take float16 and bfloat16 alone


@functools.cache
def _cuda_runs(module: str) -> bool:
    """Whether CUDA kernels of the op that the module tests are there: on a GPU, or on the emulator."""
    for stem in pkgutil.iter_modules(hhattn_ops.__path__):
        importlib.import_module(f"hhattn.ops.{stem.name}")  # registers its implementations
    ops = {impl.op for impl in _dispatch.implementations() if impl.name == "cuda"}
    named = [impl.op for impl in _dispatch.implementations() if impl.op in module]
    op = OP_OF.get(module) or max(named, key=len, default=None)
    if DEVICE == "cuda":
        return op in ops and _cuda.why_not(None) is None
    return op in ops and not _triton.interpreted() and shutil.which(os.environ.get("CXX", "g++")) is not None


def _runs_here(item: pytest.Item) -> bool:
    """Whether it can be run here: tests of an implementation or a dtype that can't are left out, instead of a page of
    skips."""
    params = getattr(item, "callspec", None) and item.callspec.params
    if not params:
        return True
    if params.get("impl") == "cpp":
        return bool(NATIVE_ISAS)
    if params.get("impl") == "triton" and DEVICE == "cpu":
        if SIMT:
            return True
        return _triton.interpreted() and _triton.why_not(torch.empty(0, dtype=params.get("dtype"))) is None
    if params.get("impl") == "cuda":
        module = item.module.__name__.rpartition(".")[2]
        return _cuda_runs(module) and not (params.get("dtype") == torch.float32 and module in CUDA_HALF)
    return True


def pytest_configure() -> None:
    if DEVICE not in ("cpu", "cuda") or (DEVICE == "cuda" and not torch.cuda.is_available()):
        raise pytest.UsageError(f"HHATTN_TEST_DEVICE={DEVICE}: accepted are cpu and, where there is a GPU, cuda")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if DEVICE != "cpu" and (marker := item.get_closest_marker("cpu_only")):
            item.add_marker(pytest.mark.skip(reason=marker.args[0]))
    out = [item for item in items if not _runs_here(item)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


@pytest.fixture(autouse=True)
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """On a CPU, tests of CUDA kernels run them on the emulator, and so do tests of Triton kernels with HHATTN_SIMT, in
    the order that HHATTN_SIMT_SEED shuffles; they fail on whatever it reports."""
    impl = request.node.callspec.params.get("impl") if hasattr(request.node, "callspec") else None
    if DEVICE != "cpu" or not (impl == "cuda" or (impl == "triton" and SIMT)):
        yield
        return
    with simt.emulate(SIMT or 80, int(os.environ.get("HHATTN_SIMT_SEED", "1"))) as session:  # 0 is the plain order
        yield
        assert not session.reports, "\n".join(map(str, session.reports))


@pytest.fixture(params=[1, 2], ids="seed{}".format)
def any_order(request: pytest.FixtureRequest) -> Iterator[Any]:
    """Kernels run on the emulator, in one order and in another; what it reports, or that nothing ran, fails the
    test."""
    with simt.emulate(seed=request.param) as session:
        yield session
        assert session.launches
        assert not session.reports, "\n".join(map(str, session.reports))


@pytest.fixture(autouse=True)
def no_default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    """In tests that can be run on a GPU, tensors that nobody gave a device (helpers.DEVICE, or that of another tensor)
    lie on meta and don't mix with the rest: so a CPU shows what would be on the wrong device there. Not where
    something is compiled, since Dynamo can't trace all of torch under another default."""
    watched = DEVICE == "cpu" and request.node.get_closest_marker("any_device") and "compile" not in request.node.name
    with torch.device("meta") if watched else nullcontext():
        yield


@pytest.fixture(autouse=True, scope="session")
def single_thread() -> None:
    """One thread, unless asked: tests are small, and several test runs may share the machine."""
    torch.set_num_threads(int(os.environ.get("HHATTN_TEST_THREADS", "1")))


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=["automatic" if DEVICE == "cpu" else "reference", "triton"])
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """What the ops choose for CPU tensors, and Triton's kernels in the interpreter or the emulator; on a GPU, the
    reference and Triton's kernels."""
    with hhattn.use_impl(None if request.param == "automatic" else request.param):
        yield request.param


@pytest.fixture(
    params=NATIVE_ISAS or [pytest.param("none", marks=pytest.mark.skip(_ext.why_missing() or "the CPU's own"))]
)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set this CPU runs, in use for the time of the test."""
    _ext.library().use_cpu_isa(request.param)
    yield request.param
    _ext.library().use_cpu_isa("")


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from ``torch.empty`` and its kin is filled with NaN, so that whatever is left unwritten is seen. Native
    ops take their memory through the dispatcher; for those torch's own deterministic fill does the same."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args: Any, _original: Any = original, **kwargs: Any) -> torch.Tensor:
            out = _original(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        monkeypatch.setattr(owner, name, poisoned)
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Where models were tested, what was proved of which family."""
    stats = terminalreporter.stats
    outcomes = {r.nodeid: True for r in stats.get("passed", ()) if "test_models.py" in r.nodeid}
    outcomes |= {r.nodeid: False for kind in ("failed", "error") for r in stats.get(kind, ())}
    if not outcomes or importlib.util.find_spec("diffusers") is None:
        return
    from family_table import table
    from model_zoo import FAMILIES

    if made := table(outcomes, [family.name for family in FAMILIES]):
        Console(width=150).print(made)
