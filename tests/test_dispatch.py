"""Which implementation runs: argument, context, environment, order of preference; refusals and their reasons."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

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


def test_one_that_is_behind_leaves_the_call_to_a_later_one_but_the_reference() -> None:
    _dispatch.register(OP, "cuda", behind=lambda n: "n is odd" if n % 2 else None)(lambda n: "cuda")
    assert [_dispatch.call(OP, None, n) for n in (1, 2, 11)] == ["cpp", "cuda", "cuda"]
    assert _dispatch.call(OP, "cuda", 1) == "cuda"
    with hhattn.use_impl("cuda"):
        assert _dispatch.call(OP, None, 1) == "cuda"


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


def in_a_thread(run: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def test_each_thread_chooses_for_itself() -> None:
    inside, leave = threading.Event(), threading.Event()

    def other() -> str:
        with hhattn.use_impl("flash"):
            inside.set()
            leave.wait(10)
            return _dispatch.call(OP, None, 1)

    with ThreadPoolExecutor(1) as pool, hhattn.use_impl("reference"):
        theirs = pool.submit(other)
        assert inside.wait(10)
        assert _dispatch.call(OP, None, 1) == "reference"
        leave.set()
        assert theirs.result() == "flash"
        assert pool.submit(_dispatch.call, OP, None, 1).result() == "cpp"
        assert _dispatch.call(OP, None, 1) == "reference"


@pytest.fixture
def add_a_number() -> Iterator[Callable[[Tensor], Tensor]]:
    """An op whose result tells which implementation ran: automatic 1, reference 2."""
    _dispatch.register("add_a_number", "cpp")(lambda x: x + 1)
    _dispatch.register("add_a_number", "reference", transforms=True)(lambda x: x + 2)
    torch._dynamo.reset()
    yield lambda x: _dispatch.call("add_a_number", None, x)
    del _dispatch._registry["add_a_number"]


def test_a_compiled_function_follows_the_choice_around_its_call(add_a_number: Callable[[Tensor], Tensor]) -> None:
    compiled = torch.compile(add_a_number, fullgraph=True, backend="eager")
    x = torch.zeros(2)
    for name, expected in ((None, 1), ("reference", 2), ("cpp", 1), ("reference", 2), (None, 1)):
        with hhattn.use_impl(name):
            assert compiled(x)[0] == expected
            assert in_a_thread(lambda: compiled(x)[0]) == 1
    with hhattn.use_impl("cuda"), pytest.raises(RuntimeError, match="cuda"):
        compiled(x)


def test_a_compiled_function_may_choose_within(add_a_number: Callable[[Tensor], Tensor]) -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with hhattn.use_impl("reference"):
            inside = add_a_number(x)
            with hhattn.use_impl(None):
                nested = add_a_number(x)
        return inside, nested, add_a_number(x)

    compiled = torch.compile(f, fullgraph=True, backend="eager")
    assert [y[0].item() for y in compiled(torch.zeros(2))] == [2, 1, 1]
    with hhattn.use_impl("reference"):
        assert [y[0].item() for y in compiled(torch.zeros(2))] == [2, 1, 2]
    assert add_a_number(torch.zeros(2))[0] == 1


def test_a_function_is_compiled_for_the_environment(
    add_a_number: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = torch.compile(add_a_number, fullgraph=True, backend="eager")
    for name, expected in (("", 1), ("reference", 2), ("", 1)):
        monkeypatch.setenv("HHATTN_IMPL", name)
        torch.compiler.reset()
        assert compiled(torch.zeros(2))[0] == expected
        with hhattn.use_impl("cpp"):
            assert compiled(torch.zeros(2))[0] == 1


def dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, x))


DERIVATIVES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "grad": lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "vmap of grad": lambda f, x: torch.func.vmap(torch.func.grad(lambda y: f(y).sum()))(x),
    "dual": dual,
}


@pytest.mark.parametrize("take", DERIVATIVES.values(), ids=DERIVATIVES)
def test_derivatives_go_where_their_rule_is(take: Callable[..., object]) -> None:
    """An operator with a backward of its own has no rule for torch.func, and would lose the tangent of forward mode."""
    ran = []
    _dispatch.register(OP, "cpp")(lambda x: (ran.append("cpp"), x)[1])
    _dispatch.register(OP, "reference", transforms=True)(lambda x: (ran.append("reference"), x)[1])
    x = torch.ones(2, requires_grad=True)
    take(lambda y: _dispatch.call(OP, None, y), x.detach())
    assert ran == ["reference"]
    with pytest.raises(RuntimeError, match=r"impl='cpp' can't run this: .* no rule for torch\.func.*; can run it: ref"):
        take(lambda y: _dispatch.call(OP, "cpp", y), x.detach())
    torch.autograd.grad(_dispatch.call(OP, None, x).sum(), x)
    torch.func.vmap(lambda y: _dispatch.call(OP, None, y))(x)
    assert ran == ["reference", "cpp", "cpp"]
    del _dispatch._registry[OP]["reference"]
    with pytest.raises(RuntimeError, match=r"no implementation can run this call; .*cpp: .* no rule for torch\.func"):
        take(lambda y: _dispatch.call(OP, None, y), x.detach())


def test_compiled_derivatives_go_where_their_rule_is(add_a_number: Callable[[Tensor], Tensor]) -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tangent = torch.func.jvp(lambda y: add_a_number(y) * y, (x,), (torch.ones_like(x),))[1]
        return tangent, torch.func.grad(lambda y: (add_a_number(y) * y).sum())(x), add_a_number(x)

    results = torch.compile(f, fullgraph=True, backend="eager")(torch.ones(2))
    assert [y[0].item() for y in results] == [4, 4, 2]  # of (x + 2) x, twice, and x + 1


def test_the_choice_is_traced() -> None:
    """A compiled model keeps obeying use_impl."""
    compiled = torch.compile(lambda x: hhattn.norm_modulate(x) + 1, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 3, 8)
    for name in (None, "reference", None):
        with hhattn.use_impl(name):
            torch.testing.assert_close(compiled(x), hhattn.norm_modulate(x) + 1)
    with hhattn.use_impl("cuda"), pytest.raises(RuntimeError, match="cuda"):
        hhattn.norm_modulate(x)
