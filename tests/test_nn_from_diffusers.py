"""Modules made from diffusers' own layers: the same result, on the same weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("diffusers")

from diffusers.models import normalization
from helpers import randn
from model_zoo import FAMILIES, GRID, TOKENS, randomize, relative
from torch import Tensor, nn

import hhattn
from hhattn.nn import (
    BlockLinearAttention,
    BlockSparseAttention,
    NormModulate,
    QKNormRoPE,
    Rope3D,
    SparseLinearAttention,
    VideoSparseAttention,
)


def attention_of(name: str) -> nn.Module:
    family = next(f for f in FAMILIES if f.name == name)
    return family.attentions(family.model())[0]


ALL = hhattn.masks.dense(hhattn.VideoLayout(*GRID), block_size=(16, 16))
LATENTS = torch.empty(1, 4, GRID[0], 2 * GRID[1], 2 * GRID[2])


def heads(attention: nn.Module, table: Tensor) -> Tensor:
    return table.unflatten(2, (attention.heads, -1))


def tables(name: str, attention: nn.Module) -> tuple[dict[str, object], tuple[Tensor, Tensor]]:
    """diffusers' rotary argument of a call, and the same for our layers."""
    dim = attention.to_q.out_features // attention.heads
    cos, sin = hhattn.rope_3d(GRID, dim)
    if name in ("LTX-Video", "LTX-2"):
        cos, sin = (table.repeat(1, attention.heads)[None] for table in (cos, sin))
        argument = "image_rotary_emb" if name == "LTX-Video" else "query_rotary_emb"
        return {argument: (cos, sin)}, (heads(attention, cos), heads(attention, sin))
    return {"rotary_emb": (cos[None, :, None], sin[None, :, None])}, (cos, sin)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Wan", "SANA-Video", "LTX-Video", "LTX-2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention(name: str, dtype: torch.dtype) -> None:
    attention = attention_of(name).to(dtype)
    x = randn(2, TOKENS, attention.to_q.in_features, dtype=dtype, seed=3)
    argument, rope = tables(name, attention)
    expected = attention(x, **argument)
    bound = 2e-5 if dtype == torch.float32 else 2e-2
    if name == "SANA-Video":
        layer = BlockLinearAttention.from_diffusers(attention)
        assert relative(layer(x, rope=rope), expected) <= bound
        return
    made = [cls.from_diffusers(attention) for cls in (BlockSparseAttention, SparseLinearAttention)]
    made.append(VideoSparseAttention.from_diffusers(attention, policy=hhattn.masks.top_k(ratio=1.0)))
    for layer in made:
        more = () if isinstance(layer, VideoSparseAttention) else (ALL,)
        assert relative(layer(x, *more, rope=rope), expected) <= bound
        assert {p.dtype for p in layer.parameters()} == {dtype}


def test_weights_are_shared_and_new_ones_zero() -> None:
    attention = attention_of("Wan")
    layer = SparseLinearAttention.from_diffusers(attention, feature_map="relu")
    theirs = {id(p) for p in attention.parameters()}
    new = {name for name, p in layer.named_parameters() if id(p) not in theirs}
    assert new == {"proj_l.weight", "proj_l.bias"}
    assert len(theirs - {id(p) for p in layer.parameters()}) == 0
    assert layer.feature_map == "relu"
    assert all(p.eq(0).all() for p in layer.proj_l.parameters())
    assert set(layer.state_dict()) == set(SparseLinearAttention(24, 2).state_dict())
    layer(randn(1, TOKENS, 24), ALL).sum().backward()
    assert (attention.to_v.weight.grad != 0).any()
    assert (layer.proj_l.bias.grad != 0).any()


@torch.no_grad()
def test_adapters_take_part() -> None:
    peft = pytest.importorskip("peft")
    family = next(f for f in FAMILIES if f.name == "Wan")
    model = family.model()
    torch.manual_seed(0)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    attention = family.attentions(model)[0]
    x, (argument, rope) = randn(1, TOKENS, 24, seed=3), tables("Wan", attention)
    layer = BlockSparseAttention.from_diffusers(attention)
    assert relative(layer(x, ALL, rope=rope), attention(x, **argument)) <= 2e-5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("HunyuanVideo", "attention has add_q_proj: Linear"),
        ("Mochi", "attention has add_q_proj: Linear"),
        ("LTX-2.3", "attention has to_gate_logits: Linear"),
        ("CogVideoX", "attention's q and k norms are layer norms"),
    ],
)
def test_layers_that_do_more_are_refused(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        BlockSparseAttention.from_diffusers(attention_of(name))


def test_other_refusals() -> None:
    attention = attention_of("Wan")
    with pytest.raises(ValueError, match="attention is a Linear without to_q"):
        BlockSparseAttention.from_diffusers(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="settings has qk_norm, which is the attention layer's"):
        BlockSparseAttention.from_diffusers(attention, qk_norm=None)
    attention.to_out[1].p = 0.1
    with pytest.raises(ValueError, match="attention has dropout"):
        BlockSparseAttention.from_diffusers(attention)
    attention.to_k = nn.Linear(7, 24)
    with pytest.raises(ValueError, match="attention is cross-attention"):
        BlockSparseAttention.from_diffusers(attention)
    with pytest.raises(ValueError, match="norm is a GroupNorm"):
        NormModulate.from_diffusers(nn.GroupNorm(1, 4))
    with pytest.raises(ValueError, match="accepted: one dim"):
        NormModulate.from_diffusers(nn.LayerNorm((2, 4)))
    with pytest.raises(ValueError, match="rope is a SimpleNamespace"):
        Rope3D.from_diffusers(SimpleNamespace())
    attention.norm_q = attention.norm_k = None
    with pytest.raises(ValueError, match="attention has no norms of q and k"):
        QKNormRoPE.from_diffusers(attention)


@torch.no_grad()
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("kind", ["LayerNorm", "FP32LayerNorm", "RMSNorm"])
def test_norm(kind: str, affine: bool) -> None:
    cls = nn.LayerNorm if kind == "LayerNorm" else getattr(normalization, kind)
    norm = randomize(nn.Sequential(cls(24, eps=1e-4, elementwise_affine=affine)))[0]
    module, x = NormModulate.from_diffusers(norm), randn(2, 6, 24, seed=1)
    scale, shift = randn(2, 1, 24, seed=2), randn(2, 1, 24, seed=3)
    assert relative(module(x, scale, shift), norm(x) * (1 + scale) + shift) < 1e-5
    assert {id(p) for p in module.parameters()} == {id(p) for p in norm.parameters()}
    assert (module.weight is None) == (not affine)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Wan", "HunyuanVideo", "CogVideoX", "Mochi"])
def test_qk_norm_rope(name: str) -> None:
    """Norms over all heads, of each head, layer norms with biases; text in front, which isn't turned."""
    attention = attention_of(name)
    module = QKNormRoPE.from_diffusers(attention)
    text = 3 if name == "CogVideoX" else 0
    flat = [randn(2, TOKENS + text, attention.to_q.out_features, seed=i) for i in (1, 2)]
    q, k = (heads(attention, x) for x in flat)
    rope = hhattn.rope_3d(GRID, q.shape[3])
    got = module(q, k, *rope, text_len=text, text_first=True)
    plain = [norm(x if name == "Wan" else heads(attention, x)) for norm, x in zip(
        (attention.norm_q, attention.norm_k), flat, strict=True
    )]  # fmt: skip
    plain = [heads(attention, x) if x.ndim == 3 else x for x in plain]
    expected = hhattn.qk_norm_rope(*plain, *rope, norm=None, text_len=text, text_first=True)
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < 1e-5
    theirs = {id(p) for norm in (attention.norm_q, attention.norm_k) for p in norm.parameters()}
    assert {id(p) for p in module.parameters()} == theirs


@pytest.mark.parametrize("name", ["Wan", "SANA-Video", "HunyuanVideo", "HunyuanVideo 1.5"])
def test_rope(name: str) -> None:
    rope = next(f for f in FAMILIES if f.name == name).make().rope
    for made, ours in zip(rope(LATENTS), Rope3D.from_diffusers(rope)(GRID), strict=True):
        torch.testing.assert_close(ours, made.flatten(0, -2), rtol=1e-6, atol=1e-6)
    far = Rope3D.from_diffusers(rope)((1, 1, 1), offset=(5000, 0, 0))  # past any table
    assert all(table.isfinite().all() for table in far)


def test_ropes_base_is_read_from_its_table() -> None:
    from diffusers.models.transformers.transformer_wan import WanRotaryPosEmbed

    for theta in (256.0, 10000.0, 500000.0):
        rope = WanRotaryPosEmbed(128, (1, 2, 2), 1024, theta)
        assert Rope3D.from_diffusers(rope).theta == theta
    with pytest.raises(ValueError, match="table is too small"):
        Rope3D.from_diffusers(WanRotaryPosEmbed(128, (1, 2, 2), 1))
