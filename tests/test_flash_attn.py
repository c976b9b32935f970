"""flash-attn's functions where flash-attn doesn't run: the same meaning, or a refusal."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from helpers import assert_close_to_fp64, randn
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import hhattn
from hhattn.integrations.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

LENGTHS = [(70, 70), (5, 130), (130, 5), (1, 1)]
WINDOWS = [(-1, -1), (3, -1), (-1, 4), (10, 2), (0, 0)]


def seen(q_len: int, k_len: int, causal: bool, window: tuple[int, int]) -> Tensor:
    """flash-attn's rule, pair by pair."""
    left, right = window[0], 0 if causal else window[1]
    pairs = torch.zeros(q_len, k_len, dtype=torch.bool)
    for i in range(q_len):
        at = i + k_len - q_len
        for j in range(k_len):
            pairs[i, j] = (left < 0 or j >= at - left) and (right < 0 or j <= at + right)
    return pairs


def formula(q: Tensor, k: Tensor, v: Tensor, pairs: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention of [B, S, H, D] by the pairs seen; 0 and -inf for a query that sees nothing."""
    rep = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(rep, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~pairs, -math.inf)
    weights = scores.softmax(-1).nan_to_num(0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), scores.logsumexp(-1)


@pytest.mark.parametrize(("q_len", "k_len"), LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", WINDOWS)
def test_function_means_the_same(q_len: int, k_len: int, causal: bool, window: tuple[int, int]) -> None:
    q, k, v = randn(2, q_len, 4, 24), randn(2, k_len, 2, 24, seed=1), randn(2, k_len, 2, 24, seed=2)
    pairs = seen(q_len, k_len, causal, window)
    for scale in (None, 0.3):
        expected, lse = formula(*(x.double() for x in (q, k, v)), pairs, scale)
        baseline, _ = formula(q, k, v, pairs, scale)
        out, got_lse, nothing = flash_attn_func(
            q, k, v, softmax_scale=scale, causal=causal, window_size=window, return_attn_probs=True
        )
        assert nothing is None
        assert_close_to_fp64(out, expected, baseline)
        torch.testing.assert_close(got_lse.double(), lse, rtol=1e-5, atol=1e-5)
        alone = flash_attn_func(q, k, v, softmax_scale=scale, causal=causal, window_size=window)
        assert_close_to_fp64(alone, expected, baseline)


def test_gradients() -> None:
    leaves = [randn(1, 40, 2, 16, seed=i).requires_grad_() for i in range(3)]
    upstream, pairs = randn(1, 40, 2, 16, seed=9), seen(40, 40, True, (7, -1))
    got = torch.autograd.grad(flash_attn_func(*leaves, causal=True, window_size=(7, -1)), leaves, upstream)
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    expected = torch.autograd.grad(formula(*doubles, pairs, None)[0], doubles, upstream.double())
    baseline = torch.autograd.grad(formula(*leaves, pairs, None)[0], leaves, upstream)
    for a, b, c in zip(got, expected, baseline, strict=True):
        assert_close_to_fp64(a, b, c, factor=3)


def test_packed() -> None:
    qkv = randn(2, 30, 3, 4, 16)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, causal=True), flash_attn_func(*qkv.unbind(2), causal=True))
    with pytest.raises(ValueError, match=r"qkv has shape \(2, 30, 4, 16\); accepted is \[B, S, 3, H, D\]"):
        flash_attn_qkvpacked_func(qkv[:, :, 0])
    q, kv = randn(2, 20, 4, 16), randn(2, 30, 2, 2, 16, seed=1)
    assert torch.equal(flash_attn_kvpacked_func(q, kv, 0.0, None, True), flash_attn_func(q, *kv.unbind(2), causal=True))
    with pytest.raises(ValueError, match=r"kv has shape \(2, 30, 2, 16\); accepted is \[B, Sk, 2, H_kv, D\]"):
        flash_attn_kvpacked_func(q, kv[:, :, 0])
    cu_q, cu_k = torch.tensor([0, 8, 20]), torch.tensor([0, 13, 30])
    expected = flash_attn_varlen_func(q[0], *kv[0].unbind(1), cu_q, cu_k, 12, 17, causal=True)
    assert torch.equal(flash_attn_varlen_kvpacked_func(q[0], kv[0], cu_q, cu_k, 12, 17, causal=True), expected)
    expected = flash_attn_varlen_func(*qkv[0].unbind(1), cu_k, cu_k, 17, 17)
    assert torch.equal(flash_attn_varlen_qkvpacked_func(qkv[0], cu_k, 17), expected)


def test_sequences_under_autocast_and_tokens_behind_them() -> None:
    q, cu = randn(12, 2, 16), torch.tensor([0, 3, 9])
    whole = flash_attn_varlen_func(q, q, q, cu, cu, 6, 6)
    torch.testing.assert_close(whole[:9], flash_attn_varlen_func(q[:9], q[:9], q[:9], cu, cu, 6, 6))
    assert not whole[9:].any()
    with torch.autocast("cpu", torch.bfloat16):
        assert flash_attn_varlen_func(q, q, q, cu, cu, 6, 6).dtype == torch.bfloat16


@pytest.mark.parametrize("causal", [False, True])
def test_sequences_end_to_end(causal: bool) -> None:
    """Each is attended alone; empty ones take no place, queries without keys give 0."""
    q_lens, k_lens = [5, 0, 17, 3], [5, 4, 30, 0]
    q, k, v = randn(sum(q_lens), 4, 16), randn(sum(k_lens), 2, 16, seed=1), randn(sum(k_lens), 2, 16, seed=2)
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).int() for n in (q_lens, k_lens))
    out, lse, _ = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 17, 30, causal=causal, return_attn_probs=True)
    assert out.shape == q.shape
    assert lse.shape == (4, len(q))
    for i, (q_len, k_len) in enumerate(zip(q_lens, k_lens, strict=True)):
        mine, theirs = slice(int(cu_q[i]), int(cu_q[i]) + q_len), slice(int(cu_k[i]), int(cu_k[i]) + k_len)
        if q_len and k_len:
            expected = flash_attn_func(q[None, mine], k[None, theirs], v[None, theirs], causal=causal)
            torch.testing.assert_close(out[None, mine], expected)
        elif q_len:
            assert torch.equal(out[mine], torch.zeros_like(out[mine]))
            assert (lse[:, mine] == -math.inf).all()
    assert torch.equal(flash_attn_varlen_func(q, k, v, cu_q, cu_k, 17, 30, causal=causal), out)
    with pytest.raises(ValueError, match=r"cu_seqlens_q=\[0, 26\]: accepted are ascending numbers from 0 to 25 at"):
        flash_attn_varlen_func(q, k, v, torch.tensor([0, 26]), cu_k, 17, 30)


def test_what_only_flash_attn_does_is_refused() -> None:
    q = randn(1, 8, 2, 16)
    with pytest.raises(ValueError, match=r"dropout_p=0.1: 0 is accepted"):
        flash_attn_func(q, q, q, 0.1)
    with pytest.raises(ValueError, match=r"softcap=30.0: 0 is accepted"):
        flash_attn_func(q, q, q, softcap=30.0)
    with pytest.raises(ValueError, match="alibi_slopes: None is accepted"):
        flash_attn_func(q, q, q, alibi_slopes=torch.ones(2))
    cu = torch.tensor([0, 8])
    with pytest.raises(ValueError, match="block_table must be None"):
        flash_attn_varlen_func(q[0], q[0], q[0], cu, cu, 8, 8, block_table=torch.zeros(1, 1))


def test_signatures_are_flash_attns() -> None:
    """Names, order and defaults, since programs call by position."""
    tail = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs"
    heads = {flash_attn_func: "q k v", flash_attn_qkvpacked_func: "qkv"}
    for function, head in heads.items():
        assert list(inspect.signature(function).parameters) == f"{head} {tail}".split()
    lengths = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
    names = list(inspect.signature(flash_attn_varlen_func).parameters)
    assert names == f"q k v {lengths} {tail} block_table".split()


@given(
    q_len=st.integers(1, 90), k_len=st.integers(1, 90), left=st.none() | st.integers(0, 100),
    right=st.none() | st.integers(0, 100), bq=st.integers(1, 24), bk=st.integers(1, 24),
)  # fmt: skip
def test_band_is_exact(q_len: int, k_len: int, left: int | None, right: int | None, bq: int, bk: int) -> None:
    mask = hhattn.masks.band(q_len, k_len, left=left, right=right, block_size=(bq, bk))
    window = (-1 if left is None else left, -1 if right is None else right)
    assert torch.equal(mask.to_dense()[0, 0], seen(q_len, k_len, False, window))


def test_band_of_a_minute_is_small() -> None:
    mask = hhattn.masks.band(220_800, left=4096, right=0)
    assert mask.nbytes < 64 << 20
    with pytest.raises(ValueError, match="left=-1: accepted is 0 or more"):
        hhattn.masks.band(8, left=-1)
