"""What swap takes as attention beside masks: the hybrid, chunks of linear attention, layer by layer, step by step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from helpers import randn
from model_zoo import FAMILIES, GRID, TOKENS, Family, relative
from torch import Tensor

import hhattn
from hhattn import VideoLayout, masks
from hhattn.integrations import BlockLinear, SparseLinear

WITH_SCORES = [f for f in FAMILIES if not f.linear]
with_scores = pytest.mark.parametrize("family", WITH_SCORES, ids=lambda family: family.name)
BLOCKS = {"block_size": (16, 16)}


def named(name: str) -> Family:
    return next(f for f in FAMILIES if f.name == name)


def near(layout: VideoLayout) -> hhattn.BlockMask:
    return masks.frame_window(layout, 0, **BLOCKS) | masks.text(layout, **BLOCKS)


def everything(layout: VideoLayout) -> hhattn.BlockMask:
    return masks.dense(layout, **BLOCKS)


def with_whole_texts(family: Family) -> Family:
    """The same without padding."""

    def inputs(dtype: torch.dtype) -> dict[str, Any]:
        given = family.inputs(dtype)
        return {name: torch.ones_like(x) if "attention_mask" in name else x for name, x in given.items()}

    return replace(family, inputs=inputs)


def randomized(handle: hhattn.integrations.Swap) -> hhattn.integrations.Swap:
    for i, parameter in enumerate(handle.parameters()):
        parameter.data = 0.3 * randn(*parameter.shape, seed=50 + i)
    return handle


# ---- the hybrid ----


@torch.no_grad()
@with_scores
def test_sparse_linear_begins_as_its_critical_pairs(family: Family) -> None:
    """Projections of zeros: all pairs critical is the model itself, some is the same as under their mask."""
    model = family.model()
    before = family.run(model)
    if family.padded:
        refused = pytest.raises(ValueError, match="attention is a SparseLinear, which takes no padded texts")
        with hhattn.swap(model, attention=SparseLinear(0.5)), refused:
            family.run(model)
        family = with_whole_texts(family)
        before = family.run(model)
    with hhattn.swap(model, attention=SparseLinear(1.0)) as handle:
        assert "self-attention: hhattn.sparse_linear_attention" in handle.report()
        assert relative(family.run(model), before) <= 2e-5
    with hhattn.swap(model, attention=near):
        sparse = family.run(model)
    assert relative(sparse, before) > 1e-3
    with hhattn.swap(model, attention=SparseLinear(near)) as handle:
        assert relative(family.run(model), sparse) <= 2e-5
        randomized(handle)
        assert relative(family.run(model), sparse) > 1e-3
    selector = masks.Selector(masks.mean_pool(), masks.top_k(ratio=0.4), (8, 8))
    results = []
    for attention in (selector, SparseLinear(selector)):
        with hhattn.swap(model, attention=attention):
            results.append(family.run(model))
    assert relative(results[1], results[0]) <= 2e-5
    assert torch.equal(family.run(model), before)


@torch.no_grad()
@pytest.mark.parametrize("order", ["raster", "tile"])
@pytest.mark.parametrize("whole", [False, True])
def test_sparse_linear_is_the_papers_formula(monkeypatch: pytest.MonkeyPatch, order: str, whole: bool) -> None:
    """Each layer with its own projection, written out for all pairs."""
    family = named("Wan")
    model, layout = family.model(), family.layout()

    def critical(layout: VideoLayout) -> hhattn.BlockMask:
        return masks.frame_window(layout, 0, order=order, **BLOCKS)

    def all_pairs(layout: VideoLayout) -> hhattn.BlockMask:
        return masks.dense(layout, order=order, **BLOCKS)

    attention = SparseLinear(critical, all_pairs if whole else None, feature_map="relu", eps=1e-5)
    with randomized(hhattn.swap(model, attention=attention)) as handle:
        got = family.run(model)
    layers = iter(handle.added.values())

    def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keep = critical(layout).to_dense(order="raster")
        scores = torch.einsum("bihd,bjhd->bhij", q, k)
        exact = (scores / q.shape[3] ** 0.5).masked_fill(~keep, -torch.inf).softmax(-1)
        linear = torch.einsum("bihd,bjhd->bhij", q.relu(), k.relu()) * (1 if whole else ~keep)
        linear = linear / (linear.sum(-1, keepdim=True) + 1e-5)
        exact, linear = (torch.einsum("bhij,bjhd->bihd", p, v) for p in (exact, linear))
        return exact + next(layers)(linear)

    monkeypatch.setattr(hhattn, "attention", formula)
    with hhattn.swap(model):
        assert relative(got, family.run(model)) <= 2e-5
    assert next(layers, None) is None


@torch.no_grad()
def test_blocks_of_tiles_are_chosen_in_tile_order() -> None:
    """Tokens are brought to the selector's order and back: with every block kept nothing changes."""
    family = named("Wan")
    model, layout = family.model(), family.layout()
    before = family.run(model)
    results = []
    for ratio in (1.0, 0.4):
        selector = masks.Selector(masks.mean_pool(), masks.top_k(ratio=ratio), (4, 4), order="tile", layout=layout)
        with hhattn.swap(model, attention=SparseLinear(selector)):
            results.append(family.run(model))
    with hhattn.swap(model, attention=masks.SparsityPlan(selector)):
        assert relative(results[1], family.run(model)) <= 2e-5
    assert relative(results[0], before) <= 2e-5
    assert relative(results[1], before) > 1e-3


def test_projections_are_trained_and_saved_beside_the_model(tmp_path: Path) -> None:
    family = named("Wan")
    model = family.model().requires_grad_(False)
    keys = model.state_dict().keys()
    handle = randomized(hhattn.swap(model, attention=SparseLinear(near)))
    names = [f"blocks.{i}.attn1.proj_l.{part}" for i in range(2) for part in ("weight", "bias")]
    assert list(handle.state_dict()) == names
    assert model.state_dict().keys() == keys
    assert all(not parameter.requires_grad for parameter in model.parameters())

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(family.run(model).square().sum(), list(handle.parameters()))

    plain = gradients()
    assert all(x.abs().max() > 0 for x in plain)
    model.enable_gradient_checkpointing()
    assert all(relative(a, b) < 1e-5 for a, b in zip(gradients(), plain, strict=True))

    with torch.no_grad():
        expected = family.run(model)
        model.save_pretrained(tmp_path)
        torch.save(handle.state_dict(), tmp_path / "proj.pt")
        loaded = type(model).from_pretrained(tmp_path).eval()
        other = hhattn.swap(loaded, attention=SparseLinear(near))
        assert relative(family.run(loaded), expected) > 1e-3
        other.load_state_dict(torch.load(tmp_path / "proj.pt"))
        assert relative(family.run(loaded), expected) <= 2e-5
    with pytest.raises(ValueError, match=r"state doesn't have \['blocks.0.attn1.proj_l.bias'"):
        other.load_state_dict({})


@torch.no_grad()
def test_a_model_kept_in_8_bits_has_projections_in_32() -> None:
    """diffusers' layerwise casting stores weights in float8 and computes in another dtype."""
    family = named("Wan")
    model = family.model()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    before = family.run(model)
    with hhattn.swap(model, attention=SparseLinear(1.0)) as handle:
        assert relative(family.run(model), before) <= 2e-5
        assert {p.dtype for p in handle.parameters()} == {torch.float32}


def test_registered_projections_are_the_models() -> None:
    family = named("Wan")
    model = family.model()
    keys = model.state_dict().keys()
    handle = hhattn.swap(model, attention=SparseLinear(near, register=True))
    assert model.state_dict().keys() - keys == handle.state_dict().keys()
    ours = {id(parameter) for parameter in handle.parameters()}
    assert ours < {id(parameter) for parameter in model.parameters()}
    model.to(torch.bfloat16)
    assert {parameter.dtype for parameter in handle.parameters()} == {torch.bfloat16}
    with pytest.raises(ValueError, match="attention would change nothing"):
        hhattn.swap(model, attention=SparseLinear(near, register=True))
    assert model.state_dict().keys() - keys == handle.state_dict().keys(), "a refused swap must change nothing"
    handle.undo()
    assert model.state_dict().keys() == keys
    model.blocks[1].attn1.proj_l = torch.nn.Linear(12, 12)
    with pytest.raises(ValueError, match=r"register=True: blocks.1.attn1 has a proj_l already"):
        hhattn.swap(model, attention=SparseLinear(near, register=True))
    assert not hasattr(model.blocks[0].attn1, "proj_l")


@torch.no_grad()
@pytest.mark.parametrize("name", ["Wan", "HunyuanVideo"])
def test_layers_of_the_hybrid_compile_whole(name: str) -> None:
    family = with_whole_texts(named(name))
    model = family.model()
    torch.compiler.reset()
    for critical in (0.4, near):
        with randomized(hhattn.swap(model, attention=SparseLinear(critical))):
            expected = family.run(model)
            for attention in family.attentions(model):
                attention.compile(fullgraph=True, backend="aot_eager")
            assert relative(family.run(model), expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["Wan", "HunyuanVideo"])
@pytest.mark.parametrize("whole", [False, True])
def test_models_compile_under_a_pattern(name: str, whole: bool) -> None:
    """Block by block, as diffusers does it, and in one graph; another grid and other texts find their own mask."""
    family = named(name)
    model = family.model()
    torch.compiler.reset()
    inputs = family.inputs(torch.float32)
    other = {**inputs, "hidden_states": randn(2, 4, 2, 6, 8, seed=9)}
    if family.padded:
        other["encoder_attention_mask"] = inputs["encoder_attention_mask"].flip(0)
    with hhattn.swap(model, attention=near):
        expected = [model(**x, return_dict=False)[0] for x in (inputs, other)]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager") if whole else model
        if not whole:
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        for x, out in zip((inputs, other, inputs), (*expected, expected[0]), strict=True):
            assert relative(compiled(**x, return_dict=False)[0], out) < 1e-5


# ---- linear attention in chunks ----


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 2, 3, 9])
def test_chunks_of_linear_attention(frames: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the quadratic formula under a block-causal mask; one chunk is the model itself."""
    family = named("SANA-Video")
    model = family.model()
    before = family.run(model)
    with hhattn.swap(model, attention=BlockLinear(frames)) as handle:
        assert f"hhattn.block_linear_attention, chunks of {frames} frames" in handle.report()
        got = family.run(model)
    chunk = torch.arange(TOKENS) // (frames * GRID[1] * GRID[2])
    keep = chunk[:, None] >= chunk[None]

    def formula(q: Tensor, k: Tensor, v: Tensor, *, chunk_lens: None, rope: tuple[Tensor, Tensor]) -> Tensor:
        assert chunk_lens is None
        q, k = q.relu(), k.relu()
        turned_q, turned_k = hhattn.qk_norm_rope(q, k, *rope, norm=None)
        scores = torch.einsum("bihd,bjhd->bhij", turned_q, turned_k) * keep
        total = (torch.einsum("bihd,bjhd->bhij", q, k) * keep).sum(-1, keepdim=True)
        return torch.einsum("bhij,bjhd->bihd", scores / (total + 1e-15), v)

    monkeypatch.setattr(hhattn, "block_linear_attention", formula)
    with hhattn.swap(model):
        assert relative(got, family.run(model)) <= 2e-5
    assert (relative(got, before) <= 2e-5) == (frames >= GRID[0])


@torch.no_grad()
def test_blocks_without_their_model_have_no_chunks() -> None:
    model = named("SANA-Video").model()
    with hhattn.swap(model, attention=BlockLinear(2)), pytest.raises(RuntimeError, match="the grid isn't known"):
        model.transformer_blocks[0].attn1(randn(1, TOKENS, 24))


# ---- layer by layer, step by step ----


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_each_layer_has_its_own(family: Family) -> None:
    model = family.model()
    sparse = BlockLinear(1) if family.linear else near
    layers = len(family.all_blocks(model))
    before = family.run(model)
    with hhattn.swap(model):
        exact = family.run(model)
    with hhattn.swap(model, attention=["exact"] * layers):
        assert torch.equal(family.run(model), exact)
    with hhattn.swap(model, attention=sparse):
        whole = family.run(model)
    results = [exact, whole]
    for attention in (["exact", *[sparse] * (layers - 1)], [sparse, *["exact"] * (layers - 1)]):
        with hhattn.swap(model, attention=attention) as handle:
            results.append(family.run(model))
            by = [layer.note for layer in handle.layers if layer.part == "self-attention"]
            assert len(set(by)) == 2
    assert all(relative(a, b) > 1e-4 for i, a in enumerate(results) for b in results[:i])
    with hhattn.swap(model, attention=tuple([sparse] * layers)):
        assert torch.equal(family.run(model), whole)
    with pytest.raises(ValueError, match=f"attention is a list of 1; accepted for this model: .* {layers} layers"):
        hhattn.swap(model, attention=["exact"])
    assert torch.equal(family.run(model), before)


@torch.no_grad()
@with_scores
def test_a_pattern_by_step(family: Family) -> None:
    """Dense at first, then what a function makes of the grid and the step, once for all layers; padded texts too."""
    model = family.model()
    before = family.run(model)
    made: list[int] = []

    def pattern(layout: VideoLayout, step: int) -> hhattn.BlockMask:
        assert layout.grid == GRID
        made.append(step)
        return near(layout) if step < 4 else everything(layout)

    with hhattn.swap(model, attention=near):
        sparse = family.run(model)
    plan = masks.SparsityPlan(pattern, dense_steps=1, every=2)
    with hhattn.swap(model, attention=plan) as handle:
        assert "self-attention: hhattn.block_sparse_attention, as the plan says" in handle.report()
        results = [family.run(model) for _ in range(6)]
    assert made == [0, 2, 4]
    for i, expected in enumerate((before, sparse, sparse, sparse, before, before)):
        assert relative(results[i], expected) <= 2e-5, i


def test_what_no_family_can_have_is_refused() -> None:
    wan, sana = (named(name).model() for name in ("Wan", "SANA-Video"))
    with pytest.raises(ValueError, match=r"BlockLinear\(frames=2\); Wan's is softmax attention; accepted for Wan: "):
        hhattn.swap(wan, attention=BlockLinear(2))
    for attention in (near, SparseLinear(0.2), masks.SparsityPlan(near), ["exact", near]):
        with pytest.raises(TypeError, match="accepted for SANA-Video, whose attention is linear: 'exact'"):
            hhattn.swap(sana, attention=attention)
    with pytest.raises(ValueError, match="frames=0: accepted is a number of latent frames"):
        BlockLinear(0)
    with pytest.raises(ValueError, match="critical=0: accepted is a share"):
        SparseLinear(0)
    with pytest.raises(TypeError, match="critical is a str"):
        SparseLinear("all")
    with pytest.raises(TypeError, match="marginal is a float"):
        SparseLinear(0.5, marginal=0.5)
    with pytest.raises(ValueError, match=r"critical=Selector\(centroid"):
        SparseLinear(masks.Selector(masks.centroid(4, 4), masks.top_k(ratio=0.5)))
    with pytest.raises(ValueError, match="feature_map='gelu'"):
        SparseLinear(0.5, feature_map="gelu")
    with pytest.raises(ValueError, match="density needs a Selector"):
        masks.SparsityPlan(lambda layout, step: near(layout), density=lambda layer, step: 0.5)
    with pytest.raises(ValueError, match="select is a function of a layout and a step"):
        masks.SparsityPlan(lambda layout, step: near(layout)).at(0).attend(*(randn(1, 8, 1, 8) for _ in range(3)))
