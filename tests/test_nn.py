"""The modules: the parameters they promise, the ops they call, and what their callers build on (streaming, rings)."""

from __future__ import annotations

import pytest
import torch
from helpers import randn
from torch import Tensor, nn

import hhattn
from hhattn.nn import (
    BlockLinearAttention,
    BlockSparseAttention,
    NormModulate,
    QKNormRoPE,
    Rope3D,
    SparseLinearAttention,
)

GRID = (4, 3, 2)
FRAME = GRID[1] * GRID[2]
TOKENS = GRID[0] * FRAME
DIM, HEADS = 24, 2


def randomize(module: nn.Module) -> nn.Module:
    """Every parameter random, so that none can be left out unnoticed."""
    for i, parameter in enumerate(module.parameters()):
        parameter.data = randn(*parameter.shape, seed=i) * 0.3 + (parameter.ndim == 1)
    return module


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def projected(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of ``layer``, its norms written out."""
    q, k, v = layer.to_q(x), layer.to_k(x), layer.to_v(x)
    if layer.qk_norm == "rms_across_heads":
        q, k = rms(q, layer.norm_q.weight, layer.norm_eps), rms(k, layer.norm_k.weight, layer.norm_eps)
    q, k, v = (t.unflatten(2, (-1, layer.head_dim)) for t in (q, k, v))
    if layer.qk_norm == "rms":
        q, k = rms(q, layer.norm_q.weight, layer.norm_eps), rms(k, layer.norm_k.weight, layer.norm_eps)
    return q, k, v


def turn(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = (t[:, None] for t in rope)
    swapped = torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2)
    return x * cos + swapped * sin


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[3] ** -0.5
    return torch.einsum("bhij,bjhd->bihd", scores.masked_fill(~mask, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("cls", [BlockLinearAttention, BlockSparseAttention])
@pytest.mark.parametrize(("qk_norm", "size"), [("rms_across_heads", DIM), ("rms", DIM // HEADS), (None, None)])
def test_parameters(cls: type[nn.Module], qk_norm: str | None, size: int | None) -> None:
    layer = cls(DIM, HEADS, qk_norm=qk_norm)
    names = {f"to_{x}.{p}" for x in ("q", "k", "v", "out") for p in ("weight", "bias")}
    names |= set() if qk_norm is None else {"norm_q.weight", "norm_k.weight"}
    assert set(layer.state_dict()) == names
    assert size is None or layer.norm_q.weight.shape == (size,)
    assert "to_q.bias" not in cls(DIM, HEADS, bias=False).state_dict()


@pytest.mark.parametrize("cls", [BlockLinearAttention, BlockSparseAttention])
def test_refuses(cls: type[nn.Module]) -> None:
    with pytest.raises(ValueError, match="qk_norm='layer'"):
        cls(DIM, HEADS, qk_norm="layer")
    with pytest.raises(ValueError, match="head_dim=33"):
        hhattn.nn.Rope3D(33)
    with pytest.raises(ValueError, match="num_heads=5 doesn't divide dim=24"):
        cls(DIM, 5)
    with pytest.raises(ValueError, match="num_kv_heads=2"):
        cls(DIM, 3, num_kv_heads=2)


@pytest.mark.parametrize("qk_norm", ["rms_across_heads", "rms", None])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_linear_is_the_op_between_projections(qk_norm: str | None, kv_heads: int) -> None:
    layer = randomize(BlockLinearAttention(DIM, HEADS, num_kv_heads=kv_heads, qk_norm=qk_norm, eps=1e-6))
    x, rope = randn(2, TOKENS, DIM, seed=40), hhattn.rope_3d(GRID, DIM // HEADS)
    q, k, v = projected(layer, x)
    gate = randn(2, TOKENS, HEADS, seed=41).sigmoid()
    expected = hhattn.block_linear_attention(
        q, k, v, rope=rope, chunk_lens=FRAME, key_gate=gate, decay=torch.full((HEADS,), 0.5), eps=1e-6
    )
    got = layer(x, rope=rope, chunk_lens=FRAME, key_gate=gate, decay=torch.full((HEADS,), 0.5))
    torch.testing.assert_close(got, layer.to_out(expected.flatten(2)), rtol=1e-5, atol=1e-5)


def test_linear_streams() -> None:
    """Frame by frame with the state handed on = all frames at once, with a gradient for every parameter."""
    layer = randomize(BlockLinearAttention(DIM, HEADS))
    x, (cos, sin) = randn(1, TOKENS, DIM, seed=40), hhattn.rope_3d(GRID, DIM // HEADS)
    whole, end = layer(x, rope=(cos, sin), chunk_lens=FRAME, output_final_state=True)
    state, parts = None, []
    for t in range(GRID[0]):
        part = slice(t * FRAME, (t + 1) * FRAME)
        out, state = layer(x[:, part], rope=(cos[part], sin[part]), initial_state=state, output_final_state=True)
        parts.append(out)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tuple(state), tuple(end), rtol=1e-5, atol=1e-5)
    whole.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("qk_norm", ["rms_across_heads", "rms", None])
@pytest.mark.parametrize(("kv_heads", "rotated"), [(2, True), (1, True), (2, False)])
def test_sparse_is_softmax_under_its_mask(qk_norm: str | None, kv_heads: int, rotated: bool) -> None:
    layer = randomize(BlockSparseAttention(DIM, HEADS, num_kv_heads=kv_heads, qk_norm=qk_norm))
    x, rope = randn(2, TOKENS, DIM, seed=40), hhattn.rope_3d(GRID, DIM // HEADS) if rotated else None
    frame = torch.arange(TOKENS) // FRAME
    dense = frame[:, None] >= frame
    q, k, v = projected(layer, x)
    q, k = (q, k) if rope is None else (turn(q, rope), turn(k, rope))
    mask = hhattn.BlockMask.from_dense(dense[None, None], block_size=(8, 8))
    got, (key, value) = layer(x, mask, rope=rope, return_kv=True)
    expected = layer.to_out(softmax_attention(q, k, v, dense).flatten(2))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(key, k, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(value, v)


def test_sparse_ring_equals_the_whole() -> None:
    """Frame by frame with the last frames' rotated keys in front = one call whose mask is that window."""
    layer, window = randomize(BlockSparseAttention(DIM, HEADS)), 2
    x, (cos, sin) = randn(1, TOKENS, DIM, seed=40), hhattn.rope_3d(GRID, DIM // HEADS)
    frame = torch.arange(TOKENS) // FRAME
    distance = frame[:, None] - frame
    mask = hhattn.BlockMask.from_dense(((distance >= 0) & (distance <= window))[None, None], block_size=(4, 4))
    whole = layer(x, mask, rope=(cos, sin))
    ring: list[tuple[Tensor, Tensor]] = []
    for t in range(GRID[0]):
        part = slice(t * FRAME, (t + 1) * FRAME)
        past = tuple(torch.cat(kv, 1) for kv in zip(*ring, strict=True)) if ring else None
        everything = torch.ones(1, 1, FRAME, (len(ring) + 1) * FRAME, dtype=torch.bool)
        out, kv = layer(
            x[:, part], hhattn.BlockMask.from_dense(everything, block_size=(4, 4)), rope=(cos[part], sin[part]),
            kv_cache=past, return_kv=True,
        )  # fmt: skip
        torch.testing.assert_close(out, whole[:, part], rtol=1e-4, atol=1e-5)
        ring = [*ring, kv][-window:]


@pytest.mark.parametrize("all_others", [False, True])
def test_sparse_linear_learns_from_its_softmax_branch_on(all_others: bool) -> None:
    """Fresh, the layer is block-sparse attention with the same projections; its own then adds the linear branch."""
    x, rope = randn(2, TOKENS, DIM, seed=40), hhattn.rope_3d(GRID, DIM // HEADS)
    frame = torch.arange(TOKENS) // FRAME
    distance = (frame[:, None] - frame).abs()
    critical, marginal = (
        hhattn.BlockMask.from_dense(near[None, None], block_size=(4, 4)) for near in (distance == 0, distance == 1)
    )
    others = None if all_others else marginal
    layer, sparse = SparseLinearAttention(DIM, HEADS, feature_map="elu1", eps=1e-5), BlockSparseAttention(DIM, HEADS)
    missing = layer.load_state_dict(sparse.state_dict(), strict=False).missing_keys
    assert missing == ["proj_l.weight", "proj_l.bias"]
    fresh = layer(x, critical, others, rope=rope)
    torch.testing.assert_close(fresh, sparse(x, critical, rope=rope))
    fresh.sum().backward()
    assert (layer.proj_l.weight.grad != 0).any()

    randomize(layer)
    q, k, v = projected(layer, x)
    q, k = turn(q, rope), turn(k, rope)
    w = torch.einsum("bihd,bjhd->bhij", *(torch.nn.functional.elu(t) + 1 for t in (q, k)))
    w = w * (distance > 0 if all_others else distance == 1)
    linear = torch.einsum("bhij,bjhd->bihd", w / (w.sum(-1, keepdim=True) + 1e-5), v)
    expected = layer.to_out((softmax_attention(q, k, v, distance == 0) + layer.proj_l(linear)).flatten(2))
    torch.testing.assert_close(layer(x, critical, others, rope=rope), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="feature_map='identity'"):
        SparseLinearAttention(DIM, HEADS, feature_map="identity")


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("affine", [False, True])
def test_norm_modulate(norm: str, affine: bool) -> None:
    module = randomize(NormModulate(DIM, norm=norm, eps=1e-5, elementwise_affine=affine))
    assert set(module.state_dict()) == ({"weight"} | ({"bias"} if norm == "layer" else set()) if affine else set())
    x, residual = randn(2, TOKENS, DIM, seed=1), randn(2, TOKENS, DIM, seed=2)
    scale, shift, gate = (randn(2, GRID[0], DIM, seed=s) for s in (3, 4, 5))
    y, r = module(x, scale, shift, residual=residual, gate=gate)
    expected_r = residual + gate.repeat_interleave(FRAME, 1) * x
    normed = (
        rms(expected_r, torch.ones(DIM), 1e-5)
        if norm == "rms"
        else nn.functional.layer_norm(expected_r, (DIM,), eps=1e-5)
    )
    if affine:
        normed = normed * module.weight + (module.bias if norm == "layer" else 0)
    expected = normed * (1 + scale.repeat_interleave(FRAME, 1)) + shift.repeat_interleave(FRAME, 1)
    torch.testing.assert_close(r, expected_r)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="norm='group'"):
        NormModulate(DIM, norm="group")


@pytest.mark.parametrize("across_heads", [False, True])
def test_qk_norm_rope(across_heads: bool) -> None:
    module = randomize(QKNormRoPE(12, 4, 2, across_heads=across_heads))
    q, k, rope = randn(1, TOKENS, 4, 12, seed=1), randn(1, TOKENS, 2, 12, seed=2), Rope3D(12)(GRID)
    for x, weight, got in zip((q, k), (module.q_weight, module.k_weight), module(q, k, *rope), strict=True):
        flat = x.flatten(2) if across_heads else x
        torch.testing.assert_close(got, turn(rms(flat, weight, 1e-6).view_as(x), rope), rtol=1e-5, atol=1e-5)


def test_rope_3d_keeps_its_settings() -> None:
    module = Rope3D(16, theta=100.0, axes_dims=(8, 4, 4), rotate="half")
    expected = hhattn.rope_3d(GRID, 16, theta=100.0, axes_dims=(8, 4, 4), rotate="half", offset=(5, 0, 0.5))
    for a, b in zip(module(GRID, offset=(5, 0, 0.5)), expected, strict=True):
        assert torch.equal(a, b)
    assert not module.state_dict()


@pytest.mark.parametrize("name", ["linear", "sparse"])
def test_compile_and_autocast(name: str) -> None:
    x, rope = randn(2, TOKENS, DIM, seed=40), hhattn.rope_3d(GRID, DIM // HEADS)
    dense = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool)
    if name == "linear":
        layer, more = randomize(BlockLinearAttention(DIM, HEADS)), {"chunk_lens": FRAME}
    else:
        layer, more = randomize(BlockSparseAttention(DIM, HEADS)), {"mask": hhattn.BlockMask.from_dense(dense)}
    expected = layer(x, rope=rope, **more)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, rope=rope, **more), expected, rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x, rope=rope, **more)
    assert low.dtype == torch.bfloat16
    assert (low.float() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize("cls", [BlockLinearAttention, BlockSparseAttention])
def test_builds_on_meta(cls: type[nn.Module]) -> None:
    with torch.device("meta"):
        layer = cls(2240, 20)
    assert sum(p.numel() for p in layer.parameters()) == 4 * (2240 * 2240 + 2240) + 2 * 2240
