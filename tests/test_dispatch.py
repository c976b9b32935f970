"""Which implementation runs: argument, context, environment, order of preference; refusals and their reasons."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

import hhattn
from hhattn import _dispatch

OP = "op_of_this_test"


@pytest.fixture(autouse=True)
def an_op(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An op with four implementations: one the machine can't run, one that takes small numbers, two that take all."""
    monkeypatch.delenv("HHATTN_IMPL", raising=False)
    _dispatch.register(OP, "reference")(lambda n: "reference")
    _dispatch.register(OP, "cpp", lambda n=0: "n is large" if n > 9 else None)(lambda n: "cpp")
    _dispatch.register(OP, "cuda", lambda n=0: "no GPU here")(lambda n: "cuda")
    _dispatch.register(OP, "flash")(lambda n: "flash")
    yield
    del _dispatch._registry[OP]
    _dispatch._logged.clear()


def test_first_that_accepts() -> None:
    assert _dispatch.call(OP, None, 1) == "cpp"
    assert _dispatch.call(OP, None, 10) == "reference"


def test_argument_over_context_over_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HHATTN_IMPL", "reference")
    assert _dispatch.call(OP, None, 1) == "reference"
    with hhattn.use_impl("flash"):
        assert _dispatch.call(OP, None, 1) == "flash"
        assert _dispatch.call(OP, "cpp", 1) == "cpp"
        with hhattn.use_impl(None):
            assert _dispatch.call(OP, None, 1) == "reference"
        assert _dispatch.call(OP, None, 1) == "flash"
    assert _dispatch.call(OP, None, 1) == "reference"


def test_context_ends_with_an_exception() -> None:
    with pytest.raises(KeyError), hhattn.use_impl("reference"):
        raise KeyError
    assert _dispatch.call(OP, None, 1) == "cpp"


def test_flash_is_never_chosen_unless_asked_for() -> None:
    assert "flash" not in {_dispatch.call(OP, None, n) for n in range(20)}


def test_an_explicit_choice_that_can_not_run_raises_its_reason() -> None:
    with pytest.raises(RuntimeError, match=r"impl='cpp' can't run this: n is large; can run it: reference, flash"):
        _dispatch.call(OP, "cpp", 10)
    with hhattn.use_impl("cuda"), pytest.raises(RuntimeError, match="use_impl='cuda' can't run this: no GPU here"):
        _dispatch.call(OP, None, 1)
    with pytest.raises(RuntimeError, match="impl='triton' has no such implementation; it has: reference, cpp, cuda"):
        _dispatch.call(OP, "triton", 1)


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="use_impl='fast': unknown implementation; accepted: cuda, triton, cpp"):
        hhattn.use_impl("fast").__enter__()
    monkeypatch.setenv("HHATTN_IMPL", "fast")
    with pytest.raises(ValueError, match="HHATTN_IMPL='fast'"):
        _dispatch.call(OP, None, 1)


def test_an_automatic_fallback_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hhattn"):
        for _ in range(3):
            _dispatch.call(OP, None, 10)
    messages = [r.getMessage() for r in caplog.records]
    assert messages == [f"hhattn.{OP}: cuda not used: no GPU here", f"hhattn.{OP}: cpp not used: n is large"]


def test_the_choice_is_traced() -> None:
    """A compiled model keeps obeying use_impl."""
    compiled = torch.compile(lambda x: hhattn.norm_modulate(x) + 1, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 8)
    for name in (None, "reference", None):
        with hhattn.use_impl(name):
            torch.testing.assert_close(compiled(x), hhattn.norm_modulate(x) + 1)
    with hhattn.use_impl("cuda"), pytest.raises(RuntimeError, match="cuda"):
        hhattn.norm_modulate(x)
