"""The state of block_linear_attention: streaming equals one call, gradients pass, the origin of positions moves."""

from __future__ import annotations

import pytest
import torch
from helpers import randn
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_oracle import inputs, tables

from hhattn import LinearAttentionState, block_linear_attention

pytestmark = pytest.mark.any_device


@pytest.mark.usefixtures("impl")
@settings(max_examples=30, deadline=None)
@given(lens=st.lists(st.integers(1, 9), min_size=2, max_size=6), cut=st.integers(1, 5), decayed=st.booleans())
def test_streaming_equals_chunk_parallel(lens: list[int], cut: int, decayed: bool) -> None:
    """Calls on consecutive groups of chunks, the state handed on, give what one call gives: outputs and final state."""
    cut = min(cut, len(lens) - 1)
    tokens, first = sum(lens), sum(lens[:cut])
    q, k, v = (x.float() for x in inputs(1, tokens, 2, 2, 8, 8))
    cos, sin = (x.float() for x in tables(tokens, 8))
    decay = randn(2, seed=4).sigmoid() if decayed else None
    whole, end = block_linear_attention(q, k, v, chunk_lens=lens, rope=(cos, sin), decay=decay, output_final_state=True)
    state, parts = None, []
    for part, sub in ((slice(0, first), lens[:cut]), (slice(first, tokens), lens[cut:])):
        out, state = block_linear_attention(
            q[:, part], k[:, part], v[:, part], chunk_lens=sub, rope=(cos[part], sin[part]), decay=decay,
            initial_state=state, output_final_state=True,
        )  # fmt: skip
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tuple(state), tuple(end), rtol=1e-5, atol=1e-5)


def test_gradients_pass_through_the_state() -> None:
    """Split over two calls, the first call's inputs get the gradient they get in one call."""
    leaves = [x.requires_grad_() for x in inputs(1, 12, 2, 2, 4, 4)]
    whole = block_linear_attention(*leaves, chunk_lens=6)[:, 6:].sum()
    _, state = block_linear_attention(*(x[:, :6] for x in leaves), output_final_state=True)
    split = block_linear_attention(*(x[:, 6:] for x in leaves), initial_state=state).sum()
    for a, b in zip(torch.autograd.grad(split, leaves), torch.autograd.grad(whole, leaves), strict=True):
        torch.testing.assert_close(a, b)


def test_rebase_is_exact() -> None:
    """A state rebased by Δ serves queries at p − Δ as the old one served queries at p."""
    q, k, v = inputs(2, 30, 2, 2, 12, 5)
    rope, shift = tables(30, 12), 20
    expected = block_linear_attention(q, k, v, chunk_lens=[20, 10], rope=rope)[:, 20:]
    early = [x[:, :20] for x in (q, k, v)]
    _, state = block_linear_attention(*early, rope=tuple(t[:20] for t in rope), output_final_state=True)
    moved = state.rebase(*tables(1, 12, start=shift))
    late = [x[:, 20:] for x in (q, k, v)]
    out = block_linear_attention(*late, rope=tables(10, 12), initial_state=moved)
    torch.testing.assert_close(out, expected, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(moved.k_sum, state.k_sum, rtol=0, atol=0)
    back = moved.rebase(*(t[0] for t in tables(1, 12, start=-shift)))
    torch.testing.assert_close(back.kv, state.kv, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="cos must have shape"):
        state.rebase(*tables(2, 12))


def test_state_is_float32_and_a_pytree() -> None:
    q, k, v = (x.bfloat16() for x in inputs(1, 9, 2, 1, 4, 3))
    _, state = block_linear_attention(q, k, v, output_final_state=True)
    assert isinstance(state, LinearAttentionState)
    assert state.kv.dtype == state.k_sum.dtype == torch.float32
    assert state.kv.shape == (1, 2, 4, 3)
    assert state.k_sum.shape == (1, 2, 4)
    doubled = torch.utils._pytree.tree_map(lambda x: 2 * x, state)
    assert isinstance(doubled, LinearAttentionState)
    assert state.to("meta").kv.is_meta
    assert not state.detach().kv.requires_grad


def test_the_state_holds_nothing_but_itself() -> None:
    """Not a view into the sums of every chunk, which would keep them alive for as long as the state."""
    q, k, v = inputs(1, 20, 2, 2, 8, 8)
    for chunk_lens in (None, 2):
        _, state = block_linear_attention(q, k, v, chunk_lens=chunk_lens, output_final_state=True)
        for x in state:
            assert x.untyped_storage().nbytes() == x.nbytes
            assert x.is_contiguous()


@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("chunk_lens", [None, 4, []], ids=str)
def test_no_tokens_leave_the_state(chunk_lens: int | list[int] | None) -> None:
    q, k, v = (x.float() for x in inputs(2, 0, 3, 3, 6, 5))
    state = LinearAttentionState(randn(2, 3, 6, 5), randn(2, 3, 6))
    out, after = block_linear_attention(q, k, v, chunk_lens=chunk_lens, initial_state=state, output_final_state=True)
    assert out.shape == (2, 0, 3, 5)
    torch.testing.assert_close(tuple(after), tuple(state))


def test_rebase_refuses_what_it_cannot_turn() -> None:
    even = LinearAttentionState(torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 4))
    with pytest.raises(TypeError, match=r"cos must be a torch\.Tensor, got list"):
        even.rebase([1.0], torch.zeros(4))
    with pytest.raises(ValueError, match=r"sin must have shape \[D\] = \(4,\)"):
        even.rebase(torch.zeros(4), torch.zeros(6))
    with pytest.raises(ValueError, match="even head dim, got D = 5"):
        LinearAttentionState(torch.zeros(1, 1, 5, 3), torch.zeros(1, 1, 5)).rebase(torch.zeros(5), torch.zeros(5))
