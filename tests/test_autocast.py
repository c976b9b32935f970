"""What autocast does to q, k and v: what torch's own attention does, for every op that takes them in one dtype."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from helpers import DEVICE, randn
from torch import Tensor

import hhattn

pytestmark = pytest.mark.any_device

MASK = hhattn.BlockMask.from_dense(torch.ones(1, 1, 6, 6, dtype=torch.bool, device=DEVICE), (4, 4))
OPS: dict[str, Callable[..., Tensor]] = {
    "attention": hhattn.attention,
    "block_sparse_attention": lambda q, k, v: hhattn.block_sparse_attention(q, k, v, MASK),
    "block_linear_attention": hhattn.block_linear_attention,
}
CHECKS_GRADIENTS = [name for name in OPS if name != "attention"]


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    return OPS[request.param]


def test_casts_float32_and_halves(op: Callable[..., Tensor]) -> None:
    q, k, v = randn(1, 6, 2, 8), randn(1, 6, 2, 8, dtype=torch.float16), randn(1, 6, 2, 8, dtype=torch.bfloat16)
    expected = op(q.bfloat16(), k.bfloat16(), v)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = op(q, k, v)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", CHECKS_GRADIENTS)
def test_leaves_float64(name: str) -> None:
    q = randn(1, 6, 2, 8, dtype=torch.float64)
    expected = OPS[name](q, q, q)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = OPS[name](q, q, q)
        with pytest.raises(TypeError, match=r"k must have q's dtype, .*float64, got torch.bfloat16"):
            OPS[name](q, q.float(), q)
    assert out.dtype == torch.float64
    torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.parametrize("bad", [torch.int64, torch.bool, torch.complex64, None], ids=str)
@pytest.mark.parametrize("at", ["q", "k", "v"])
def test_refuses_the_rest_by_name(op: Callable[..., Tensor], at: str, bad: torch.dtype | None) -> None:
    x = torch.ones(1, 6, 2, 8, device=DEVICE)
    arguments = {"q": x, "k": x, "v": x, at: x.tolist() if bad is None else x.to(bad)}
    for enabled in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=enabled), pytest.raises(TypeError, match=f"^{at} must be"):
            op(**arguments)
