"""block_linear_attention against a token-by-token float64 oracle, and the identities its chunking promises."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo.testing
from conftest import IMPLS
from helpers import DEVICE, assert_close_to_fp64, randn, strided
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_oracle import inputs, lens_of, options, oracle, tables, to, turn
from torch import Tensor

import hhattn
from hhattn import LinearAttentionState, block_linear_attention

pytestmark = pytest.mark.any_device

ALL = {"rope", "key_gate", "decay", "initial_state"}
CHUNKS = [None, 1, 4, 23, 50, [23], [1, 5, 5, 5, 2, 5], [7, 16]]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("names", [set(), {"rope"}, {"decay"}, ALL], ids=lambda n: "+".join(sorted(n)) or "plain")
@pytest.mark.parametrize("chunk_lens", CHUNKS, ids=str)
def test_equals_the_recurrence(chunk_lens: int | list[int] | None, names: set[str]) -> None:
    q, k, v = inputs(2, 23, 3, 3, 8, 6)
    lens = lens_of(chunk_lens, 23)
    extra = options(2, 23, 3, 8, 6, len(lens), names)
    expected = oracle(q, k, v, lens, **extra)
    out, state = block_linear_attention(q, k, v, chunk_lens=chunk_lens, output_final_state=True, **extra)
    for name, a, b in zip(("out", "kv", "k_sum"), (out, *state), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "dim_v"), [(3, 3, 40, 40), (4, 2, 112, 112), (2, 1, 64, 24)])
def test_accuracy(dtype: torch.dtype, heads: int, kv_heads: int, dim: int, dim_v: int) -> None:
    q, k, v = (x.to(dtype) for x in inputs(2, 37, heads, kv_heads, dim, dim_v))
    lens = [10, 10, 10, 7]
    extra = options(2, 37, heads, dim, dim_v, 4, {"rope", "decay"})
    extra = {name: to(value, torch.float32) for name, value in extra.items()}
    expected, *_ = oracle(
        q.double(), k.double(), v.double(), lens, **{n: to(x, torch.float64) for n, x in extra.items()}
    )
    baseline, *_ = oracle(q.float(), k.float(), v.float(), lens, **extra)
    out = block_linear_attention(q, k, v, chunk_lens=10, **extra)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close_to_fp64(out, expected, baseline.to(dtype))


@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_accuracy(dtype: torch.dtype) -> None:
    """Gradients of every input against the float64 oracle's, beside those of the same formula in the same dtype."""
    q, k, v = (x.to(dtype) for x in inputs(1, 19, 2, 2, 16, 12))
    lens, names = [8, 8, 3], ("key_gate", "decay", "initial_state")
    extra = options(1, 19, 2, 16, 12, 3, {*names, "rope"})
    grad_out = randn(1, 19, 2, 12, dtype=torch.float64, seed=9)

    def gradients(dtype: torch.dtype, run) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        e = {n: to(x, state_dtype) for n, x in extra.items()}
        options_ = [x.requires_grad_() for n in names for x in (e[n] if isinstance(e[n], tuple) else (e[n],))]
        return torch.autograd.grad(run(*leaves, e), leaves + options_, grad_out.to(dtype))

    def ours(q: Tensor, k: Tensor, v: Tensor, e: dict) -> Tensor:
        return block_linear_attention(q, k, v, chunk_lens=8, feature_map="elu1", **e)

    def recurrence(q: Tensor, k: Tensor, v: Tensor, e: dict) -> Tensor:
        up = (x if x.dtype == torch.float64 else x.float() for x in (q, k, v))
        return oracle(*up, lens, feature_map="elu1", **e)[0].to(q.dtype)

    labels = ["q", "k", "v", "key_gate", "decay", "kv", "k_sum"]
    expected, base, got = gradients(torch.float64, recurrence), gradients(dtype, recurrence), gradients(dtype, ours)
    for name, a, b, c in zip(labels, got, expected, base, strict=True):
        assert_close_to_fp64(a, b, c, factor=3, ulps=8, name=f"gradient of {name}")


@pytest.mark.parametrize("feature_map", ["elu1", "softmax", "identity"])
def test_gradcheck(feature_map: str) -> None:
    q, k, v = inputs(1, 7, 2, 1, 4, 3)
    e = options(1, 7, 2, 4, 3, 3, {"rope", "key_gate", "chunk_decay", "initial_state"})

    def run(
        q: Tensor, k: Tensor, v: Tensor, gate: Tensor, decay: Tensor, kv: Tensor, k_sum: Tensor
    ) -> tuple[Tensor, ...]:
        out, state = block_linear_attention(
            q, k, v, chunk_lens=3, rope=e["rope"], key_gate=gate, decay=decay, initial_state=(kv, k_sum),
            feature_map=feature_map, normalize=feature_map != "identity", output_final_state=True,
        )  # fmt: skip
        return (out, *state)

    leaves = [x.clone().requires_grad_() for x in (q, k, v, e["key_gate"], e["decay"], *e["initial_state"])]
    assert torch.autograd.gradcheck(run, leaves)
    if feature_map == "elu1":
        assert torch.autograd.gradgradcheck(run, leaves)


@settings(max_examples=40, deadline=None)
@given(
    lens=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    heads=st.sampled_from([(1, 1), (4, 2), (3, 3), (4, 1)]),
    dims=st.sampled_from([(2, 3), (8, 8), (40, 16)]),
    names=st.sets(st.sampled_from(sorted(ALL | {"chunk_decay"}))),
    maps=st.sampled_from([("relu", None), ("relu", "identity"), ("elu1", None), ("relu2", "relu"), ("softmax", None)]),
    normalize=st.booleans(),
)
def test_any_chunking(
    lens: list[int],
    heads: tuple[int, int],
    dims: tuple[int, int],
    names: set[str],
    maps: tuple[str, str | None],
    normalize: bool,
) -> None:
    tokens = sum(lens)
    q, k, v = inputs(2, tokens, *heads, *dims)
    e = options(2, tokens, heads[0], *dims, len(lens), names)
    e |= {"feature_map": maps[0], "numerator_map": maps[1], "normalize": normalize, "eps": 1e-3}
    out, state = block_linear_attention(q, k, v, chunk_lens=lens, output_final_state=True, **e)
    for a, b in zip((out, *state), oracle(q, k, v, lens, **e), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_one_chunk_is_bidirectional() -> None:
    """Against the quadratic form: out = ((φq φkᵀ) / row sums) v. Order of the tokens doesn't matter."""
    q, k, v = inputs(2, 17, 2, 2, 8, 5)
    weights = torch.einsum("bihd,bjhd->bhij", q.relu(), k.relu())
    expected = torch.einsum("bhij,bjhd->bihd", weights / (weights.sum(-1, keepdim=True) + 1e-15), v)
    torch.testing.assert_close(block_linear_attention(q, k, v), expected)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0), device="cpu").to(DEVICE)
    torch.testing.assert_close(block_linear_attention(q, k[:, order], v[:, order]), expected)


def test_a_token_never_sees_a_later_chunk() -> None:
    q, k, v = inputs(1, 20, 2, 2, 8, 8)
    before = block_linear_attention(q, k, v, chunk_lens=5)
    k[:, 10:], v[:, 10:] = float("nan"), float("inf")
    torch.testing.assert_close(block_linear_attention(q, k, v, chunk_lens=5)[:, :10], before[:, :10], rtol=0, atol=0)


def test_sana_video_2() -> None:
    """Numerator: rotated, gated, no ReLU. Denominator: ReLU, unrotated, ungated, eps 1e-8."""
    q, k, v = inputs(1, 15, 2, 2, 8, 8)
    rope, gate = tables(15, 8), randn(1, 15, 2, dtype=torch.float64, seed=8).sigmoid()
    rotated_q, rotated_k = (turn(x, *(t[:, None] for t in rope)) for x in (q, k))
    numerator = torch.einsum("bihd,bjhd,bjh,bjhe->bihe", rotated_q, rotated_k, gate, v)
    denominator = torch.einsum("bihd,bjhd->bih", q.relu(), k.relu())[..., None] + 1e-8
    out = block_linear_attention(q, k, v, rope=rope, key_gate=gate, numerator_map="identity", eps=1e-8)
    torch.testing.assert_close(out, numerator / denominator)


def test_zero_decay_forgets_exactly() -> None:
    q, k, v = inputs(1, 12, 2, 2, 4, 4)
    out = block_linear_attention(q, k, v, chunk_lens=4, decay=torch.zeros(2, dtype=torch.float64, device=DEVICE))
    alone = [block_linear_attention(q[:, i : i + 4], k[:, i : i + 4], v[:, i : i + 4]) for i in (0, 4, 8)]
    torch.testing.assert_close(out, torch.cat(alone, 1))


def test_long_sums_stay_accurate_in_bfloat16() -> None:
    """Hundreds of chunks of bfloat16 keys: a state kept in bfloat16 would be off by percents, this one by rounding."""
    k = randn(1, 4000, 1, 4, dtype=torch.bfloat16).abs()
    _, state = block_linear_attention(k, k, k, chunk_lens=10, output_final_state=True)
    torch.testing.assert_close(state.k_sum.double(), k.double().sum(1), rtol=1e-5, atol=0)


@pytest.mark.usefixtures("impl")
def test_strided_inputs_and_awkward_sizes() -> None:
    q, k, v = (x.float() for x in inputs(2, 11, 3, 3, 6, 5))
    expected = block_linear_attention(q, k, v, chunk_lens=4)
    for dim in (0, 1, 2):
        torch.testing.assert_close(
            block_linear_attention(*(strided(x, dim) for x in (q, k, v)), chunk_lens=4), expected, rtol=0, atol=0
        )
    fused = torch.cat((q, k), 3)
    views = block_linear_attention(fused[..., :6], fused[..., 6:], v, chunk_lens=4)
    torch.testing.assert_close(views, expected, rtol=0, atol=0)
    one = block_linear_attention(q[:, :1], k[:, :1], v[:, :1], chunk_lens=7)
    assert one.shape == (2, 1, 3, 5)


@pytest.mark.usefixtures("impl")
def test_a_query_that_sees_nothing_is_zero_without_nan_gradients() -> None:
    """ReLU can silence a whole query, or every key: 0/eps is 0, and so are the gradients."""
    q, k, v = (x.float() for x in inputs(1, 6, 1, 1, 4, 4))
    q[:, 2], k[:, :3] = -1.0, -1.0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = block_linear_attention(*leaves, chunk_lens=3)
    assert (out[:, :3] == 0).all()
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad.isfinite().all()


def test_memory_does_not_hold_a_square() -> None:
    """The largest tensor kept for the backward is linear in tokens."""
    tokens, kept = 4096, []
    q, k, v = (x.float().requires_grad_() for x in inputs(1, tokens, 1, 1, 8, 8))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        block_linear_attention(q, k, v, chunk_lens=256, decay=torch.full((1,), 0.9, device=DEVICE))
    assert max(kept) <= tokens * 16


@pytest.mark.usefixtures("impl")
@pytest.mark.parametrize("decayed", [False, True])
def test_compiles_whole(decayed: bool) -> None:
    q, k, v = (x.float() for x in inputs(1, 20, 2, 1, 8, 4))
    rope = tuple(x.float() for x in tables(20, 8))
    decay = torch.full((2,), 0.5, device=DEVICE) if decayed else None

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, LinearAttentionState]:
        return block_linear_attention(q, k, v, chunk_lens=6, rope=rope, decay=decay, output_final_state=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    expected, got = run(*leaves), compiled(*leaves)
    assert isinstance(got[1], LinearAttentionState)
    torch.testing.assert_close((got[0], *got[1]), (expected[0], *expected[1]))
    for a, b in zip(
        torch.autograd.grad(got[0].sum(), leaves), torch.autograd.grad(expected[0].sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("of", ["q", "k", "v", "decay"])
def test_functional_transforms(of: str) -> None:
    """torch.func's transforms, with several decayed chunks, against autograd."""
    q, k, v = inputs(1, 9, 2, 2, 4, 3)
    given = {"q": q, "k": k, "v": v, "decay": randn(2, dtype=torch.float64).sigmoid()}
    x = given.pop(of)

    def f(x: Tensor) -> Tensor:
        return block_linear_attention(**given, **{of: x}, chunk_lens=2, feature_map="elu1").square().sum()

    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(f(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(f)(x), expected)
    torch.testing.assert_close(torch.func.vjp(f, x)[1](torch.ones_like(expected.sum()))[0], expected)
    torch.testing.assert_close(torch.func.jvp(f, (x,), (x,))[1], (expected * x).sum())
    torch.testing.assert_close(torch.func.vmap(f)(torch.stack((x, 2 * x))), torch.stack((f(x), f(2 * x))))
    per_sample = torch.func.vmap(torch.func.grad(f))(torch.stack((2 * x, x)))
    torch.testing.assert_close(per_sample[1], expected)
    leaf_grad = torch.autograd.functional.hvp(f, x, x)[1]
    torch.testing.assert_close(torch.func.jvp(torch.func.grad(f), (x,), (x,))[1], leaf_grad)
    torch.testing.assert_close(torch.func.grad(lambda y: (torch.func.grad(f)(y) * x).sum())(x), leaf_grad)


def test_compiled_once_serves_every_length() -> None:
    """Sequence length is a symbol, not a constant: the third length compiles nothing new."""
    counter = torch._dynamo.testing.CompileCounter()

    @torch.compile(fullgraph=True, backend=counter, dynamic=True)
    def run(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return block_linear_attention(x, x, x, chunk_lens=6, rope=(cos, sin))

    for tokens in (20, 32, 45):
        x, rope = randn(1, tokens, 2, 8), tuple(t.float() for t in tables(tokens, 8))
        torch.testing.assert_close(run(x, *rope), block_linear_attention(x, x, x, chunk_lens=6, rope=rope))
    assert counter.frame_count == 1


def test_meta_and_fake_tensors() -> None:
    q, k, v = (x.float() for x in inputs(2, 20, 4, 2, 8, 6))
    out, state = block_linear_attention(
        q.to("meta"),
        k.to("meta"),
        v.to("meta"),
        chunk_lens=6,
        output_final_state=True,
        decay=torch.ones(4, device="meta"),
    )
    assert out.is_meta
    assert out.shape == (2, 20, 4, 6)
    assert state.kv.shape == (2, 4, 8, 6)
    with torch._subclasses.FakeTensorMode() as mode:
        fake = block_linear_attention(*(mode.from_tensor(x) for x in (q, k, v)), chunk_lens=[5, 15])
    assert fake.shape == (2, 20, 4, 6)


def test_autocast_casts_as_sdpa_and_sums_in_float32() -> None:
    q, k, v = (x.float() for x in inputs(1, 20, 2, 2, 8, 8))
    low = [x.bfloat16() for x in (q, k, v)]
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        mixed, state = block_linear_attention(low[0], k, v, chunk_lens=5, output_final_state=True)
    assert mixed.dtype == torch.bfloat16
    expected, expected_state = block_linear_attention(*low, chunk_lens=5, output_final_state=True)
    torch.testing.assert_close(mixed, expected, rtol=0, atol=0)
    torch.testing.assert_close(tuple(state), tuple(expected_state), rtol=0, atol=0)


def test_per_key_head_options_count_for_their_group() -> None:
    q, k, v = inputs(1, 9, 4, 2, 4, 4)
    gate, decay = (
        randn(1, 9, 2, dtype=torch.float64).sigmoid(),
        torch.tensor([0.3, 0.9], dtype=torch.float64, device=DEVICE),
    )
    few = block_linear_attention(q, k, v, chunk_lens=3, key_gate=gate, decay=decay)
    many = block_linear_attention(
        q, k, v, chunk_lens=3, key_gate=gate.repeat_interleave(2, 2), decay=decay.repeat_interleave(2)
    )
    torch.testing.assert_close(few, many)


Q = torch.zeros(2, 8, 4, 6)
REFUSED = [
    ({"q": Q[0]}, ValueError, r"q must have shape \[B, S, H, D\]"),
    ({"q": Q.int()}, TypeError, "q must be a tensor of float32"),
    ({"k": Q.half()}, TypeError, "one dtype"),
    ({"k": Q[:, :, :3]}, ValueError, "multiple of k's 3 heads"),
    ({"k": Q[:, :7]}, ValueError, "k must have shape"),
    ({"v": Q[:, :7]}, ValueError, "v must have shape"),
    ({"v": Q.to("meta")}, ValueError, "v must be on the device of q"),
    ({"chunk_lens": 0}, ValueError, "positive"),
    ({"chunk_lens": [4, 3]}, ValueError, "sum to S = 8, got 7"),
    ({"chunk_lens": [4, 0, 4]}, ValueError, "positive"),
    ({"chunk_lens": True}, TypeError, "chunk_lens"),
    ({"chunk_lens": torch.tensor([8])}, TypeError, "chunk_lens"),
    ({"chunk_lens": 2.0}, TypeError, "chunk_lens"),
    ({"rope": (Q[0, :, 0], Q[0, :5, 0])}, ValueError, "rope: sin must have shape"),
    ({"feature_map": "gelu"}, ValueError, "feature_map='gelu'"),
    ({"numerator_map": "gelu"}, ValueError, "numerator_map='gelu'"),
    ({"key_gate": Q[:, :, 0]}, ValueError, "key_gate must have shape"),
    ({"decay": torch.ones(3)}, ValueError, "decay must have 4"),
    ({"decay": torch.ones(2, 5, 4), "chunk_lens": 4}, ValueError, "decay must have shape"),
    ({"eps": -1.0}, ValueError, "eps"),
    ({"initial_state": (torch.zeros(2, 4, 6, 5), torch.zeros(2, 4, 6))}, ValueError, "initial_state.kv"),
    ({"initial_state": (torch.zeros(2, 4, 6, 6), torch.zeros(2, 4, 5))}, ValueError, "initial_state.k_sum"),
    ({"q": Q.tolist()}, TypeError, "q must be a tensor"),
    (
        {"q": torch.zeros(2, 8, 4, 257), "k": torch.zeros(2, 8, 4, 257)},
        ValueError,
        "q must have a head dim of 1 ... 256",
    ),
    ({"v": torch.zeros(2, 8, 4, 257)}, ValueError, "v must have a head dim of 1 ... 256, got 257"),
    ({"decay": 0.9}, TypeError, "decay must be a torch.Tensor, got float"),
    ({"decay": torch.tensor(0.9)}, ValueError, "decay must have shape"),
    ({"decay": torch.ones(4, dtype=torch.int64)}, TypeError, "decay must have a floating dtype, got int64"),
    ({"key_gate": [1.0]}, TypeError, "key_gate must be a torch.Tensor, got list"),
    ({"key_gate": Q[..., 0].bool()}, TypeError, "key_gate must have a floating dtype, got bool"),
    ({"initial_state": (Q,)}, TypeError, "initial_state must be a LinearAttentionState, .* got tuple of 1"),
    ({"initial_state": Q}, TypeError, "initial_state must be a LinearAttentionState, .* got Tensor"),
    ({"initial_state": (None, None)}, TypeError, "initial_state.kv must be a torch.Tensor, got NoneType"),
    ({"initial_state": (Q[0, 0, 0, 0], Q)}, ValueError, "initial_state.kv must have 4"),
    ({"eps": math.nan}, ValueError, "eps=nan must not be negative, infinite or NaN"),
    ({"eps": math.inf}, ValueError, "eps=inf must not be"),
    ({"eps": "1"}, TypeError, "eps must be a number, got str"),
    ({"rope": Q[0, :, 0]}, TypeError, r"rope must be a pair \(cos, sin\) or None, got Tensor"),
    ({"rope": (Q[0, :, 0],)}, TypeError, r"rope must be a pair \(cos, sin\) or None, got tuple of 1"),
    ({"rope": ([1.0], [0.0])}, TypeError, "rope: cos must be a torch.Tensor, got list"),
    ({"rope": (Q[0, :, 0], Q[0, :, 0].int())}, TypeError, "rope: sin must have a floating dtype, got int32"),
    ({"impl": "fast"}, ValueError, "impl='fast'"),
    ({"impl": "flash"}, RuntimeError, "no such implementation"),
]


@pytest.mark.cpu_only("arguments are refused before their device matters")
@pytest.mark.parametrize(
    ("changed", "error", "message"), REFUSED, ids=lambda x: next(iter(x)) if isinstance(x, dict) else ""
)
def test_refuses(changed: dict[str, object], error: type[Exception], message: str) -> None:
    arguments = {"q": Q, "k": Q, "v": Q} | changed
    with pytest.raises(error, match=message):
        block_linear_attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_odd_head_dim_only_refuses_rope() -> None:
    x = torch.ones(1, 4, 1, 5, device=DEVICE)
    torch.testing.assert_close(block_linear_attention(x, x, x), x)
    with pytest.raises(ValueError, match="even head dim, got D = 5"):
        block_linear_attention(x, x, x, rope=(x[0, :, 0], x[0, :, 0]))


def test_use_impl_reaches_it() -> None:
    q, k, v = (x.float() for x in inputs(1, 4, 1, 1, 4, 4))
    with hhattn.use_impl("reference"):
        out = block_linear_attention(q, k, v)
    assert math.isfinite(out.sum())


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_stays_one(impl: str) -> None:
    """The one that GPUs make, all bits set but the sign, too: rounding it by integers would carry into the sign."""
    q, k, v = (randn(1, 20, 1, 16, seed=i).abs() for i in range(3))
    if impl == "cuda":  # takes 16 bits
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
    bits, all_ones = (torch.int16, 0x7FFF) if impl == "cuda" else (torch.int32, 0x7FFFFFFF)
    v[0, 3, 0, 5] = torch.tensor(all_ones, dtype=bits, device=DEVICE).view(v.dtype)
    out = hhattn.block_linear_attention(q, k, v, chunk_lens=10, impl=impl)
    assert out[:, :, :, 5].isnan().all()
    assert out[:, :, :, :5].isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_second_derivatives_are_right_or_refused(impl: str) -> None:
    dtype = torch.bfloat16 if impl == "cuda" else torch.float32
    q, k, v = (x.to(dtype).requires_grad_() for x in inputs(1, 6, 1, 1, 4, 4))
    first = torch.autograd.grad(block_linear_attention(q, k, v, impl=impl).square().sum(), (q, k, v), create_graph=True)
    penalty = sum(g.square().sum() for g in first)
    if impl == "reference":
        assert torch.autograd.grad(penalty, q)[0].isfinite().all()
    else:
        with pytest.raises(RuntimeError, match=r'block_linear_attention: .* no derivative; impl="reference" has all'):
            torch.autograd.grad(penalty, q)
