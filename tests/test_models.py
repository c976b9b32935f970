"""swap, family by family: what a user relies on, for every model that it knows."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("diffusers")

from helpers import randn
from model_zoo import FAMILIES, TOKENS, Family, relative

import hhattn

masks = hhattn.masks
by_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
with_scores = pytest.mark.parametrize("family", [f for f in FAMILIES if not f.linear], ids=lambda family: family.name)


@torch.no_grad()
@by_family
@pytest.mark.parametrize(("norms", "rope"), [(True, True), (False, True), (True, False)])
def test_exact_swap_gives_the_same_and_undo_the_same_bits(family: Family, norms: bool, rope: bool) -> None:
    if family.linear and not rope:
        pytest.skip("its rotation is inside the op")
    model = family.model()
    before, state = family.run(model), {name: x.clone() for name, x in model.state_dict().items()}
    handle = hhattn.swap(model, norms=norms, rope=rope)
    after = family.run(model)
    assert relative(after, before) <= 2e-5
    if os.environ.get("HHATTN_IMPL") != "reference":  # whose bits are diffusers' own for most families
        assert not torch.equal(after, before), "nothing was swapped"
    attention = [layer for layer in handle.layers if layer.part.endswith("self-attention")]
    assert len(attention) == len(family.attentions(model))
    assert all(layer.swapped for layer in attention)
    assert [layer.swapped for layer in handle.layers if layer.part == "q/k norm"] == [norms] * len(attention)
    fused = {layer.path: layer.swapped for layer in handle.layers if layer.part == "block norms"}
    assert len(fused) == len(family.all_blocks(model))
    assert fused == {path: norms and path.split(".")[0] not in family.own_norms for path in fused}
    assert all(layer.swapped == rope for layer in handle.layers if layer.part == "rope")
    assert model.state_dict().keys() == state.keys()
    handle.undo()
    assert torch.equal(family.run(model), before)
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())


@torch.no_grad()
@by_family
def test_bfloat16_is_no_worse_than_diffusers(family: Family, tmp_path: Path) -> None:
    """All of it in bfloat16, and as diffusers loads it, with some modules kept in float32."""
    exact = family.run(family.model())
    family.model().save_pretrained(tmp_path)
    for model in (
        family.model(torch.bfloat16),
        type(family.make()).from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval(),
    ):
        theirs = relative(family.run(model, torch.bfloat16).float(), exact)
        with hhattn.swap(model) as handle:
            assert relative(family.run(model, torch.bfloat16).float(), exact) < 1.5 * theirs
            left = {(layer.part, layer.path.split(".")[0]) for layer in handle.layers if not layer.swapped}
            own = {("block norms", name) for name in family.own_norms}
            assert {place for place in left if place[0] != "cross-attention"} == own


@by_family
def test_gradients_are_the_same(family: Family) -> None:
    model = family.model()
    weights = [p for p in model.parameters() if p.requires_grad]

    def gradients() -> list[torch.Tensor]:
        grads = torch.autograd.grad(family.run(model).square().sum(), weights, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(weights, grads, strict=True)]

    expected = gradients()
    with hhattn.swap(model):
        got = gradients()
    # k's bias has no gradient to speak of under softmax: compare with the largest of all
    largest = max(x.abs().max() for x in expected)
    assert all((a - b).abs().max() < 1e-4 * largest for a, b in zip(got, expected, strict=True))


@torch.no_grad()
@with_scores
@pytest.mark.parametrize("order", ["raster", "tile"])
def test_a_pattern_is_made_for_the_models_own_grid(family: Family, order: str) -> None:
    """A function from the layout: the whole pattern is exact, a sparser one equals the same as a mask made by hand."""
    model = family.model()
    before = family.run(model)
    settings = {"block_size": (16, 16), "order": order}

    def everything(layout: hhattn.VideoLayout) -> hhattn.BlockMask:
        assert (layout.frames, layout.height, layout.width) == family.layout().grid
        assert (layout.text_len, layout.text_first) == (family.text_len, family.text_first)
        return masks.dense(layout, **settings)

    with hhattn.swap(model, attention=everything):
        assert relative(family.run(model), before) <= 2e-5

    def near(layout: hhattn.VideoLayout) -> hhattn.BlockMask:
        return masks.frame_window(layout, 0, **settings) | masks.text(layout, **settings)

    with hhattn.swap(model, attention=near):
        sparse = family.run(model)
    assert relative(sparse, before) > 1e-3, "the pattern leaves nothing out"
    with hhattn.swap(model, attention=near(family.layout())):
        assert relative(family.run(model), sparse) <= 2e-5
    assert torch.equal(family.run(model), before)


PATTERNS = {
    "radial": lambda layout: masks.radial(layout, 0.5) | masks.text(layout),
    "sliding_tile": lambda layout: (
        masks.sliding_tile(layout, (1, 1, 3), order="tile") | masks.text(layout, order="tile")
    ),
}


@torch.no_grad()
@with_scores
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_is_diffusers_own_attention_under_its_mask(
    family: Family, pattern: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if diffusers had given SDPA the pattern's dense form, beside the padding that it gives it anyway."""
    model, make = family.model(), PATTERNS[pattern]
    with hhattn.swap(model, attention=lambda layout: make(replace(layout, tile=(1, 2, 2)))):
        swapped = family.run(model)
    dense = make(family.layout()).to_dense(order="raster")[0, 0]
    assert 0.1 < dense.float().mean() < 0.9
    sdpa, met = F.scaled_dot_product_attention, []

    def masked(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **settings: Any) -> Tensor:
        tokens = query.shape[-2]
        if key.shape[-2] == tokens >= TOKENS:  # not across streams; fewer than all where a model leaves padding out
            met.append(tokens)
            own = dense[:tokens, :tokens]
            attn_mask = own if attn_mask is None else own & attn_mask.bool()
        return sdpa(query, key, value, attn_mask=attn_mask, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", masked)
    expected = family.run(model)
    assert met, "diffusers doesn't attend by SDPA any more"
    assert relative(swapped, expected) <= 2e-5


@torch.no_grad()
@with_scores
def test_a_plan_runs(family: Family) -> None:
    """Everything is kept at the first step, a part at the second; padded texts are refused, not ignored."""
    model = family.model()
    selector = masks.Selector(masks.mean_pool(), masks.top_k(ratio=0.4), (8, 8))
    plan = masks.SparsityPlan(selector, dense_steps=1)
    before = family.run(model)
    with hhattn.swap(model, attention=plan):
        if family.padded:
            with pytest.raises(ValueError, match="takes no padded texts"):
                family.run(model)
        else:
            assert relative(family.run(model), before) <= 2e-5
            assert relative(family.run(model), before) > 1e-3


@torch.no_grad()
@by_family
@pytest.mark.parametrize("attention", ["exact", "pattern"])
def test_attention_layers_compile_whole(family: Family, attention: str) -> None:
    """With a pattern too, whose mask is there before the layers are: lengths of padded texts are read outside them."""
    if family.linear and attention == "pattern":
        pytest.skip("linear: no scores to mask")
    settings = {"block_size": (16, 16)}

    def near(layout: hhattn.VideoLayout) -> hhattn.BlockMask:
        return masks.frame_window(layout, 0, **settings) | masks.text(layout, **settings)

    model = family.model()
    torch.compiler.reset()  # families share classes of layers, whose compilations are limited in number
    with hhattn.swap(model, attention=near if attention == "pattern" else "exact"):
        expected = family.run(model)
        for layer in family.attentions(model):
            layer.compile(fullgraph=True, backend="aot_eager")
        assert relative(family.run(model), expected) < 1e-5


@torch.no_grad()
@by_family
def test_save_and_load(family: Family, tmp_path: Path) -> None:
    """A swapped model is saved as it was, and what is loaded is diffusers' own."""
    model = family.model()
    before = family.run(model)
    with hhattn.swap(model):
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(family.run(loaded), before)
    with hhattn.swap(loaded):
        assert relative(family.run(loaded), before) <= 2e-5


@torch.no_grad()
@by_family
def test_lora(family: Family) -> None:
    """Adapters put on before the swap or after it take part."""
    peft = pytest.importorskip("peft")
    model = family.model()
    plain = family.run(model)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    torch.manual_seed(0)
    model.add_adapter(config)
    adapted = family.run(model)
    assert relative(adapted, plain) > 1e-3
    with hhattn.swap(model):
        assert relative(family.run(model), adapted) <= 2e-5
    model.disable_adapters()
    with hhattn.swap(model):
        assert relative(family.run(model), plain) <= 2e-5
        model.enable_adapters()
        assert relative(family.run(model), adapted) <= 2e-5


@by_family
@pytest.mark.parametrize("attention", ["exact", "pattern"])
def test_gradient_checkpointing(family: Family, attention: str) -> None:
    if family.linear and attention == "pattern":
        pytest.skip("linear: no scores to mask")
    settings = {"block_size": (16, 16)}

    def near(layout: hhattn.VideoLayout) -> hhattn.BlockMask:
        return masks.frame_window(layout, 0, **settings) | masks.text(layout, **settings)

    model = family.model()
    with hhattn.swap(model, attention=near if attention == "pattern" else "exact"):
        plain = torch.autograd.grad(family.run(model).square().sum(), family.attentions(model)[0].to_v.weight)[0]
        model.enable_gradient_checkpointing()
        again = torch.autograd.grad(family.run(model).square().sum(), family.attentions(model)[0].to_v.weight)[0]
    assert relative(again, plain) < 1e-5


@pytest.mark.parametrize("name", ["HunyuanVideo", "Mochi"])
def test_a_mask_that_is_no_padding_is_refused(name: str) -> None:
    family = next(f for f in FAMILIES if f.name == name)
    model = family.model()
    attention = family.attentions(model)[0]
    x, text = randn(1, 6, 32), randn(1, 4, 16 if name == "Mochi" else 32)
    with hhattn.swap(model):
        for mask in (torch.ones(1, 1, 10, 10, dtype=torch.bool), torch.zeros(1, 4)):
            with pytest.raises(ValueError, match="accepted is a bool or whole number for each of the last tokens"):
                attention(x, encoder_hidden_states=text, attention_mask=mask)


@torch.no_grad()
@with_scores
def test_a_mask_for_another_grid_is_refused(family: Family) -> None:
    model, own = family.model(), family.layout()
    other = hhattn.VideoLayout(own.width, own.height, own.frames, text_len=own.text_len, text_first=own.text_first)
    with hhattn.swap(model, attention=masks.dense(other)), pytest.raises(ValueError, match="this call's tokens are"):
        family.run(model)
    with hhattn.swap(model), pytest.raises(ValueError, match="attention would change nothing"):
        hhattn.swap(model, attention=masks.dense(own))


@torch.no_grad()
@by_family
def test_what_a_family_cannot_have_is_refused(family: Family) -> None:
    model = family.model()
    before = family.run(model)
    with pytest.raises(ValueError, match="attention='fast'; accepted for"):
        hhattn.swap(model, attention="fast")
    with pytest.raises((TypeError, ValueError), match="attention"):
        hhattn.swap(model, attention=torch.ones(TOKENS, TOKENS))
    assert torch.equal(family.run(model), before)
