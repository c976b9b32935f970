"""Fixtures that every test file may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

from hhattn import _ext, simt
from hhattn.ops import _triton

settings.register_profile("hhattn", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("hhattn")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NATIVE_ISAS = [] if _ext.why_missing() else [name for name, runs in _ext.library().cpu_isas() if runs]
IMPLS = ["reference", "cpp", "triton"]
SIMT = int(os.environ.get("HHATTN_SIMT", "0"))  # 80 or 90: Triton kernels compiled for it run on the emulator


def _runs_here(item: pytest.Item) -> bool:
    """Whether this machine can run it: tests of a GPU, of an implementation or a dtype that it can't are left out,
    instead of a page of skips."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        return False
    params = getattr(item, "callspec", None) and item.callspec.params
    if not params:
        return True
    if params.get("impl") == "cpp":
        return bool(NATIVE_ISAS)
    if params.get("impl") == "triton":  # on CPU tensors, that is
        if SIMT:
            return params.get("device") != "cuda"
        return _triton.interpreted() and _triton.why_not(torch.empty(0, dtype=params.get("dtype"))) is None
    return True


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    out = [item for item in items if not _runs_here(item)]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


@pytest.fixture(autouse=True)
def emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    """With HHATTN_SIMT, tests of Triton kernels run them on the emulator, in the order that HHATTN_SIMT_SEED shuffles,
    and fail on whatever it reports."""
    params = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if not SIMT or params.get("impl") != "triton":
        yield
        return
    with simt.emulate(SIMT, int(os.environ.get("HHATTN_SIMT_SEED", "0"))) as session:
        yield
        assert not session.reports, "\n".join(map(str, session.reports))


@pytest.fixture(autouse=True, scope="session")
def single_thread() -> None:
    """One thread, unless asked: tests are small, and several test runs may share the machine."""
    torch.set_num_threads(int(os.environ.get("HHATTN_TEST_THREADS", "1")))


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=NATIVE_ISAS or [pytest.param("none", marks=pytest.mark.skip(_ext.why_missing() or ""))])
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
