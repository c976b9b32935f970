"""The Triton kernels of sparse_linear_attention's linear branch, compiled for a GPU and executed thread by thread on a
CPU: nothing reported, the same bits whatever the order of warps, and within the accuracy rule of float64."""

from __future__ import annotations

from typing import Any

import pytest
import test_sparse_linear_attention as sparse
import torch
from helpers import assert_close_to_fp64, randn, strided
from torch import Tensor

pytest.importorskip("triton")

from test_simt_ops import Results, emulated

import hhattn
from hhattn import BlockMask
from hhattn.ops import _triton

pytestmark = pytest.mark.skipif(_triton.interpreted(), reason="the interpreter runs no PTX")

# Blocks that are whole, token by token and cut by the edge; heads that share keys, values of another width.
CASES: dict[str, dict[str, Any]] = {
    "odd-blocks": {"block": (24, 40), "tokens": (40, 95), "d": 40, "dv": 24},
    "all-others": {"block": (16, 16), "tokens": (20, 33), "d": 16, "dv": 16},
}


def results(case: str, dtype: torch.dtype, impl: str | None) -> Results:
    """out and gradients; without ``impl`` those of the dense formula."""
    (sq, sk), block = CASES[case]["tokens"], CASES[case]["block"]
    critical, marginal = sparse.random_classes(1, 2, sq, sk, block=block, tokens=0.3)
    shapes = [(1, sq, 2, CASES[case]["d"]), (1, sk, 1, CASES[case]["d"]), (1, sk, 1, CASES[case]["dv"])]
    leaves = [strided(randn(*shape, seed=i).to(dtype)).requires_grad_() for i, shape in enumerate(shapes)]
    if case == "all-others":
        marginal = ~critical
    else:
        critical = torch.zeros_like(critical)
    if impl:
        masks = [BlockMask.from_dense(x, block_size=block) for x in (critical, marginal)]
        out = hhattn.sparse_linear_attention(*leaves, masks[0], None if case == "all-others" else masks[1], impl=impl)
    else:
        out = torch.add(*sparse.branches(*leaves, critical, marginal))
    grads = torch.autograd.grad(out, leaves, randn(*out.shape, seed=9).to(out.dtype))
    return dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))


def check(actual: Results, case: str, dtype: torch.dtype) -> None:
    expected, baseline = results(case, torch.float64, None), results(case, dtype, None)
    for name, value in expected.items():
        factor = 2 if name == "out" else 3
        assert_close_to_fp64(actual[name], value, baseline[name], factor=factor, ulps=8, name=name)


USUAL = ("all-others", torch.bfloat16)  # the interpreter has none; the rest takes minutes
EVERY = [(case, dtype) for case in CASES for dtype in (torch.bfloat16, torch.float16, torch.float32)]


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize(
    ("case", "dtype"), [pair if pair == USUAL else pytest.param(*pair, marks=pytest.mark.slow) for pair in EVERY]
)
def test_sparse_linear_attention(case: str, dtype: torch.dtype) -> None:
    check(emulated(lambda: results(case, dtype, "triton")), case, dtype)


@pytest.mark.slow
@pytest.mark.usefixtures("poisoned_empty")
def test_sparse_linear_attention_on_sm90() -> None:
    check(emulated(lambda: results("odd-blocks", torch.bfloat16, "triton"), 90), "odd-blocks", torch.bfloat16)


@pytest.mark.usefixtures("poisoned_empty")
def test_infinities_meet_only_what_is_marginal_to_them() -> None:
    """The product with zeros and ones leaves out what a query block doesn't list, and passes on what it does."""
    keep = torch.zeros(1, 1, 32, 48, dtype=torch.bool)
    keep[..., :16, 16:] = keep[..., 16:, :32] = True
    q, k, v = (randn(1, n, 1, 16, dtype=torch.bfloat16, seed=i) for i, n in enumerate((32, 48, 48)))
    v[:, 40], k[:, 41] = torch.inf, torch.nan
    masks = [BlockMask.from_dense(x, block_size=(16, 16)) for x in (torch.zeros_like(keep), keep)]

    def call() -> dict[str, Tensor]:
        return {"out": hhattn.sparse_linear_attention(q, k, v, *masks, impl="triton")}

    out = emulated(call)["out"]
    clean = [x.clone() for x in (q, k, v)]
    clean[2][:, 40], clean[1][:, 41] = 0, 0
    expected = sum(sparse.branches(*(x.float() for x in clean), torch.zeros_like(keep), keep))
    assert not out[:, :16].isfinite().any()
    torch.testing.assert_close(out[:, 16:].float(), expected[:, 16:], rtol=0.02, atol=0.02)
