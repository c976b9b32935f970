"""Dynamic masks: scorers and policies equal their definitions, pair by pair, and nothing waits for the device."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import randn, strided
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import hhattn
from hhattn import BlockMask, VideoLayout, masks

SCORERS = [masks.mean_pool(), masks.self_similarity(0.3), masks.antidiagonal(4)]
POLICIES = [
    masks.top_k(ratio=0.3),
    masks.top_k(blocks=2, at_most=3),
    masks.top_p(0.6),
    masks.threshold(0.2, at_most=0.5),
]


def qk(sq: int, sk: int, heads: int = 4, n_kv: int = 2, batch: int = 2, dim: int = 8, **kwargs: Any) -> list[Tensor]:
    """Queries and keys that vary slowly along the tokens, as video does, so that blocks differ."""
    slow = randn(batch, sk, n_kv, dim, seed=1, **kwargs).cumsum(1) / 4
    return [randn(batch, sq, heads, dim, seed=2, **kwargs).cumsum(1) / 4, slow]


# ---- scorers, pair by pair ----


def runs(length: int, size: int) -> list[range]:
    return [range(i, min(i + size, length)) for i in range(0, length, size)]


def mean_mass(q: Tensor, k: Tensor, bq: int, bk: int) -> Tensor:
    """One head: mass of the pairs (mean query, mean key), as many as the block has keys."""
    means = [[x[list(r)].mean(0) for r in runs(len(x), size)] for x, size in ((q, bq), (k, bk))]
    rows = []
    for mean in means[0]:
        sizes = [len(r) for r in runs(len(k), bk)]
        products = [float(mean @ other) / math.sqrt(q.shape[-1]) for other in means[1]]
        mass = torch.tensor([n * math.exp(x) for n, x in zip(sizes, products, strict=True)], dtype=q.dtype)
        rows.append(mass / mass.sum())
    return torch.stack(rows)


def alike(x: Tensor, size: int, least: float) -> Tensor:
    """Whether the mean cosine over all pairs of a block's tokens reaches ``least``."""
    cosines = [[F.cosine_similarity(x[i], x[j], dim=0) for i in r for j in r] for r in runs(len(x), size)]
    return torch.stack([torch.stack(c).mean() >= least for c in cosines])


def antidiagonal_mass(q: Tensor, k: Tensor, bq: int, bk: int, stride: int) -> Tensor:
    """A square's score is the mean over its antidiagonal; at a ragged end tokens are taken in turn."""
    q_groups, k_groups = runs(len(q), stride), runs(len(k), stride)
    scores = torch.zeros(len(q_groups), len(k_groups), dtype=q.dtype)
    for a, qs in enumerate(q_groups):
        for b, ks in enumerate(k_groups):
            pairs = [(qs[(stride - 1 - p) % len(qs)], ks[p % len(ks)]) for p in range(stride)]
            scores[a, b] = sum(q[i] @ k[j] for i, j in pairs) / stride / math.sqrt(q.shape[-1])
    weights = scores.exp() * torch.tensor([len(r) for r in k_groups])
    weights /= weights.sum(-1, keepdim=True)
    by_token = torch.cat([weights[a].expand(len(r), -1) for a, r in enumerate(q_groups)])
    columns = [by_token[:, [b for b, g in enumerate(k_groups) if g[0] in r]].sum(-1) for r in runs(len(k), bk)]
    return torch.stack([torch.stack(columns, -1)[list(r)].mean(0) for r in runs(len(q), bq)])


lengths = st.integers(1, 50)


@settings(max_examples=15, deadline=None)
@given(sq=lengths, sk=lengths, block=st.sampled_from([(8, 8), (16, 4), (4, 12)]))
def test_scorers_equal_their_definitions(sq: int, sk: int, block: tuple[int, int]) -> None:
    q, k = qk(sq, sk, dtype=torch.float64)
    for scorer in SCORERS:
        got = scorer.log_mass(q, k, block, 8**-0.5)
        for b, h in ((0, 0), (1, 3)):
            one, other = q[b, :, h], k[b, :, h // 2]
            if isinstance(scorer, masks.antidiagonal):
                expected = antidiagonal_mass(one, other, *block, scorer.stride)
            else:
                expected = mean_mass(one, other, *block)
            actual = got[b, h].double()
            if isinstance(scorer, masks.self_similarity):
                rows, columns = alike(one, block[0], scorer.least), alike(other, block[1], scorer.least)
                assert torch.equal(actual == math.inf, ~(rows[:, None] & columns))
                expected = expected[rows][:, columns] / expected[rows][:, columns].sum(-1, keepdim=True)
                actual = actual[rows][:, columns]
            torch.testing.assert_close(actual.softmax(-1), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_summed_in_float32_whatever_comes(dtype: torch.dtype) -> None:
    """No dtype is written into the code: halves score as the float32 they are, and nothing is rounded on the way."""
    q, k = (x.to(dtype) for x in qk(100, 90))
    for scorer in SCORERS:
        got = scorer.log_mass(q, k, (16, 8), 0.3)
        assert torch.equal(got.float(), scorer.log_mass(q.float(), k.float(), (16, 8), 0.3)) or dtype == torch.float64
        assert got.dtype in (torch.float32, dtype)
        assert got.shape == (2, 4, 7, 12)
    assert masks.coarse_attention(q, k, k, (16, 8)).dtype == dtype


def test_only_tokens_that_exist_count() -> None:
    """Between tokens, and beyond the last one, memory holds NaN: no block is filled up with what lies there."""
    q, k = qk(45, 53)
    for scorer in (*SCORERS, masks.antidiagonal(8)):
        apart = scorer.log_mass(strided(q), strided(k), (16, 8), 0.3)
        assert torch.equal(apart, scorer.log_mass(q, k, (16, 8), 0.3))
    clusters = [masks.centroid(4, 6).cluster(*pair) for pair in ((q, k), (strided(q), strided(k)))]
    assert torch.equal(clusters[0].k_centroids, clusters[1].k_centroids)


# ---- policies, row by row ----


def expected_keep(row: list[float], policy: masks.Policy) -> set[int]:
    """By the definition: best first, ties in order."""
    n = len(row)
    most = n if policy.at_most is None else count(policy.at_most, n)
    order = sorted((j for j in range(n) if row[j] != -math.inf), key=lambda j: (-row[j], j))
    always = [j for j in order if row[j] == math.inf]
    rest = [j for j in order if row[j] != math.inf]
    top = max((row[j] for j in rest), default=0.0)
    total = sum(math.exp(row[j] - top) for j in rest)
    wanted, before = list(always), 0.0
    for rank, j in enumerate(rest):
        mass = math.exp(row[j] - top) / total
        if isinstance(policy, masks.top_k):
            take = rank < (policy.blocks or count(policy.ratio, n))
        elif isinstance(policy, masks.top_p):
            take = before < policy.p - 1e-6
        else:
            take = mass >= policy.mass
        wanted += [j] if take else []
        before += mass
    wanted += [j for j in order if j not in wanted][: max(0, count(policy.at_least, n) - len(wanted))]
    return set(wanted[:most])


def count(share: float, n: int) -> int:
    return min(n, max(1, round(share * n)) if isinstance(share, float) else share)


values = st.sampled_from([0.0, 1.0, 1.0, 2.0, -3.0, 7.5, math.inf, -math.inf])


@settings(max_examples=100, deadline=None)
@given(
    row=st.lists(values, min_size=1, max_size=9), at_least=st.integers(0, 3), at_most=st.sampled_from([None, 2, 0.4])
)
def test_policies_equal_their_definitions(row: list[float], at_least: int, at_most: float | None) -> None:
    budget: dict[str, Any] = {"at_least": at_least, "at_most": at_most}
    for policy in (
        masks.top_k(ratio=0.3, **budget),
        masks.top_k(blocks=2, **budget),
        masks.top_p(0.7, **budget),
        masks.top_p(1.0, **budget),
        masks.threshold(0.15, **budget),
    ):
        kept = policy.keep(torch.tensor([row, row]))
        assert torch.equal(kept[0], kept[1])
        assert {j for j, on in enumerate(kept[0].tolist()) if on} == expected_keep(row, policy), policy
        assert kept[0].sum() <= policy.most(len(row))
        if math.inf not in row:
            assert kept[0].sum() <= policy.width(len(row))


def test_a_ratio_never_rounds_to_no_block() -> None:
    for ratio in (1e-9, 0.01, 0.1, 0.49):
        for nk in (1, 2, 3, 5):
            assert masks.top_k(ratio=ratio).keep(torch.zeros(1, nk)).sum() == max(1, round(ratio * nk))
    assert masks.top_p(1e-9).keep(torch.zeros(1, 5)).sum() == 1
    assert masks.threshold(0.9, at_most=0.01).keep(torch.zeros(1, 5)).sum() == 1


def test_ties_are_broken_by_place() -> None:
    kept = masks.top_k(blocks=3).keep(torch.zeros(2, 3, 2000))
    assert kept[..., :3].all()
    assert kept.sum() == 18


# ---- selection ----


def wide(kept: Tensor, block: tuple[int, int], sq: int, sk: int) -> Tensor:
    return kept.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., :sq, :sk]


@settings(max_examples=25, deadline=None)
@given(sq=lengths, sk=lengths, block=st.sampled_from([(8, 8), (16, 4), (4, 12)]), seed=st.integers(0, 99))
def test_a_selection_is_exact_to_the_token(sq: int, sk: int, block: tuple[int, int], seed: int) -> None:
    """Ragged ends, kept and forbidden pairs: the mask is (selected and within) or keep, pair by pair."""
    q, k = qk(sq, sk)
    g = torch.Generator().manual_seed(seed)
    kept, allowed = (torch.rand(n, h, sq, sk, generator=g) < p for n, h, p in ((1, 4, 0.05), (2, 1, 0.8)))
    allowed &= wide(torch.rand(2, 1, -(-sq // block[0]), -(-sk // block[1]), generator=g) < 0.7, block, sq, sk)
    keep, within = (BlockMask.from_dense(x, block) for x in (kept[:, :, :, :], allowed))
    small = BlockMask.from_dense(wide(kept[..., :1, :1].expand(1, 4, *within.num_blocks), block, sq, sk), block)
    for scorer, policy in zip(SCORERS * 2, POLICIES, strict=False):
        options: dict[str, Any] = {"block_size": block}
        scores = scorer.log_mass(q, k, block, 8**-0.5)
        chosen = wide(policy.keep(scores), block, sq, sk)
        assert torch.equal(masks.select(q, k, scorer, policy, **options).to_dense(), chosen)
        assert torch.equal(masks.select(q, k, scorer, policy, keep=keep, **options).to_dense(), chosen | kept)
        touched = BlockMask.from_dense(allowed, block)
        empty = ~torch.stack([c.full.view(-1).index_fill(0, c.partial, True) for c in touched._slices()]).view(
            2, 1, *touched.num_blocks
        )
        chosen = wide(policy.keep(scores.masked_fill(empty, -math.inf)), block, sq, sk) & allowed
        mask = masks.select(q, k, scorer, policy, within=within, **options)
        assert torch.equal(mask.to_dense(), chosen)
        mask = masks.select(q, k, scorer, policy, within=within, keep=small, **options)
        assert torch.equal(mask.to_dense(), chosen | small.to_dense())


@pytest.mark.parametrize("impl", ["reference", "cpp", "triton"])  # float32
def test_attention_under_a_selection_is_attention_under_its_dense_form(impl: str) -> None:
    q, k = qk(50, 70, batch=1, dim=16)
    v = randn(1, 70, 2, 16, seed=5)
    for scorer in SCORERS:
        mask = masks.select(q, k, scorer, masks.top_p(0.5), block_size=(16, 16))
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = hhattn.block_sparse_attention(*leaves, mask, impl=impl)
        heads = [x.transpose(1, 2).repeat_interleave(n, 1) for x, n in zip(leaves, (1, 2, 2), strict=True)]
        expected = F.scaled_dot_product_attention(*heads, attn_mask=mask.to_dense()).transpose(1, 2)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
        got, wanted = (torch.autograd.grad(x.square().sum(), leaves) for x in (out, expected))
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_a_selection_combines_and_converts_like_any_mask() -> None:
    q, k = qk(45, 53)
    mask = masks.select(q, k, masks.mean_pool(), masks.top_p(0.6), block_size=(16, 8))
    dense = torch.rand(1, 4, 45, 53, generator=torch.Generator().manual_seed(0)) < 0.5
    other = BlockMask.from_dense(dense, (16, 8))
    assert torch.equal((mask & other).to_dense(), mask.to_dense() & dense)
    assert torch.equal((mask | other).to_dense(), mask.to_dense() | dense)
    assert torch.equal((~mask).to_dense(), ~mask.to_dense())
    assert torch.equal(BlockMask.from_flex(mask.to_flex()).to_dense(), mask.to_dense())
    assert mask.density == pytest.approx(float(mask.to_dense().float().mean()))
    assert mask.flops(8, batch=2, heads=4) == int(mask.to_dense().sum()) * 32


def test_a_window_always_kept_and_blocks_of_tile_order() -> None:
    layout = VideoLayout(3, 7, 9, tile=(1, 4, 4), text_len=5)
    q, k = qk(layout.seq_len, layout.seq_len)
    options: dict[str, Any] = {"block_size": (16, 16), "order": "tile"}
    always = masks.sink(layout, **options) | masks.text(layout, **options)
    tiled = (layout.to_tiles(q), layout.to_tiles(k))
    mask = masks.select(*tiled, masks.mean_pool(), masks.top_k(blocks=1), keep=always, layout=layout, **options)
    assert (mask.to_dense("raster") >= always.to_dense("raster")).all()
    out = hhattn.block_sparse_attention(q, k, k, mask, order="raster")
    expected = hhattn.block_sparse_attention(*tiled, tiled[1], mask)
    assert torch.equal(out, layout.from_tiles(expected))


def test_whole_blocks_without_reading_the_device_are_those_with() -> None:
    g = torch.Generator().manual_seed(0)
    kept = torch.rand(2, 3, 5, 6, generator=g) < 0.4
    for q_len, k_len in ((40, 24), (37, 24), (40, 21), (33, 22)):
        ends: dict[str, Any] = {"block_size": (8, 4), "q_len": q_len, "k_len": k_len}
        expected = BlockMask.from_blocks(kept, **ends)
        for most in (6, 100):
            assert torch.equal(BlockMask.from_blocks(kept, max_blocks=most, **ends).to_dense(), expected.to_dense())
        cut = kept & (kept.cumsum(-1) <= 2)
        mask = BlockMask.from_blocks(kept, max_blocks=2, **ends)
        assert torch.equal(mask.to_dense(), BlockMask.from_blocks(cut, **ends).to_dense())
        assert mask.full_kv_indices.shape[-1] == 2
    with pytest.raises(ValueError, match="max_blocks=0: accepted is None, or 1 or more"):
        BlockMask.from_blocks(kept, (8, 4), max_blocks=0)


# ---- hazards ----


class NothingRead(TorchDispatchMode):
    """Refuses what waits for the device: reading a number, or making a tensor as long as its data say."""

    refused = ("_local_scalar_dense", "nonzero", "unique", "masked_select", "equal", "item", "is_nonzero")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert not any(name.startswith(word) for word in self.refused), f"{name} waits for the device"
        if name.startswith(("index", "_index_put")):
            indices = args[1] if isinstance(args[1], (list, tuple)) else []
            assert not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices), "a bool index"
        return func(*args, **(kwargs or {}))


def kept_and_within(n: int) -> dict[str, BlockMask]:
    layout = VideoLayout(2, 1, n // 2)
    options: dict[str, Any] = {"block_size": (16, 16)}
    return {"keep": masks.sink(layout, **options), "within": masks.block_causal(layout, 1, **options)}


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("policy", POLICIES, ids=repr)
def test_nothing_waits_for_the_device(scorer: Any, policy: masks.Policy) -> None:
    q, k = qk(150, 150)
    static = kept_and_within(150)
    with NothingRead():
        mask = masks.select(q, k, scorer, policy, block_size=(16, 16), **static)
        mask.q_lists()
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = [mode.from_tensor(x) for x in (q, k)]
        fake = masks.select(*fakes, scorer, policy, block_size=(16, 16))
    real = masks.select(q, k, scorer, policy, block_size=(16, 16))
    assert fake.full_kv_indices.shape == real.full_kv_indices.shape
    assert mask.kv_num_blocks.shape == (2, 4, 10)


def test_the_guard_against_waiting_sees_what_waits() -> None:
    x = torch.arange(4)
    for wait in (lambda: int(x.max()), lambda: x.nonzero(), lambda: x[x > 1], lambda: bool((x == x).all())):
        with pytest.raises(AssertionError, match=r"waits|bool index"), NothingRead():
            wait()


def test_selection_and_attention_compile_into_one_graph() -> None:
    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = masks.select(q, k, masks.antidiagonal(8), masks.top_p(0.5, at_most=0.6), block_size=(16, 16))
        return hhattn.block_sparse_attention(q, k, v, mask)

    q, k = qk(70, 90)
    mask = masks.select(q, k, masks.antidiagonal(8), masks.top_p(0.5, at_most=0.6), block_size=(16, 16))
    torch.testing.assert_close(attend(q, k, k), hhattn.block_sparse_attention(q, k, k, mask))


def test_the_choice_is_the_same_every_time_and_in_pieces() -> None:
    """Also where rows and heads are taken a few at a time, as they are at lengths too long for a test."""
    from hhattn.masks.dynamic import antidiagonal, select

    q, k = qk(200, 230, heads=6, n_kv=3)
    static: dict[str, Any] = {"block_size": (8, 8)}
    for scorer in SCORERS:
        whole = masks.select(q, k, scorer, masks.top_p(0.5), **static)
        again = masks.select(q, k, scorer, masks.top_p(0.5), **static)
        assert torch.equal(whole.to_dense(), again.to_dense())
        assert torch.equal(whole.full_kv_indices, again.full_kv_indices)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[select.__module__], "_SCORES", 350)
            patch.setattr(sys.modules[select.__module__], "_RANKED", 100)
            patch.setattr(sys.modules[antidiagonal.__module__], "_SCORES", 350)
            assert torch.equal(masks.select(q, k, scorer, masks.top_p(0.5), **static).to_dense(), whole.to_dense())


PEAK_OF_SELECTING = """
import torch
from hhattn import masks
status = lambda: open("/proc/self/status")
peak = lambda: next(int(line.split()[1]) for line in status() if line.startswith("VmHWM")) // 1024
q, k = (torch.randn(1, 110_400, 5, 8) for _ in range(2))
masks.select(q[:, :256], k[:, :256], masks.antidiagonal(64), masks.top_k(ratio=0.05))
before = peak()
mask = masks.select(q, k, masks.antidiagonal(64), masks.top_k(ratio=0.05))
print(peak() - before - mask.nbytes // 2**20)
"""


def test_selecting_takes_little_memory_beside_the_mask() -> None:
    """Half a minute of 720p: 1725 x 1725 blocks a head. Ranking the scores of all heads at once takes 600 MB."""
    run = subprocess.run([sys.executable, "-c", PEAK_OF_SELECTING], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 160


def test_refusals_name_what_came_and_what_is_accepted() -> None:
    q, k = qk(20, 24)
    scorer, policy = masks.mean_pool(), masks.top_k(blocks=1)
    other = masks.dense(VideoLayout(1, 4, 5), block_size=(8, 8))
    refused = [
        (lambda: masks.top_k(), "ratio=None, blocks=None: accepted is one of the two"),
        (lambda: masks.top_k(ratio=0.0), r"ratio=0.0: accepted is a share of a row's blocks, in \(0, 1\]"),
        (lambda: masks.top_k(blocks=0), "blocks=0: accepted are blocks, an int of at least 1"),
        (lambda: masks.top_p(1.5), r"p=1.5: accepted is a share of the mass, in \(0, 1\]"),
        (lambda: masks.threshold(-1), r"mass=-1: accepted is a share of the mass, in \[0, 1\]"),
        (lambda: masks.top_p(0.5, at_most=1.2), "at_most=1.2: accepted are blocks"),
        (lambda: masks.self_similarity(2), r"least=2: accepted is a cosine, in \[-1, 1\]"),
        (lambda: masks.antidiagonal(0), "stride=0: accepted is 1 or more"),
        (lambda: masks.select(q, k, masks.antidiagonal(3), policy), "stride=3: accepted are divisors of both sides"),
        (lambda: masks.select(q[0], k, scorer, policy), r"q must have shape \[B, S, H, D\]"),
        (lambda: masks.select(q[:, :, :3], k, scorer, policy), "k must have q's batch and head dim and a divisor"),
        (lambda: masks.select(q, k, scorer, policy, keep=other), "keep is for 20x20 tokens in blocks of"),
        (lambda: masks.select(q, k, scorer, policy, block_size=(0, 8)), "block_size="),
        (
            lambda: masks.select(q, q[:, :, :2], scorer, policy, block_size=(8, 8), keep=other, order="tile"),
            "keep is of tokens in raster order, and order='tile': accepted is one order",
        ),
        (lambda: masks.select(q, k, scorer, policy, order="x"), 'order=\'x\': accepted are "raster" and "tile"'),
    ]
    for call, message in refused:
        with pytest.raises(ValueError, match=message):
            call()


# ---- VSA's coarse output ----


def test_coarse_attention_is_attention_between_means() -> None:
    q, k = qk(45, 53, dtype=torch.float64)
    v = randn(2, 53, 2, 6, seed=7, dtype=torch.float64).requires_grad_()
    out = masks.coarse_attention(q, k, v, (16, 8))
    for b, h in ((0, 0), (1, 3)):
        weights = mean_mass(q[b, :, h], k[b, :, h // 2], 16, 8)
        means = torch.stack([v[b, list(r), h // 2].mean(0) for r in runs(53, 8)])
        expected = (weights @ means).repeat_interleave(16, 0)[:45]
        torch.testing.assert_close(out[b, :, h], expected)
    assert torch.autograd.gradcheck(
        lambda *x: masks.coarse_attention(*x, (8, 8)),
        [x[:1, :13, :2].detach().clone().requires_grad_() for x in (q, k, v)],
    )
