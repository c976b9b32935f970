"""Sparse-linear attention: the numbers of both branches' dense formulas, gradients included, whatever the masks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from conftest import IMPLS
from helpers import DEVICE, assert_close_to_fp64, randn, strided
from hypothesis import given, settings
from hypothesis import strategies as st
from test_block_sparse_attention import on_device
from torch import Tensor

import hhattn
from hhattn import BlockMask, _ext, masks
from hhattn.ops.sparse_linear_attention import FEATURE_MAPS

pytestmark = pytest.mark.any_device
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MAPS = {
    "softmax": lambda x: x.softmax(-1),
    "elu1": lambda x: F.elu(x) + 1,
    "relu": torch.relu,
    "relu2": lambda x: torch.relu(x).square(),
}


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    with hhattn.use_impl(request.param):
        yield request.param


def branches(
    q: Tensor, k: Tensor, v: Tensor, critical: Tensor, marginal: Tensor, phi: str = "softmax", eps: float = 1e-15
) -> tuple[Tensor, Tensor]:
    """The definition, in the dtype of its inputs: both branches [B, S, H, Dv], for masks [B|1, H|1, Sq, Sk]."""
    rep = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(rep, 2) for x in (k, v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[-1] ** -0.5
    s = s.masked_fill(~critical, -math.inf)
    p = s.softmax(-1).masked_fill(~critical.any(-1, keepdim=True), 0)
    w = torch.einsum("bqhd,bkhd->bhqk", MAPS[phi](q), MAPS[phi](k)).masked_fill(~marginal, 0)
    total = w.sum(-1, keepdim=True)
    w = w / (total.masked_fill(total == 0, math.inf) + eps)
    return torch.einsum("bhqk,bkhd->bqhd", p, v), torch.einsum("bhqk,bkhd->bqhd", w, v)


def random_classes(*shape: int, block: tuple[int, int], seed: int = 0, tokens: float = 0.1) -> tuple[Tensor, Tensor]:
    """Critical and marginal pairs [..., Sq, Sk], block by block, a quarter and a half of all; the share ``tokens`` of
    the blocks token by token."""
    *lead, sq, sk = shape
    g = torch.Generator().manual_seed(seed)
    nq, nk = -(-sq // block[0]), -(-sk // block[1])

    def wide(x: Tensor) -> Tensor:
        return x.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., :sq, :sk]

    by_block, of_block, by_token = (
        torch.rand(*lead, *size, generator=g, device="cpu") for size in ((nq, nk), (nq, nk), (sq, sk))
    )
    draw = torch.where(wide(of_block < tokens), by_token, wide(by_block)).to(DEVICE)
    return draw < 0.25, (draw >= 0.25) & (draw < 0.75)


def compare_with_formula(
    critical: Tensor, marginal: Tensor, block: tuple[int, int], inputs: list[Tensor], phi: str = "softmax"
) -> None:
    """out and the gradients of q, k and v against float64. Both branches must show: the linear one counts twice."""
    pair = [BlockMask.from_dense(x, block_size=block) for x in (critical, marginal)]
    q, v = inputs[0], inputs[2]
    upstream = randn(*q.shape[:3], v.shape[3], seed=9)
    results = {}
    for name, cast in (("ours", q.dtype), ("expected", torch.float64), ("baseline", q.dtype)):
        leaves = [x.detach().to(cast).requires_grad_() for x in inputs]
        if name == "ours":
            leaves = [x.detach().requires_grad_() for x in inputs]  # with their strides
            gate = torch.full(q.shape[:3], 2.0, device=DEVICE)
            out = hhattn.sparse_linear_attention(*leaves, *pair, gate=gate, feature_map=phi)
        else:
            s, l = branches(*leaves, critical, marginal, phi)  # noqa: E741
            out = s + 2 * l
        results[name] = [out, *torch.autograd.grad(out, leaves, upstream.to(cast))]
    for i, part in enumerate(("out", "dq", "dk", "dv")):
        ours, expected, baseline = (results[n][i] for n in ("ours", "expected", "baseline"))
        assert_close_to_fp64(ours, expected, baseline, factor=2 if i < 1 else 3, ulps=8, name=part)


@pytest.mark.usefixtures("impl", "poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("b", "sq", "sk", "h", "h_kv", "d", "dv", "block"),
    [
        (1, 70, 70, 2, 2, 40, 40, (16, 16)),
        (2, 33, 60, 2, 1, 64, 24, (16, 32)),
        (1, 1, 50, 1, 1, 112, 112, (16, 16)),
        (1, 33, 65, 3, 1, 256, 16, (32, 16)),
        (1, 50, 47, 2, 1, 12, 20, (24, 40)),
    ],
)
def test_forward_and_gradients(
    dtype: torch.dtype, b: int, sq: int, sk: int, h: int, h_kv: int, d: int, dv: int, block: tuple[int, int]
) -> None:
    classes = random_classes(1, 1, sq, sk, block=block)
    shapes = [(b, sq, h, d), (b, sk, h_kv, d), (b, sk, h_kv, dv)]
    compare_with_formula(*classes, block, [randn(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)])


@pytest.mark.usefixtures("impl", "poisoned_empty")
@pytest.mark.parametrize("tokens", [0, 0.3])
def test_masks_by_batch_and_head_strides_and_grouped_keys(tokens: float) -> None:
    classes = random_classes(2, 4, 44, 60, block=(16, 8), tokens=tokens)
    for mask in classes:
        mask[:, 1, 16:] = False  # a whole block of rows, and the last, ragged one, without any
    shapes = [(2, 44, 4, 16), (2, 60, 2, 16), (2, 60, 2, 24)]
    compare_with_formula(*classes, (16, 8), [strided(randn(*shape, seed=i)) for i, shape in enumerate(shapes)])


@pytest.mark.usefixtures("isa", "poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("block", "d", "dv"), [((64, 128), 64, 64), ((24, 200), 33, 7), ((7, 5), 16, 48), ((16, 8), 3, 80)], ids=str
)
def test_every_instruction_set(dtype: torch.dtype, block: tuple[int, int], d: int, dv: int) -> None:
    """Blocks smaller than a vector and larger, fewer and more of them than are summed at once, many columns of v and a
    part of a vector; masks for each batch entry and head, heads that share keys, strided inputs."""
    classes = random_classes(2, 4, 150, 630, block=block)
    shapes = [(2, 150, 4, d), (2, 630, 2, d), (2, 630, 2, dv)]
    inputs = [strided(randn(*shape, dtype=dtype, seed=i)) for i, shape in enumerate(shapes)]
    compare_with_formula(*classes, block, inputs)


@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("phi", FEATURE_MAPS)
def test_feature_maps(phi: str) -> None:
    classes = random_classes(1, 2, 40, 40, block=(8, 8))
    compare_with_formula(*classes, (8, 8), [randn(1, 40, 2, 16, seed=i) for i in range(3)], phi)


def whole(value: bool, q_len: int, k_len: int, block: int = 32) -> BlockMask:
    blocks = torch.full((1, 1, -(-q_len // block), -(-k_len // block)), value, device=DEVICE)
    return BlockMask.from_blocks(blocks, block_size=(block, block), q_len=q_len, k_len=k_len)


@pytest.mark.usefixtures("impl")
def test_all_critical_is_dense_attention() -> None:
    q, k, v = (randn(2, n, h, 32, seed=i) for i, (n, h) in enumerate(((70, 4), (90, 2), (90, 2))))
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=True).transpose(1, 2)
    for marginal in (None, whole(False, 70, 90)):
        out = hhattn.sparse_linear_attention(q, k, v, whole(True, 70, 90), marginal)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("phi", FEATURE_MAPS)
def test_all_marginal_is_linear_attention(phi: str, impl: str) -> None:
    n = 40 if impl == "triton" else 90  # the interpreter is slow
    leaves = [randn(1, n, h, 32, seed=i).requires_grad_() for i, h in enumerate((4, 2, 2))]
    upstream = randn(1, n, 4, 32, seed=3)
    linear = hhattn.block_linear_attention(*leaves, feature_map=phi)
    expected = [linear, *torch.autograd.grad(linear, leaves, upstream)]
    for marginal in (None, whole(True, n, n)):
        out = hhattn.sparse_linear_attention(*leaves, whole(False, n, n), marginal, feature_map=phi)
        ours = [out, *torch.autograd.grad(out, leaves, upstream)]
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("tokens", [0, 0.3])
def test_without_a_marginal_mask_all_that_is_not_critical_is_marginal(tokens: float) -> None:
    critical, _ = random_classes(1, 2, 44, 60, block=(16, 16), tokens=tokens)
    mask = BlockMask.from_dense(critical, block_size=(16, 16))
    leaves = [randn(1, n, 2, 16, seed=i).requires_grad_() for i, n in enumerate((44, 60, 60))]
    upstream = randn(1, 44, 2, 16, seed=3)
    outs = [hhattn.sparse_linear_attention(*leaves, mask, marginal) for marginal in (None, ~mask)]
    torch.testing.assert_close(*outs)
    for a, b in zip(*(torch.autograd.grad(out, leaves, upstream) for out in outs), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.usefixtures("impl")
def test_a_pair_in_both_masks_counts_in_both_branches() -> None:
    """The published code's linear branch sums over every key, the critical ones too, and adds 1e-5."""
    critical, _ = random_classes(1, 1, 60, 60, block=(16, 16), tokens=0)
    critical[..., 0] = True
    q, k, v = (randn(1, 60, 2, 16, seed=i) for i in range(3))
    proj = randn(16, 16, seed=4) / 4
    ours = hhattn.sparse_linear_attention(
        q, k, v, BlockMask.from_dense(critical, block_size=(16, 16)), whole(True, 60, 60, 16), proj=proj, eps=1e-5
    )
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    sparse = F.scaled_dot_product_attention(*heads, attn_mask=critical)
    phi_q, phi_k = (x.softmax(-1) for x in heads[:2])
    linear = phi_q @ (phi_k.mT @ heads[2]) / (1e-5 + (phi_q * phi_k.sum(-2, keepdim=True)).sum(-1, keepdim=True))
    expected = (sparse + F.linear(linear, proj)).transpose(1, 2)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("phi", FEATURE_MAPS)
def test_gradcheck(phi: str) -> None:
    critical, marginal = random_classes(1, 2, 9, 11, block=(4, 8), tokens=0.3)
    critical[:, :, 4], marginal[:, 0, 5] = False, False
    pair = [BlockMask.from_dense(x, block_size=(4, 8)) for x in (critical, marginal)]
    shapes = [(1, 9, 2, 4), (1, 11, 1, 4), (1, 11, 1, 3), (2, 3, 3), (2,), (1, 9, 2)]
    leaves = [randn(*shape, dtype=torch.float64, seed=i).requires_grad_() for i, shape in enumerate(shapes)]

    def f(q: Tensor, k: Tensor, v: Tensor, proj: Tensor, alpha: Tensor, gate: Tensor) -> Tensor:
        return hhattn.sparse_linear_attention(q, k, v, *pair, proj=proj, alpha=alpha, gate=gate, feature_map=phi)

    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize(
    ("proj", "alpha", "gate"),
    [
        ((24, 24), None, None),
        ((4, 24, 24), 0.25, None),
        (None, (), (2, 40, 4)),
        (None, (4,), (2, 40, 4, 24)),
        ((4, 24, 24), (2, 40, 4), (2, 40, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_combiners(
    proj: tuple[int, ...] | None, alpha: object, gate: tuple[int, ...] | None, dtype: torch.dtype, impl: str
) -> None:
    if impl == "triton" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no bfloat16")
    classes = random_classes(1, 4, 40, 40, block=(8, 8))
    q, k, v = (randn(2, 40, 4, n, dtype=dtype, seed=i) for i, n in enumerate((16, 16, 24)))
    weight = None if proj is None else randn(*proj, seed=5) / 4
    share = randn(1, *alpha, seed=6)[0] if isinstance(alpha, tuple) else alpha
    gates = None if gate is None else randn(*gate, seed=7)
    pair = [BlockMask.from_dense(x, block_size=(8, 8)) for x in classes]
    ours = hhattn.sparse_linear_attention(q, k, v, *pair, proj=weight, alpha=share, gate=gates)
    results = []
    for cast in (torch.float64, dtype):
        s, l = branches(*(x.to(cast) for x in (q, k, v)), *classes)  # noqa: E741
        if weight is not None:
            l = torch.einsum("bshd,...hed->bshe", l, weight.expand(4, 24, 24).to(cast))  # noqa: E741
        if gates is not None:
            l = l * gates.reshape(2, 40, 4, -1).to(cast)  # noqa: E741
        if share is None:
            results.append(s + l)
            continue
        row = share if isinstance(share, float) else share[..., None].to(cast)
        results.append(row * s + (1 - row) * l)
    assert ours.dtype == dtype
    assert_close_to_fp64(ours, *results, ulps=8)


@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tokens", [0, 0.3])
def test_what_stands_at_negligible_positions_does_not_matter(poison: float, tokens: float) -> None:
    classes = random_classes(1, 2, 48, 64, block=(16, 16), tokens=tokens)
    gone = torch.zeros(64, dtype=torch.bool, device=DEVICE)
    gone[[3, 40]] = True
    gone[16:32] = True  # a whole block
    for mask in classes:
        mask[..., gone] = False
    pair = [BlockMask.from_dense(x, block_size=(16, 16)) for x in classes]
    q, k, v = (randn(1, n, 2, 8, seed=i) for i, n in enumerate((48, 64, 64)))
    clean = [x.clone().requires_grad_() for x in (q, k, v)]
    k[:, gone], v[:, gone] = poison, poison
    dirty = [x.clone().requires_grad_() for x in (q, k, v)]
    outs = [hhattn.sparse_linear_attention(*x, *pair) for x in (clean, dirty)]
    torch.testing.assert_close(outs[1], outs[0])
    grads = [list(torch.autograd.grad(o.sum(), x)) for o, x in zip(outs, (clean, dirty), strict=True)]
    for a, b in zip(*grads, strict=True):
        b = b.where(~gone[:, None, None], 0) if b.shape[1] == 64 else b
        torch.testing.assert_close(b, a)


@pytest.mark.skipif(_ext.why_missing() is not None, reason=_ext.why_missing() or "")
@pytest.mark.cpu_only("native kernels")
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("tokens", [0, 0.3])
def test_natively_such_tokens_have_no_gradient(poison: float, tokens: float) -> None:
    """Queries and keys that meet nothing: outputs and gradients there are 0, whatever stands there."""
    classes = random_classes(1, 4, 48, 64, block=(16, 16), tokens=tokens)
    gone_q, gone_k = (torch.zeros(n, dtype=torch.bool, device=DEVICE) for n in (48, 64))
    gone_q[16:32] = gone_q[5] = gone_k[[3, 40]] = gone_k[16:32] = True
    for mask in classes:
        mask[..., gone_k] = False
        mask[:, :, gone_q] = False
    pair = [BlockMask.from_dense(x, block_size=(16, 16)) for x in classes]
    q, k, v = randn(1, 48, 4, 8), randn(1, 64, 2, 8, seed=1), randn(1, 64, 2, 8, seed=2)
    clean = [x.clone().requires_grad_() for x in (q, k, v)]
    q[:, gone_q] = k[:, gone_k] = v[:, gone_k] = poison
    dirty = [x.clone().requires_grad_() for x in (q, k, v)]
    outs = [hhattn.sparse_linear_attention(*x, *pair, impl="cpp") for x in (clean, dirty)]
    torch.testing.assert_close(outs[1], outs[0])
    assert not outs[1][:, gone_q].any()
    grads = [torch.autograd.grad(o.square().sum(), x) for o, x in zip(outs, (clean, dirty), strict=True)]
    for a, b, gone in zip(*grads, (gone_q, gone_k, gone_k), strict=True):
        torch.testing.assert_close(b, a)
        assert not b[:, gone].any()


@pytest.mark.usefixtures("impl")
def test_queries_of_neither_branch_give_zero_and_no_gradient() -> None:
    critical, marginal = random_classes(1, 1, 40, 40, block=(8, 8))
    critical[..., 7, :], marginal[..., 7, :] = False, False
    critical[..., 16:24, :] = False  # linear alone
    marginal[..., 24:32, :] = False  # softmax alone
    critical[..., 32:, :], marginal[..., 32:, :] = False, False
    q, k, v = (randn(1, 40, 2, 16, seed=i).requires_grad_() for i in range(3))
    pair = [BlockMask.from_dense(x, block_size=(8, 8)) for x in (critical, marginal)]
    for eps in (1e-15, 0.0):
        out = hhattn.sparse_linear_attention(q, k, v, *pair, eps=eps)
        empty = ~(critical | marginal)[0, 0].any(-1)
        assert (out[:, empty] == 0).all()
        assert out.isfinite().all()
        upstream = torch.where(empty[:, None, None], math.nan, randn(1, 40, 2, 16, seed=4))
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), upstream.nan_to_num(1e30))
        assert (dq[:, empty] == 0).all()
        assert all(g.isfinite().all() for g in (dq, dk, dv))


@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("eps", [1e-15, 0.0])
def test_queries_whose_weights_are_all_zero_give_zero(eps: float) -> None:
    """ReLU of what is negative: 0 / 0, unless somebody looks."""
    q, k, v = (randn(1, 32, 2, 8, seed=i) for i in range(3))
    q[:, 5] = -1
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = hhattn.sparse_linear_attention(*leaves, whole(False, 32, 32, 16), feature_map="relu", eps=eps)
    assert (out[:, 5] == 0).all()
    grads = torch.autograd.grad(out.sum(), leaves)
    assert (grads[0][:, 5] == 0).all()
    assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.usefixtures("impl")
def test_order_is_converted() -> None:
    layout = hhattn.VideoLayout(3, 7, 9, tile=(1, 4, 4))
    pairs = {
        order: [
            on_device(lambda w=window, o=order: masks.sliding_tile(layout, w, block_size=(16, 16), order=o))
            for window in ((1, 1, 3), (3, 1, 3))
        ]
        for order in ("raster", "tile")
    }
    q, k, v = (randn(1, layout.seq_len, 2, 16, seed=i) for i in range(3))
    gate = randn(1, layout.seq_len, 2, seed=4)
    expected = hhattn.sparse_linear_attention(q, k, v, *pairs["raster"], gate=gate)
    ours = hhattn.sparse_linear_attention(q, k, v, *pairs["tile"], gate=gate, order="raster")
    torch.testing.assert_close(ours, expected)


@settings(max_examples=40, deadline=None)
@given(
    sq=st.integers(1, 70),
    sk=st.integers(1, 70),
    bq=st.sampled_from([4, 16, 24]),
    bk=st.sampled_from([8, 16, 40]),
    tokens=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 99),
)
def test_any_shape_and_masks(sq: int, sk: int, bq: int, bk: int, tokens: float, seed: int) -> None:
    classes = random_classes(1, 2, sq, sk, block=(bq, bk), seed=seed, tokens=tokens)
    q, k, v = (randn(1, n, 2, 8, seed=seed + i) for i, n in enumerate((sq, sk, sk)))
    pair = [BlockMask.from_dense(x, block_size=(bq, bk)) for x in classes]
    out = hhattn.sparse_linear_attention(q, k, v, *pair)
    torch.testing.assert_close(out, sum(branches(q, k, v, *classes)), rtol=1e-5, atol=1e-5)
