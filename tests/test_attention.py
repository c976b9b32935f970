"""hhattn.attention: dense attention against the softmax formula, and its choice of library."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from conftest import NATIVE_ISAS
from helpers import DEVICE, assert_close_to_fp64, randn, strided
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import hhattn

pytestmark = pytest.mark.any_device


def formula(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, causal: bool = False) -> Tensor:
    """The definition with the whole score matrix, in the dtype of its inputs."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    if causal:
        queries, keys = (torch.arange(x.shape[1], device=x.device) for x in (q, k))
        late = keys > queries[:, None] + k.shape[1] - q.shape[1]
        scores = scores.masked_fill(late, float("-inf"))
    return torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(17, 17), (5, 23), (1, 9), (70, 150)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "dim_v"), [(2, 2, 40, 40), (6, 2, 112, 112), (2, 1, 64, 24)])
def test_accuracy(
    dtype: torch.dtype, causal: bool, queries: int, keys: int, heads: int, kv_heads: int, dim: int, dim_v: int
) -> None:
    q = randn(2, queries, heads, dim, dtype=dtype, seed=1)
    k, v = (randn(2, keys, kv_heads, d, dtype=dtype, seed=s) for s, d in ((2, dim), (3, dim_v)))
    out = hhattn.attention(q, k, v, scale=0.2, causal=causal)
    assert out.shape == (2, queries, heads, dim_v)
    assert out.is_contiguous()
    expected = formula(q.double(), k.double(), v.double(), 0.2, causal)
    assert_close_to_fp64(out, expected, formula(q, k, v, 0.2, causal))
    torch.testing.assert_close(hhattn.attention(strided(q), strided(k), strided(v), scale=0.2, causal=causal), out)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(7, 11), (70, 150)])
def test_gradients(queries: int, keys: int, causal: bool) -> None:
    q, k, v = (randn(1, s, h, 16, seed=s) for s, h in ((queries, 4), (keys, 2), (keys, 2)))
    grad_out = randn(1, queries, 4, 16, dtype=torch.float64)

    def gradients(run, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(run(*leaves, causal=causal), leaves, grad_out.to(dtype))

    expected, base = gradients(formula, torch.float64), gradients(formula, torch.float32)
    for a, b, c in zip(gradients(hhattn.attention, torch.float32), expected, base, strict=True):
        assert_close_to_fp64(a, b, c, factor=3)


def test_compiles_whole_and_on_meta() -> None:
    q, k = randn(1, 6, 4, 8), randn(1, 9, 2, 8)
    compiled = torch.compile(lambda q, k: hhattn.attention(q, k, k, causal=True), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k), hhattn.attention(q, k, k, causal=True))
    assert hhattn.attention(q.to("meta"), k.to("meta"), k.to("meta")).shape == (1, 6, 4, 8)


def test_autocast() -> None:
    q, k = randn(1, 6, 2, 8), randn(1, 6, 2, 8, dtype=torch.bfloat16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        out = hhattn.attention(q, k, k)
    torch.testing.assert_close(out, hhattn.attention(q.bfloat16(), k, k), rtol=0, atol=0)


@pytest.mark.cpu_only("the reason is that there is no GPU")
def test_flash_is_refused_with_its_reason() -> None:
    q = randn(1, 6, 2, 8)
    with hhattn.use_impl("flash"), pytest.raises(RuntimeError, match=r"flash-attn (is not installed|runs on CUDA)"):
        hhattn.attention(q, q, q)


@pytest.mark.cpu_only("the native library is for the CPU")
@pytest.mark.skipif(not NATIVE_ISAS, reason="the native library is not built")
def test_chooses_the_native_kernel_where_it_is_faster() -> None:
    q = randn(1, 300, 2, 8)
    few, long = q[:, :10], randn(1, 3000, 2, 8)
    with hhattn.use_impl("cpp"):
        hhattn.attention(q, q, q)
        for args, causal, why in (
            ((q.bfloat16(),) * 3, False, "matrix units"),
            ((few, few, few), False, "10 tokens"),
            ((q, q[:, :0], q[:, :0]), False, "k 0"),
            ((q, long, long), True, "8 times as many keys"),
            ((q.mT.contiguous().mT,) * 3, False, "last dim"),
        ):
            with pytest.raises(RuntimeError, match=why):
                hhattn.attention(*args, causal=causal)
        with pytest.raises(RuntimeError, match="compiled function"):
            torch.compile(hhattn.attention, backend="eager")(q, q, q)
        with pytest.raises(RuntimeError, match=r"torch.func"):
            torch.vmap(hhattn.attention)(q[None], q[None], q[None])


@pytest.mark.cpu_only("the native library is for the CPU")
def test_what_the_native_kernel_does_not_know_goes_to_sdpa() -> None:
    q = randn(3, 300, 2, 8)
    each = torch.vmap(hhattn.attention)(q[:, None], q[:, None], q[:, None])
    torch.testing.assert_close(each[:, 0], hhattn.attention(q, q, q))
    traced = torch.jit.trace(lambda x: hhattn.attention(x, x, x), q)
    torch.testing.assert_close(traced(q), hhattn.attention(q, q, q))
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(q)
        assert hhattn.attention(fake, fake, fake).shape == q.shape
    assert hhattn.attention(q, q[:, :0], q[:, :0]).shape == q.shape


@pytest.mark.cpu_only("the reason is that there is no GPU")
def test_flash_refuses_what_it_cannot_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the library there, a call it can't take is answered by a reason, and the automatic choice by SDPA."""
    from hhattn.ops.attention import flash_can_run

    module = types.ModuleType("flash_attn")
    module.__spec__ = types.SimpleNamespace(name="flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    q = randn(1, 6, 2, 8)
    assert "runs on CUDA" in flash_can_run(q, q, q)
    torch.testing.assert_close(hhattn.attention(q, q, q), formula(q, q, q))


Q = torch.zeros(2, 8, 4, 6)
REFUSED = [
    ({"q": Q[0]}, ValueError, "q must have 4 dimensions"),
    ({"q": Q.int()}, TypeError, "q must be float32"),
    ({"k": Q.half()}, TypeError, "k must have q's dtype"),
    ({"k": Q[:, :, :3], "v": Q[:, :, :3]}, ValueError, "multiple of k's 3 heads"),
    ({"k": Q[..., :4]}, ValueError, r"k must have shape \[B, Sk, H_kv, D\]"),
    ({"v": Q[:, :7]}, ValueError, r"v must have shape \[B, Sk, H_kv, Dv\]"),
    ({"v": Q.to("meta")}, ValueError, "v must be on the device of q"),
    ({"k": Q[:, :7], "v": Q[:, :7], "causal": True}, ValueError, "causal needs Sq <= Sk, got 8 and 7"),
]


@pytest.mark.cpu_only("arguments are refused before their device matters")
@pytest.mark.parametrize(
    ("changed", "error", "message"), REFUSED, ids=lambda x: "+".join(x) if isinstance(x, dict) else ""
)
def test_refuses(changed: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"q": Q, "k": Q, "v": Q} | changed
    with pytest.raises(error, match=message):
        hhattn.attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)
