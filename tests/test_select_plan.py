"""When masks are made: plans over steps and layers; and masks of sorted tokens."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from helpers import randn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import hhattn
from hhattn import VideoLayout, masks
from hhattn.masks import SparsityPlan
from hhattn.nn import BlockSparseAttention, VideoSparseAttention


def qkv(sq: int = 96, sk: int = 96, heads: int = 2, n_kv: int = 2, dim: int = 8, seed: int = 0) -> list[Tensor]:
    shapes = ((heads, sq), (n_kv, sk), (n_kv, sk))
    return [randn(1, s, h, dim, seed=seed + i).cumsum(1) / 4 for i, (h, s) in enumerate(shapes)]


SELECTOR = masks.Selector(masks.mean_pool(), masks.top_k(ratio=0.25), block_size=(8, 8))


class Spy(masks.Selector):
    """Counts how often a mask is made, and with what density."""

    def __call__(self, q: Tensor, k: Tensor, **more: Any) -> masks.BlockMask:
        MADE.append(self.policy)
        return super().__call__(q, k, **more)


MADE: list[masks.Policy] = []


@pytest.fixture(autouse=True)
def _nothing_made() -> None:
    MADE.clear()


def spy(**more: Any) -> Spy:
    return Spy(masks.mean_pool(), masks.top_k(ratio=0.25), block_size=(8, 8), **more)


def is_dense(out: Tensor, x: list[Tensor]) -> bool:
    return torch.equal(out, hhattn.attention(*x))


# ---- plans ----


def test_first_steps_and_layers_are_dense_and_masks_last_as_long_as_said() -> None:
    plan, x = SparsityPlan(spy(), every=3, dense_steps=2, dense_layers=[0, 5]), qkv()
    for step in range(8):
        for layer in range(6):
            out = plan.at(layer).attend(*x)
            assert is_dense(out, x) == (step < 2 or layer in (0, 5)), (step, layer)
    assert len(MADE) == 4 * 2  # at steps 2 and 5, in four layers
    expected = hhattn.block_sparse_attention(*x, SELECTOR(*x[:2]))
    assert torch.equal(out if layer == 1 else plan.at(1).attend(*x), expected)
    assert plan.nbytes == 4 * SELECTOR(*x[:2]).nbytes
    plan.reset()
    assert plan.nbytes == 0
    assert is_dense(plan.at(1).attend(*x), x)


def test_a_mask_used_again_is_the_old_one_not_that_of_the_new_tensors() -> None:
    plan, first, later = SparsityPlan(SELECTOR, every=2), qkv(), qkv(seed=50)
    plan.at(0).attend(*first)
    old = SELECTOR(*first[:2])
    assert torch.equal(plan.at(0).attend(*later), hhattn.block_sparse_attention(*later, old))
    assert torch.equal(plan.at(0).attend(*later), hhattn.block_sparse_attention(*later, SELECTOR(*later[:2])))


def test_another_video_never_meets_an_old_mask() -> None:
    """A cache that isn't keyed by shape would hand a mask for 96 tokens to 80, or to other heads."""
    plan = SparsityPlan(SELECTOR, every=100, dense_steps=1)
    for x in (qkv(), qkv(80, 80), qkv(96, 80), qkv(96, 96, heads=4)):
        assert is_dense(plan.at(0).attend(*x), x), "a new shape starts from step 0"
        expected = hhattn.block_sparse_attention(*x, SELECTOR(*x[:2]))
        assert torch.equal(plan.at(0).attend(*x), expected)


def test_counting_starts_over_after_the_steps_of_a_video() -> None:
    plan, x = SparsityPlan(spy(), every=100, dense_steps=1, steps=3), qkv()
    dense = [is_dense(plan.at(0).attend(*x), x) for _ in range(6)]
    assert dense == [True, False, False] * 2
    assert len(MADE) == 2


def test_layers_models_and_guidance_keep_their_own() -> None:
    plan, a, b = SparsityPlan(SELECTOR, every=100, calls_per_step=2, dense_steps=1), qkv(), qkv(seed=50)
    for name in ("", "second model"):
        for x in (a, b):
            assert is_dense(plan.at(0, name).attend(*x), x)
        for _ in range(2):
            for x in (a, b):
                expected = hhattn.block_sparse_attention(*x, SELECTOR(*x[:2]))
                assert torch.equal(plan.at(0, name).attend(*x), expected)


def test_density_follows_the_schedule() -> None:
    plan = SparsityPlan(spy(), density=lambda layer, step: [1.0, 0.5, 0.25][step] if layer else 0.125)
    x = qkv()
    assert is_dense(plan.at(1).attend(*x), x)
    for layer in (1, 1, 0):
        plan.at(layer).attend(*x)
    assert [p.ratio for p in MADE] == [0.5, 0.25, 0.125]
    assert masks.top_p(0.9).with_density(0.5) == masks.top_p(0.9, at_most=0.5)
    assert masks.top_k(blocks=3).with_density(0.5) == masks.top_k(ratio=0.5)


def test_a_static_mask_may_be_planned_too() -> None:
    layout = VideoLayout(3, 4, 8)
    mask, x = masks.frame_window(layout, 0, block_size=(8, 8)), qkv()
    plan = SparsityPlan(mask, dense_steps=1)
    assert is_dense(plan.at(0).attend(*x), x)
    assert torch.equal(plan.at(0).attend(*x), hhattn.block_sparse_attention(*x, mask))


def test_blocks_of_tile_order_for_tokens_of_raster_order() -> None:
    layout = VideoLayout(3, 4, 8, tile=(1, 2, 4))
    selector = masks.Selector(masks.mean_pool(), masks.top_k(blocks=3), (8, 8), order="tile", layout=layout)
    x = qkv()
    tiled = [layout.to_tiles(t) for t in x]
    expected = layout.from_tiles(hhattn.block_sparse_attention(*tiled, selector(*tiled[:2])))
    assert torch.equal(SparsityPlan(selector).at(0).attend(*x, order="raster"), expected)
    assert not torch.equal(SparsityPlan(selector).at(0).attend(*x), expected)
    with pytest.raises(ValueError, match="no layout to convert with"):
        SparsityPlan(SELECTOR).at(0).attend(*x, order="tile")


def test_plans_in_the_attention_layer() -> None:
    layer, x = BlockSparseAttention(16, 2), randn(1, 40, 16)
    plan = SparsityPlan(SELECTOR, dense_steps=1)
    everything = masks.dense(VideoLayout(1, 5, 8), block_size=(8, 8))
    torch.testing.assert_close(layer(x, plan.at(0)), layer(x, everything), rtol=1e-5, atol=1e-5)
    q, k = layer.queries_and_keys(x)
    assert torch.equal(layer(x, plan.at(0)), layer(x, SELECTOR(q, k)))
    out, (key, value) = layer(x, plan.at(1), kv_cache=(k[:, :24], k[:, :24]), return_kv=True)
    assert out.shape == x.shape
    assert key.shape == value.shape == (1, 40, 2, 8)


def test_refusals() -> None:
    mask = masks.dense(VideoLayout(1, 4, 5), block_size=(8, 8))
    refused = [
        (lambda: SparsityPlan(SELECTOR, every=0), "every=0: accepted is 1 or more"),
        (lambda: SparsityPlan(SELECTOR, dense_steps=-1), "dense_steps=-1: accepted is 0 or more"),
        (lambda: SparsityPlan(SELECTOR, steps=0), "steps=0: accepted is 1 or more"),
        (lambda: SparsityPlan(mask, density=lambda *_: 0.5), "density needs a Selector"),
        (lambda: masks.Selector(masks.centroid(), masks.top_p(0.5), keep=mask), "scorer=centroid sorts tokens"),
        (lambda: masks.Selector(masks.centroid(), masks.top_p(0.5))(*qkv()[:2]), "mask over sorted tokens"),
        (lambda: masks.centroid(k_clusters=0), "k_clusters=0: accepted is 1 or more"),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()


# ---- masks of sorted tokens ----


def lloyd(x: Tensor, count: int, steps: int) -> tuple[Tensor, Tensor]:
    """k-means of one head, token by token."""
    means = [x[c * len(x) // count] for c in range(count)]
    for step in range(steps + 1):
        labels = [min(range(count), key=lambda c: (float((t - means[c]).square().sum()), c)) for t in x]
        if step < steps:
            members = [[t for t, label in zip(x, labels, strict=True) if label == c] for c in range(count)]
            means = [torch.stack(m).mean(0) if m else old for m, old in zip(members, means, strict=True)]
    return torch.stack(means), torch.tensor(labels)


def test_clusters_are_those_of_lloyds_steps_and_tokens_are_sorted_by_them() -> None:
    q, k, _ = (x.double() for x in qkv(50, 60, heads=4))
    clusters = masks.centroid(5, 7, steps=3).cluster(q, k)
    for head in range(4):
        means, labels = lloyd(q[0, :, head], 5, 3)
        torch.testing.assert_close(clusters.q_centroids[0, head], means)
        assert torch.equal(clusters.q_labels[0, head], labels.sort().values)
        order = labels.sort(stable=True).indices
        assert torch.equal(clusters.queries(q)[0, :, head], q[0, order, head])
        means, labels = lloyd(k[0, :, head // 2], 7, 3)
        torch.testing.assert_close(clusters.k_centroids[0, head // 2], means)
        assert torch.equal(clusters.keys(k)[0, :, head // 2], k[0, labels.sort(stable=True).indices, head // 2])
    assert torch.equal(clusters.restore(clusters.queries(q)), q)


def test_block_mass_is_the_sum_over_tokens_of_their_clusters_mass() -> None:
    """Each query gives each key its cluster's mass, shared evenly among the cluster's keys."""
    q, k, _ = qkv(50, 60)
    clusters = masks.centroid(5, 7).cluster(q, k)
    scale = 8**-0.5
    seen = []

    class Watch(masks.Policy):
        def keep(self, log_mass: Tensor) -> Tensor:
            seen.append(log_mass)
            return super().keep(log_mass)

        def _wanted(self, mass: Tensor, rank: Tensor) -> Tensor:
            return rank < 2

    mask = clusters.select(Watch(), (8, 16))
    mass = torch.cat(seen, 1)[0].exp()
    for head in range(2):
        q_labels, k_labels = clusters.q_labels[0, head], clusters.k_labels[0, head]
        size = torch.bincount(k_labels, minlength=7)
        pairs = (clusters.q_centroids[0, head] @ clusters.k_centroids[0, head].T * scale).exp() * size
        tokens = (pairs / pairs.sum(-1, keepdim=True) / size.clamp(min=1))[q_labels][:, k_labels]
        for i in range(7):
            for j in range(4):
                expected = tokens[8 * i : 8 * i + 8, 16 * j : 16 * j + 16].sum(-1).mean()
                torch.testing.assert_close(mass[head, i, j], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mass.sum(-1), torch.ones(2, 7))
    assert mask.kv_num_blocks.shape == (1, 2, 7)


def test_sorted_attention_is_attention_of_the_pairs_that_the_sorted_mask_holds() -> None:
    q, k, v = qkv(70, 90, heads=4)
    clusters = masks.centroid(4, 6).cluster(q, k)
    mask = clusters.select(masks.top_k(ratio=0.4), (8, 8))
    out = clusters.attention(q, k, v, mask)
    for head in range(4):
        dense = torch.zeros(70, 90, dtype=torch.bool)
        rows, columns = clusters.q_order[0, head], clusters.k_order[0, head // 2]
        dense[rows[:, None], columns] = mask.to_dense()[0, head]
        one = [x[:, :, h].unsqueeze(1) for x, h in ((q, head), (k, head // 2), (v, head // 2))]
        expected = torch.nn.functional.scaled_dot_product_attention(*one, attn_mask=dense)[:, 0]
        torch.testing.assert_close(out[:, :, head], expected, rtol=1e-5, atol=1e-5)
    dense_out = clusters.attention(q, k, v, clusters.select(masks.top_p(1.0), (8, 8)))
    torch.testing.assert_close(dense_out, hhattn.attention(q, k, v), rtol=1e-5, atol=1e-5)


def test_sorting_finds_what_places_hide() -> None:
    """Tokens of 8 kinds, shuffled: in place every block holds all kinds, sorted one or two, whose tokens fill 6."""
    g = torch.Generator().manual_seed(0)
    kinds = torch.randn(8, 16, generator=g) * 3
    which = torch.randint(8, (512,), generator=g)
    q = k = (kinds[which] + 0.1 * torch.randn(512, 16, generator=g))[None, :, None]
    policy = masks.top_k(blocks=6)
    clusters = masks.centroid(16, 16).cluster(q, k)
    mask = clusters.select(policy, (32, 32))
    found = masks.recall(clusters.queries(q), clusters.keys(k), mask)
    in_place = masks.recall(q, k, masks.select(q, k, masks.mean_pool(), policy, block_size=(32, 32)))
    assert found > 0.95
    assert in_place < 0.6


def test_centroids_are_carried_over_steps() -> None:
    x = qkv(200, 200)
    scorer = masks.centroid(8, 8, steps=4, refine=2)
    first = scorer.cluster(*x[:2])
    moved = [t + 0.01 for t in x[:2]]
    later = scorer.cluster(*moved, first)
    expected = lloyd_from(moved[0][0, :, 0], first.q_centroids[0, 0], 2)
    torch.testing.assert_close(later.q_centroids[0, 0], expected, rtol=1e-4, atol=1e-4)
    plan = SparsityPlan(masks.Selector(scorer, masks.top_k(ratio=0.5), (8, 8)))
    plan.at(0).attend(*x)
    out = plan.at(0).attend(*moved, x[2])
    mask = later.select(masks.top_k(ratio=0.5), (8, 8))
    torch.testing.assert_close(out, later.attention(*moved, x[2], mask), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="previous has centroids"):
        scorer.cluster(*qkv(heads=4)[:2], first)


def lloyd_from(x: Tensor, means: Tensor, steps: int) -> Tensor:
    for _ in range(steps):
        labels = torch.cdist(x, means).argmin(-1)
        means = torch.stack([x[labels == c].mean(0) if (labels == c).any() else means[c] for c in range(len(means))])
    return means


def test_clustering_waits_for_nothing_and_is_the_same_every_time() -> None:
    from test_select import NothingRead

    q, k, v = qkv(150, 170, heads=4)
    with NothingRead():
        clusters = masks.centroid(6, 9).cluster(q, k)
        mask = clusters.select(masks.top_p(0.8, at_most=0.5), (16, 16))
        clusters.keys(v)
    again = masks.centroid(6, 9).cluster(q, k, None)
    assert torch.equal(again.q_centroids, clusters.q_centroids)
    assert torch.equal(again.select(masks.top_p(0.8, at_most=0.5), (16, 16)).to_dense(), mask.to_dense())
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k)]
        assert masks.centroid(6, 9).cluster(*fakes).select(masks.top_p(0.8), (16, 16)).num_blocks == (10, 11)


# ---- recall ----


def test_recall_and_error_are_those_of_the_dense_matrices() -> None:
    q, k, v = qkv(50, 60, heads=4)
    mask = masks.select(q, k, masks.mean_pool(), masks.top_k(blocks=2), block_size=(8, 8))
    quality = masks.quality(q, k, v, mask)
    for head in range(4):
        weights = (q[0, :, head] @ k[0, :, head // 2].T / math.sqrt(8)).softmax(-1)
        kept = (weights * mask.to_dense()[0, head]).sum(-1)
        torch.testing.assert_close(quality.recall[0, head], kept.mean(), rtol=1e-4, atol=1e-5)
        value = v[0, :, head // 2]
        out = (weights * mask.to_dense()[0, head] / kept[:, None]) @ value
        error = (out - weights @ value).norm() / (weights @ value).norm()
        torch.testing.assert_close(quality.error[0, head], error, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(masks.recall(q, k, mask), quality.recall)


# ---- VSA's layer ----


def test_the_gated_layer_is_both_grains() -> None:
    layer, x = VideoSparseAttention(16, 2, policy=masks.top_k(blocks=2), block_size=(8, 8)), randn(2, 50, 16)
    sparse = BlockSparseAttention(16, 2)
    sparse.load_state_dict(layer.state_dict(), strict=False)
    q, k = layer.queries_and_keys(x)
    mask = masks.select(q, k, masks.mean_pool(), masks.top_k(blocks=2), block_size=(8, 8))
    torch.testing.assert_close(layer(x), sparse(x, mask))
    opened = copy.deepcopy(layer)
    opened.to_gate.weight.data = randn(16, 16, seed=3)
    v = layer.heads(layer.to_v(x))
    coarse = opened.heads(opened.to_gate(x)) * masks.coarse_attention(q, k, v, (8, 8))
    expected = layer.to_out((coarse + hhattn.block_sparse_attention(q, k, v, mask)).flatten(2))
    torch.testing.assert_close(opened(x), expected)
    opened(x).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in opened.parameters())
    compiled = torch.compile(opened, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), opened(x), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = opened(x)
    assert low.dtype == torch.bfloat16
