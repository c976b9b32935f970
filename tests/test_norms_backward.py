"""The native gradients of norm_modulate and qk_norm_rope: every instruction set and dtype, sums over pieces of the
work, any number of threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_norm_modulate
import test_qk_norm_rope
import torch
from conftest import NATIVE_ISAS
from helpers import assert_close_to_fp64, randn, strided
from torch import Tensor

import hhattn

pytestmark = pytest.mark.skipif(not NATIVE_ISAS, reason="the native library is not built")
Gradients = dict[str, Tensor]


def modulation(tokens: int, channels: int, rows: tuple[int, int, int], batch: int, shared: bool) -> dict[str, Tensor]:
    """Arguments whose scale, shift and gate have ``rows``; ``shared`` by the batch entries."""
    args = test_norm_modulate.arguments(batch, tokens, channels, 1)
    for i, (name, count) in enumerate(zip(("scale", "shift", "gate"), rows, strict=True)):
        args[name] = randn(1 if shared else batch, count, channels, seed=20 + i)
    return args


def check_modulate(args: dict[str, Tensor], norm: str) -> None:
    expected = test_norm_modulate.gradients(test_norm_modulate.eager, {n: t.double() for n, t in args.items()}, norm)
    baseline = test_norm_modulate.gradients(test_norm_modulate.eager, args, norm)
    actual = test_norm_modulate.gradients(lambda **a: hhattn.norm_modulate(**a, impl="cpp"), args, norm)
    for name, x in args.items():
        assert actual[name].dtype == x.dtype
        assert_close_to_fp64(actual[name], expected[name], baseline[name], factor=3, name=f"gradient of {name}")


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("channels", [1, 31, 64])
def test_modulation_on_each_instruction_set(isa: str, norm: str, channels: int, dtype: torch.dtype) -> None:
    """A frame's tokens are more than a piece of the work, and no multiple of it."""
    args = modulation(330, channels, (3, 3, 1), 2, False)
    check_modulate({n: t.to(dtype) for n, t in args.items()}, norm)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("rows", [(330, 330, 330), (165, 110, 66), (55, 330, 1), (11, 15, 2), (330, 6, 30)], ids=str)
def test_modulation_of_any_rows(rows: tuple[int, int, int], shared: bool) -> None:
    """Rows for one token, for a few within a piece, for many pieces, and mixtures; own or shared by the batch."""
    check_modulate(modulation(330, 40, rows, 3, shared), "layer")


def test_modulation_of_strided_and_mixed_inputs(isa: str) -> None:
    args = modulation(100, 70, (5, 2, 1), 2, False)
    args["residual"], args["gate"] = args["residual"].bfloat16(), args["gate"].half()
    args = {n: t.bfloat16() if n in ("x", "bias") else t for n, t in args.items()}
    expected = test_norm_modulate.gradients(lambda **a: hhattn.norm_modulate(**a, impl="reference"), args, "rms")

    def on_strides(**a: Any) -> Any:
        views = {n: strided(t, 1) if isinstance(t, Tensor) and t.ndim == 3 else t for n, t in a.items()}
        return tuple(strided(out, 1) for out in hhattn.norm_modulate(**views, impl="cpp"))

    actual = test_norm_modulate.gradients(on_strides, args, "rms")
    for name, x in args.items():
        close = {"rtol": 2e-2, "atol": 2e-2} if x.dtype != torch.float32 else {"rtol": 1e-4, "atol": 1e-3}
        torch.testing.assert_close(actual[name], expected[name], **close, msg=name)


def check_rope(args: dict[str, Any], **how: Any) -> None:
    expected = test_qk_norm_rope.gradients(test_qk_norm_rope.eager, test_qk_norm_rope.in_double(args), **how)
    baseline = test_qk_norm_rope.gradients(test_qk_norm_rope.eager, args, **how)
    actual = test_qk_norm_rope.gradients(lambda **a: hhattn.qk_norm_rope(**a, impl="cpp"), args, **how)
    for name, value in expected.items():
        assert_close_to_fp64(actual[name], value, baseline[name], factor=3, name=f"gradient of {name}")


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("rotate", ["interleaved", "half"])
@pytest.mark.parametrize("across_heads", [False, True])
def test_rotation_on_each_instruction_set(isa: str, rotate: str, across_heads: bool, dtype: torch.dtype) -> None:
    for dim, norm in ((2, "layer"), (10, "rms"), (64, "layer"), (112, "rms")):
        args = test_qk_norm_rope.arguments(2, 67, 4, 4, 2, dim, dtype, across_heads=across_heads)
        check_rope(args, rotate=rotate, norm=norm)


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("shape", [(1, 60, 1, 6), (3, 60, 1, 6), (1, 60, 4, 6), (3, 60, 4, 6)], ids=str)
@pytest.mark.parametrize("rotate", ["interleaved", "half"])
def test_tables_of_any_shape(rotate: str, shape: tuple[int, ...]) -> None:
    """Shared by the batch and the heads, or not; in tile order, with text before."""
    layout = hhattn.VideoLayout(3, 5, 4, tile=(2, 2, 3), text_len=7, text_first=True)
    args = test_qk_norm_rope.arguments(3, 60, 7, 4, 4, 6)
    args |= {"cos": randn(*shape, seed=3), "sin": randn(*shape, seed=4)}
    check_rope(args, rotate=rotate, text_first=True, layout=layout)


def test_strided_queries_and_their_gradients(isa: str) -> None:
    args = test_qk_norm_rope.arguments(2, 70, 0, 6, 6, 10)
    expected = test_qk_norm_rope.gradients(lambda **a: hhattn.qk_norm_rope(**a, impl="reference"), args)

    def on_strides(**a: Any) -> Any:
        views = a | {n: strided(a[n], 2) for n in "qk"} | {n: strided(a[n], 0) for n in ("cos", "sin")}
        return tuple(strided(out, 1) for out in hhattn.qk_norm_rope(**views, impl="cpp"))

    torch.testing.assert_close(test_qk_norm_rope.gradients(on_strides, args), expected, rtol=1e-4, atol=1e-4)


def test_what_needs_no_norm_keeps_infinities_apart() -> None:
    q = randn(1, 3, 2, 4)
    q[0, 1] = float("inf")
    q.requires_grad_()
    grad = torch.autograd.grad(hhattn.qk_norm_rope(q, q.detach(), None, None, norm=None, impl="cpp")[0].sum(), q)[0]
    torch.testing.assert_close(grad, torch.ones_like(q))


def test_a_bad_row_stays_alone() -> None:
    x = randn(1, 5, 40)
    x[0, 1, 3], x[0, 2, 4] = float("nan"), float("inf")
    grads = [
        torch.autograd.grad(hhattn.norm_modulate(y.requires_grad_(), impl="cpp").pow(2).sum(), y)[0]
        for y in (x, x[:, 3:])
    ]
    torch.testing.assert_close(grads[0][:, 3:], grads[1])
    assert grads[0][:, :1].isfinite().all()
    assert grads[0][:, 1].isnan().all()


def on_threads(run: Callable[[], tuple[Tensor, ...]]) -> None:
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 2):
        torch.set_num_threads(threads)
        results.append(run())
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("rows", [(1, 1, 1), (8, 2, 1), (2000, 500, 40)], ids=str)
def test_modulation_is_the_same_bits_on_any_number_of_threads(rows: tuple[int, int, int]) -> None:
    args = {n: t.requires_grad_() for n, t in modulation(2000, 33, rows, 2, rows[1] == 500).items()}

    def run() -> tuple[Tensor, ...]:
        y, r = hhattn.norm_modulate(**args, impl="cpp")
        return y, r, *torch.autograd.grad((y.pow(3) + r).sum(), list(args.values()))

    on_threads(run)


@pytest.mark.parametrize("across_heads", [False, True])
def test_rotation_is_the_same_bits_on_any_number_of_threads(across_heads: bool) -> None:
    args = test_qk_norm_rope.arguments(2, 1500, 0, 2, 2, 16, across_heads=across_heads)
    leaves = [t.requires_grad_() for t in args.values() if isinstance(t, Tensor)]

    def run() -> tuple[Tensor, ...]:
        q, k = hhattn.qk_norm_rope(**args, impl="cpp")
        return q, k, *torch.autograd.grad((q.pow(3) + k).sum(), leaves)

    on_threads(run)


def test_opcheck() -> None:
    args = [t.detach() for t in test_norm_modulate.arguments(tokens=6).values()]
    op = torch.ops.hhattn.norm_modulate_backward.default
    torch.library.opcheck(op, (args[0], args[5], *args, True, 1e-6))
    torch.library.opcheck(op, (args[0], None, args[0], *[None] * 6, False, 1e-6))
    a = test_qk_norm_rope.arguments(text=1)
    tensors = [a[n] if n[0] in "qk" else a[n][None, :, None] for n in test_qk_norm_rope.TENSORS]
    op = torch.ops.hhattn.qk_norm_rope_backward.default
    for tables in (True, False):
        torch.library.opcheck(op, (*tensors[:2], *tensors, 1, False, True, 1e-6, 1, torch.arange(12), tables))
    torch.library.opcheck(op, (*tensors[:2], *tensors[:2], *[None] * 6, 0, False, True, 1e-6, 0, None, True))


def test_native_operators_refuse_what_would_read_out_of_bounds() -> None:
    x, half = randn(1, 4, 8), randn(1, 4, 8).half()
    for dy, dr, residual in (
        (x[:, :3], None, None),
        (half, None, None),
        (x, x, None),
        (x, half, x),
        (x, x[..., :3], x),
    ):
        with pytest.raises(RuntimeError, match=r"dy|dr"):
            torch.ops.hhattn.norm_modulate_backward(dy, dr, x, None, None, None, None, residual, None, False, 1e-6)
    q, how = randn(2, 4, 1, 8), (1, False, True, 1e-6, 0, None, True)
    for grad in (q[:, :3], q[:1], q.half(), q[..., :4]):
        with pytest.raises(RuntimeError, match=r"gradient|dq or dk"):
            torch.ops.hhattn.qk_norm_rope_backward(q, grad, q, q, *[None] * 6, *how)


@pytest.mark.parametrize("compiled", [False, True])
def test_it_is_the_native_operator_that_runs(compiled: bool) -> None:
    """And not the reference, which is there for second derivatives."""
    x, q = randn(1, 4, 8).requires_grad_(), randn(1, 4, 2, 4).requires_grad_()

    def step(x: Tensor, q: Tensor) -> Tensor:
        return hhattn.norm_modulate(x, impl="cpp").sum() + sum(hhattn.qk_norm_rope(q, q, None, None, impl="cpp")).sum()

    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    with torch.profiler.profile() as profile:
        run(x, q).backward()
    names = {event.name for event in profile.events()}
    assert {"hhattn::norm_modulate_backward", "hhattn::qk_norm_rope_backward"} <= names


def test_tables_that_need_no_gradient_get_none() -> None:
    args = test_qk_norm_rope.arguments(affine=False)
    args["q"].requires_grad_()
    with torch.profiler.profile(record_shapes=True) as profile:
        hhattn.qk_norm_rope(**args, impl="cpp")[0].sum().backward()
    assert args["cos"].grad is None
    assert any(event.name == "hhattn::qk_norm_rope_backward" for event in profile.events())


def test_second_derivatives_of_the_rotation() -> None:
    args = test_qk_norm_rope.arguments(batch=1, text=2)
    grads = []
    for impl in ("cpp", "reference"):
        leaves = {n: a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for n, a in args.items()}
        tensors = [a for a in leaves.values() if isinstance(a, Tensor)]
        q, k = hhattn.qk_norm_rope(**leaves, text_first=True, impl=impl)
        first = torch.autograd.grad((q.pow(3) + 1).sum() + k.pow(2).sum(), tensors, create_graph=True)
        grads.append(torch.autograd.grad(sum(g.square().sum() for g in first), tensors))
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3)
