"""swap on small, randomly initialised diffusers transformers: the same numbers, and a way back."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import randn
from torch import Tensor, nn

import hhattn

pytest.importorskip("diffusers")

from diffusers import SanaVideoTransformer3DModel, WanTransformer3DModel
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_sana_video import SanaLinearAttnProcessor3_0, WanRotaryPosEmbed
from model_zoo import FAMILIES, GRID, TOKENS, Family, randomize, relative


def family(name: str) -> Family:
    return next(f for f in FAMILIES if f.name == name)


@pytest.fixture
def sana() -> SanaVideoTransformer3DModel:
    return family("SANA-Video").model()


@pytest.fixture
def wan() -> WanTransformer3DModel:
    return family("Wan").model()


def run(model: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """One forward on seeded latents of GRID."""
    latents = randn(2, 4, GRID[0], 2 * GRID[1], 2 * GRID[2], dtype=dtype, seed=1)
    text, timestep = randn(2, 7, 16, dtype=dtype, seed=2), torch.tensor([3.0, 700.0])
    if isinstance(model, SanaVideoTransformer3DModel):
        return model(latents, encoder_hidden_states=text, timestep=timestep, return_dict=False)[0]
    return model(latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]


@pytest.mark.parametrize(("heads", "dim"), [(20, 112), (2, 12)])
def test_op_equals_diffusers_sana_processor(heads: int, dim: int) -> None:
    """The op with its default settings is SANA-Video's linear attention, at the real model's head dim too."""
    attn = Attention(
        query_dim=heads * dim, heads=heads, dim_head=dim, kv_heads=heads, qk_norm="rms_norm_across_heads", bias=True,
        cross_attention_dim=None, processor=SanaLinearAttnProcessor3_0(),
    )  # fmt: skip
    randomize(attn)
    rotary = WanRotaryPosEmbed(dim, (1, 1, 1), 32)(torch.empty(1, 1, *GRID))
    x = randn(1, TOKENS, heads * dim, seed=3)
    with torch.no_grad():
        expected = attn(x, rotary_emb=rotary)
        q, k = (
            norm(to(x)).unflatten(2, (heads, dim)) for norm, to in ((attn.norm_q, attn.to_q), (attn.norm_k, attn.to_k))
        )
        v = attn.to_v(x).unflatten(2, (heads, dim))
        rope = tuple(table[0, :, 0] for table in rotary)
        out = attn.to_out[0](hhattn.block_linear_attention(q, k, v, rope=rope).flatten(2))
        assert relative(out, expected) < 1e-5
        ours = hhattn.block_linear_attention(q, k, v, rope=hhattn.rope_3d(GRID, dim))
        assert relative(attn.to_out[0](ours.flatten(2)), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("norms", [True, False])
def test_sana_video_same_numbers_and_undo(sana: SanaVideoTransformer3DModel, norms: bool) -> None:
    before, state = run(sana), {name: x.clone() for name, x in sana.state_dict().items()}
    processors = dict(sana.attn_processors)
    handle = hhattn.swap(sana, norms=norms)
    swapped = run(sana)
    assert relative(swapped, before) < 1e-5
    assert not torch.equal(swapped, before), "nothing was swapped"
    assert "swapped    2 x self-attention: hhattn.block_linear_attention" in handle.report()
    assert "left       2 x cross-attention" in handle.report()
    assert ("swapped    2 x q/k norm" in handle.report()) == norms
    assert ("swapped    2 x block norms: hhattn.norm_modulate" in handle.report()) == norms
    handle.undo()
    assert torch.equal(run(sana), before)
    assert all(a is b for a, b in zip(sana.attn_processors.values(), processors.values(), strict=True))
    assert sana.state_dict().keys() == state.keys()
    assert all(torch.equal(x, state[name]) for name, x in sana.state_dict().items())
    handle.undo()


@torch.no_grad()
@pytest.mark.parametrize("rope", [True, False])
@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_wan_same_numbers_and_undo(wan: WanTransformer3DModel, masked: bool, norms: bool, rope: bool) -> None:
    dense = torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool)
    attention = hhattn.BlockMask.from_dense(dense, block_size=(16, 16)) if masked else "exact"
    before = run(wan)
    with hhattn.swap(wan, attention=attention, norms=norms, rope=rope) as handle:
        assert relative(run(wan), before) < 2e-5
        by = "hhattn.block_sparse_attention" if masked else "hhattn.attention"
        assert f"swapped    2 x self-attention: {by}" in handle.report()
        assert ("swapped    2 x rope" in handle.report()) == rope
        assert ("swapped    2 x block norms: hhattn.norm_modulate" in handle.report()) == norms
        assert all(layer.swapped for layer in handle.layers if layer.part == "self-attention")
    assert torch.equal(run(wan), before)


@torch.no_grad()
def test_wan_sparse_mask_equals_sdpa_with_that_mask(wan: WanTransformer3DModel) -> None:
    """A mask that is not dense reaches the scores: the same model with SDPA given the same mask."""
    dense = torch.rand(TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)) < 0.5
    dense |= torch.eye(TOKENS, dtype=torch.bool)
    mask = hhattn.BlockMask.from_dense(dense[None, None], block_size=(16, 16))
    plain = run(wan)
    hooks = [
        block.attn1.register_forward_pre_hook(lambda _, args: (args[0], args[1], dense[None, None], *args[3:]))
        for block in wan.blocks
    ]
    expected = run(wan)
    for hook in hooks:
        hook.remove()
    with hhattn.swap(wan, attention=mask):
        got = run(wan)
    assert relative(got, expected) < 2e-5
    assert relative(got, plain) > 1e-3


@torch.no_grad()
def test_wan_runs_by_a_plan(wan: WanTransformer3DModel) -> None:
    """Dense first step and first layer, then masks made from q and k, in blocks of tile order."""
    layout, before = hhattn.VideoLayout(*GRID, tile=(1, 2, 2)), run(wan)
    policy = hhattn.masks.top_k(ratio=0.4)
    selector = hhattn.masks.Selector(hhattn.masks.mean_pool(), policy, (4, 4), order="tile", layout=layout)
    plan = hhattn.masks.SparsityPlan(selector, dense_steps=1, dense_layers=1)
    with hhattn.swap(wan, attention=plan) as handle:
        assert "swapped    2 x self-attention: hhattn.block_sparse_attention, as the plan says" in handle.report()
        assert relative(run(wan), before) < 2e-5
        assert plan.nbytes == 0
        assert relative(run(wan), before) > 1e-3
        assert plan.nbytes > 0
        plan.reset()
        assert relative(run(wan), before) < 2e-5
    assert torch.equal(run(wan), before)


@torch.no_grad()
def test_wan_takes_masks_of_either_order(wan: WanTransformer3DModel) -> None:
    """A mask built for tile order means the same pattern: the model's tokens are in raster order."""
    layout = hhattn.VideoLayout(*GRID, tile=(1, 2, 2))
    results = []
    for order in ("raster", "tile"):
        mask = hhattn.masks.sliding_tile(layout, (1, 1, 1), block_size=(16, 16), order=order)
        with hhattn.swap(wan, attention=mask):
            results.append(run(wan))
    assert relative(results[1], results[0]) < 2e-5
    assert relative(results[0], run(wan)) > 1e-3, "the pattern leaves nothing out"


@torch.no_grad()
def test_wan_variants(wan: WanTransformer3DModel) -> None:
    """Without a norm before cross-attention (its default), and with a timestep a token (Wan 2.2 TI2V)."""
    plain = randomize(WanTransformer3DModel.from_config({**wan.config, "cross_attn_norm": False}))
    before = run(plain)
    with hhattn.swap(plain):
        assert relative(run(plain), before) < 2e-5

    latents, text = randn(2, 4, GRID[0], 2 * GRID[1], 2 * GRID[2], seed=1), randn(2, 7, 16, seed=2)
    timestep = 1000 * randn(2, TOKENS, seed=3).sigmoid()
    before = wan(latents, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0]
    with hhattn.swap(wan) as handle:
        assert relative(wan(latents, timestep, text, return_dict=False)[0], before) < 2e-5
        assert all(layer.swapped for layer in handle.layers if layer.part == "block norms")


@torch.no_grad()
def test_a_block_someone_patched_keeps_its_forward(
    wan: WanTransformer3DModel, caplog: pytest.LogCaptureFixture
) -> None:
    def forward(*args: Tensor) -> Tensor:
        return type(wan.blocks[0]).forward(wan.blocks[0], *args)

    wan.blocks[0].forward = forward
    before = run(wan)
    handle = hhattn.swap(wan)
    assert "left       1 x block norms: someone replaced the block's forward" in handle.report()
    assert relative(run(wan), before) < 2e-5
    wan.blocks[1].forward = forward
    handle.undo()
    assert wan.blocks[1].forward is forward
    assert "given another forward since" in caplog.text


@torch.no_grad()
def test_wan_fused_projections(wan: WanTransformer3DModel) -> None:
    before = run(wan)
    for block in wan.blocks:
        block.attn1.fuse_projections()
    with hhattn.swap(wan):
        assert relative(run(wan), before) < 2e-5


@torch.no_grad()
def test_pipelines_and_classes(sana: SanaVideoTransformer3DModel, wan: WanTransformer3DModel) -> None:
    """Every known component of a pipeline is swapped; another instance of the class is not."""
    pipeline = SimpleNamespace(
        components={"transformer": wan, "transformer_2": sana, "vae": nn.Linear(1, 1), "other": None}
    )
    other = randomize(WanTransformer3DModel.from_config(wan.config))
    before = run(other)
    handle = hhattn.swap(pipeline)
    assert {layer.path.split(".")[0] for layer in handle.layers if layer.swapped} == {"transformer", "transformer_2"}
    assert torch.equal(run(other), before)


def test_refuses(sana: SanaVideoTransformer3DModel, wan: WanTransformer3DModel) -> None:
    with pytest.raises(
        ValueError, match=r"Linear, which swap doesn't know; accepted: .*SanaVideoTransformer3DModel, Wan"
    ):
        hhattn.swap(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="attention='fast'; accepted for Wan"):
        hhattn.swap(wan, attention="fast")
    with pytest.raises(TypeError, match="attention is a Tensor"):
        hhattn.swap(wan, attention=torch.ones(2, 2))
    with pytest.raises(ValueError, match="accepted for SANA-Video"):
        hhattn.swap(sana, attention="sliding")
    with pytest.raises(ValueError, match="rope=False"):
        hhattn.swap(sana, rope=False)
    both = SimpleNamespace(components={"transformer": wan, "transformer_2": sana})
    with pytest.raises(ValueError, match="rope=False"):
        hhattn.swap(both, rope=False)
    assert type(wan.blocks[0].attn1.processor).__module__.startswith("diffusers"), "a refused swap must change nothing"


def test_masks_are_refused_not_ignored(sana: SanaVideoTransformer3DModel, wan: WanTransformer3DModel) -> None:
    x = randn(1, 6, 24)
    for model, blocks in ((sana, "transformer_blocks"), (wan, "blocks")):
        hhattn.swap(model)
        with pytest.raises(ValueError, match="attention_mask must be None"):
            getattr(model, blocks)[0].attn1(x, attention_mask=torch.ones(1, 6))
        with pytest.raises(ValueError, match="encoder_hidden_states must be None"):
            getattr(model, blocks)[0].attn1(x, encoder_hidden_states=x)


def test_foreign_processors_are_left(wan: WanTransformer3DModel, caplog: pytest.LogCaptureFixture) -> None:
    class Mine:
        def __call__(self, attn: nn.Module, x: Tensor, *_: object) -> Tensor:
            return x

    wan.blocks[0].attn1.set_processor(Mine())
    handle = hhattn.swap(wan)
    assert "left       1 x self-attention: its processor is a Mine" in handle.report()
    later = Mine()
    wan.blocks[1].attn1.set_processor(later)
    handle.undo()
    assert wan.blocks[1].attn1.processor is later
    assert "given another processor since" in caplog.text


def test_hhattn_imports_without_diffusers() -> None:
    code = "import sys; sys.modules['diffusers'] = None; import hhattn, hhattn.integrations; hhattn.swap; print('ok')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ok", done.stderr


@torch.no_grad()
def test_backend_of_diffusers(wan: WanTransformer3DModel) -> None:
    """Known to the model's own method and the context manager, cross-attention included, and compiled whole."""
    from diffusers.models import attention_dispatch

    from hhattn.integrations.diffusers.backend import attend, register_backend

    before, active = run(wan), attention_dispatch._AttentionBackendRegistry._active_backend
    register_backend()
    register_backend()
    try:
        wan.set_attention_backend("hhattn")
        assert {block.attn2.processor._attention_backend.value for block in wan.blocks} == {"hhattn"}
        assert attention_dispatch._AttentionBackendRegistry._backends["hhattn"] is attend
        assert relative(run(wan), before) < 2e-5
        for block in wan.blocks:
            block.compile(fullgraph=True, backend="aot_eager")
        assert relative(run(wan), before) < 2e-5
    finally:
        attention_dispatch._AttentionBackendRegistry.set_active_backend(active)
    q, k, v = (randn(2, 6, 2, 8, seed=i) for i in range(3))
    keep = torch.rand(2, 1, 6, 6) < 0.7
    keep |= torch.eye(6, dtype=torch.bool)
    settings: list[dict[str, Any]] = [{}, {"is_causal": True}, {"scale": 0.3}]
    settings += [{"attn_mask": mask} for mask in (keep, keep[:, 0, 0], keep[0, 0])]  # of pairs, of keys, of all pairs
    calls = [((q, k, v), some) for some in settings]
    calls += [((q.double(), k.double(), v.double()), {}), ((q, k[:, :0], v[:, :0]), {})]
    for qkv, some in calls:
        with attention_dispatch.attention_backend("hhattn"):
            got = attention_dispatch.dispatch_attention_fn(*qkv, **some)
        torch.testing.assert_close(got, attention_dispatch.dispatch_attention_fn(*qkv, **some))
    assert not torch.equal(attend(q, k, v, dropout_p=0.5), attend(q, k, v))
    with pytest.raises(ValueError, match="return_lse=True: hhattn's backend accepts False"):
        attend(q, k, v, return_lse=True)


def test_backend_refuses_another_dispatcher(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch

    from hhattn.integrations.diffusers.backend import register_backend

    monkeypatch.delattr(attention_dispatch, "AttentionBackendName")
    with pytest.raises(RuntimeError, match=r"has another dispatcher than the releases tested"):
        register_backend()


@torch.no_grad()
def test_ltx2_variants() -> None:
    """Streams that don't meet, all values in place of what is attended, texts modulated by a table alone, positions
    that are given, and a mask of pairs, which is refused."""
    ltx, later = family("LTX-2"), family("LTX-2.3")
    fixed = randomize(type(later.make()).from_config({**later.make().config, "use_prompt_adaln_single": False}))
    perturbed = {"perturbation_mask": torch.zeros(2), "spatio_temporal_guidance_blocks": [0]}
    coords = 20 * randn(2, 3, TOKENS, 2, seed=8).sigmoid()
    for own, model, more in (
        (ltx, ltx.model(), {"isolate_modalities": True}),
        (ltx, ltx.model(), {"video_coords": coords}),
        (later, later.model(), perturbed),
        (later, fixed, {}),
    ):
        inputs = {**own.inputs(torch.float32), **more}
        before = model(**inputs, return_dict=False)
        with hhattn.swap(model):
            after = model(**inputs, return_dict=False)
        assert all(relative(a, b) < 2e-5 for a, b in zip(after, before, strict=True)), more.keys()
        assert torch.equal(model(**inputs, return_dict=False)[0], before[0])
    model = ltx.model()
    with hhattn.swap(model), pytest.raises(ValueError, match="attention_mask must be None"):
        model(**ltx.inputs(torch.float32), video_self_attention_mask=torch.ones(2, TOKENS, TOKENS))


@torch.no_grad()
@pytest.mark.parametrize("name", ["HunyuanVideo", "HunyuanVideo 1.5", "Mochi"])
def test_padding_is_cut_off(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each text's own keys, without a mask; both at once where no text has padding."""
    padded = family(name)
    model, inputs = padded.model(), padded.inputs(torch.float32)
    full = {key: torch.ones_like(x) if "attention_mask" in key else x for key, x in inputs.items()}
    seen, attention = [], hhattn.attention

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((len(q), k.shape[1]))
        return attention(q, k, v)

    monkeypatch.setattr(hhattn, "attention", spy)
    for given in (inputs, full):
        before = model(**given, return_dict=False)[0]
        with hhattn.swap(model):
            assert relative(model(**given, return_dict=False)[0], before) <= 2e-5
    tokens, layers = TOKENS + padded.text_len, len(padded.attentions(model))
    second = tokens - 5 if name == "HunyuanVideo 1.5" else tokens - 3  # texts of 4 of 7 and 1 of 3 tokens
    assert seen == [(1, tokens), (1, second)] * layers + [(2, tokens)] * layers


@torch.no_grad()
def test_padding_amid_the_text_is_masked() -> None:
    layer = family("HunyuanVideo").model().transformer_blocks[0].attn
    x, text = randn(1, 6, 32, seed=1), randn(1, 4, 32, seed=2)
    mask = torch.tensor([True] * 7 + [False] + [True] * 2)[None, None, None]
    expected = layer(x, encoder_hidden_states=text, attention_mask=mask)
    model = family("HunyuanVideo").model()
    with hhattn.swap(model):
        got = model.transformer_blocks[0].attn(x, encoder_hidden_states=text, attention_mask=mask)
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) <= 2e-5
