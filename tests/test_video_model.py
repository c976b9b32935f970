"""The diffusion transformer: chunk after chunk it says what it would say at once, from a memory that never grows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from video_models import GRID, SMALL, cut, in_chunks, inputs, small_dit, tensors_of

import hhattn
from hhattn.video.cost import cost
from hhattn.video.field import CLOCK_SECONDS, clock
from hhattn.video.model import PATHWAYS, SANA_VIDEO_2B, Config, Memory, VideoDiT, timestep_features, window_mask
from hhattn.video.world import CAMERA_PERIOD

LINEAR = replace(SMALL, sparse_every=0)


def assert_near(a: Tensor, b: Tensor, share: float = 2e-5) -> None:
    """Equal up to ``share`` of the largest value: two orders of the same fp32 sums."""
    torch.testing.assert_close(a, b, rtol=0, atol=share * float(b.abs().max()))


@pytest.mark.parametrize("pathway", PATHWAYS)
@pytest.mark.parametrize(
    ("sparse_every", "lens"),
    [(0, (3, 3, 3, 2)), (0, (1,) * 7), (2, (3, 3)), (2, (4, 3)), (1, (3, 2)), (1, (2, 2)), (2, (1,) * 4)],
)
def test_chunk_after_chunk_is_one_call(pathway: str, sparse_every: int, lens: tuple[int, ...]) -> None:
    """With sparse blocks for a chunk and the next: later the sink stands nearer than it was, see below."""
    model = small_dit(replace(SMALL, pathway=pathway, sparse_every=sparse_every))
    z, t, cond = inputs(model, sum(lens))
    with torch.no_grad():
        whole, memory = model(z, t, cond, lens)
    pieces, memories = in_chunks(model, z, t, cond, lens)
    assert_near(pieces, whole)
    assert memory.frames == memories[-1].frames == sum(lens)


@pytest.mark.parametrize("pathway", PATHWAYS)
@pytest.mark.parametrize("sparse_every", [0, 2])
def test_the_memory_matters(pathway: str, sparse_every: int) -> None:
    """Without what went before the second chunk is another one, so the test above can fail."""
    model = small_dit(replace(SMALL, pathway=pathway, sparse_every=sparse_every))
    z, t, cond = inputs(model, 6)
    pieces, _ = in_chunks(model, z, t, cond, (3, 3))
    alone, _ = in_chunks(model, z[:, 3:], t[:, 3:], cut(cond, slice(3, 6)), (3,))
    assert (pieces[:, 3:] - alone).abs().max() > 1e-3 * alone.abs().max()


def test_one_call_goes_on_in_chunks() -> None:
    """The memory of a call with several chunks is as good as that of the calls one by one."""
    model = small_dit(replace(LINEAR, pathway="alternating"))
    z, t, cond = inputs(model, 9)
    pieces, _ = in_chunks(model, z, t, cond, (3, 3, 3))
    with torch.no_grad():
        _, memory = model(z[:, :6], t[:, :6], cut(cond, slice(0, 6)), (3, 3))
    last, _ = in_chunks(model, z[:, 6:], t[:, 6:], cut(cond, slice(6, 9)), (3,), memory)
    assert_near(last, pieces[:, 6:])


@pytest.mark.parametrize("pathway", PATHWAYS)
@pytest.mark.parametrize("sparse_every", [0, 2])
def test_nothing_earlier_sees_a_later_chunk(pathway: str, sparse_every: int) -> None:
    model = small_dit(replace(SMALL, pathway=pathway, sparse_every=sparse_every))
    z, t, cond = inputs(model, 6)
    other = z.clone()
    other[:, 3:] = torch.randn(other[:, 3:].shape)
    level = t.clone()
    level[:, 3:] = 0.5
    with torch.no_grad():
        a, b = model(z, t, cond, (3, 3))[0], model(other, level, cond, (3, 3))[0]
    assert torch.equal(a[:, :3], b[:, :3])
    assert not torch.equal(a[:, 3:], b[:, 3:])


@pytest.mark.parametrize("sparse_every", [0, 2])
def test_within_a_chunk_frames_see_both_ways(sparse_every: int) -> None:
    model = small_dit(replace(SMALL, sparse_every=sparse_every))
    z, t, cond = inputs(model, 3)
    other = z.clone()
    other[:, 2] += 1
    with torch.no_grad():
        a, b = model(z, t, cond, (3,))[0], model(other, t, cond, (3,))[0]
    assert (a - b)[:, 0].abs().max() > 1e-4


@pytest.mark.parametrize("pathway", PATHWAYS)
@pytest.mark.parametrize("sparse_every", [0, 2])
def test_the_memory_never_grows_and_says_its_size(pathway: str, sparse_every: int) -> None:
    config = replace(SMALL, pathway=pathway, sparse_every=sparse_every)
    model = small_dit(config)
    z, t, cond = inputs(model, 31, batch=1)
    _, memories = in_chunks(model, z, t, cond, (4, *[3] * 9))
    sizes = [m.bytes() for m in memories]
    held = [sum(x.untyped_storage().nbytes() for x in tensors_of(m)) for m in memories]
    assert set(sizes) == set(held) == {cost(config, GRID).memory_bytes}


def test_positions_never_grow() -> None:
    """Chunk 1000 is chunk 10 where the memory is the same: nothing in it or in the model counts frames from the
    start."""
    model = small_dit()
    z, t, cond = inputs(model, 33)
    _, memories = in_chunks(model, z[:, :30], t[:, :30], cut(cond, slice(0, 30)), (3,) * 10)
    early, late = (Memory(memories[-1].layers, frames) for frames in (30, 3000))
    (a, (after_a,)), (b, (after_b,)) = (
        in_chunks(model, z[:, 30:], t[:, 30:], cut(cond, slice(30, 33)), (3,), m) for m in (early, late)
    )
    assert torch.equal(a, b)
    assert all(torch.equal(x, y) for x, y in zip(tensors_of(after_a), tensors_of(after_b), strict=True))
    assert (after_a.frames, after_b.frames) == (33, 3003)


def test_the_state_decays_by_head_and_chunk() -> None:
    """The sum of keys after two chunks is the first one's, times the decay, plus that of the second alone. In the
    first block, whose input no memory has touched."""
    model = small_dit(LINEAR)
    z, t, cond = inputs(model, 6)
    _, (first, both) = in_chunks(model, z, t, cond, (3, 3))
    _, (second,) = in_chunks(model, z[:, 3:], t[:, 3:], cut(cond, slice(3, 6)), (3,))
    sums = [m.layers[0].linear.k_sum for m in (first, both, second)]
    assert_near(sums[1], torch.tensor(LINEAR.decay)[:, None] * sums[0] + sums[2])


def test_mix_ffn_looks_back_over_time() -> None:
    """y_t = x_t + w_0·x_{t-2} + w_1·x_{t-1} + w_2·x_t for what the spatial part makes of each frame, nothing before
    the first."""
    ffn = small_dit().blocks[0].ffn
    x = torch.randn(1, 4, GRID[0] * GRID[1], SMALL.dim)
    with torch.no_grad():
        made, past = ffn(x, GRID, None)
        taps = ffn.time.clone()
        ffn.time.zero_()
        plain, inner = ffn(x, GRID, None)
        y = torch.cat([torch.zeros_like(plain[:, :2]), plain], 1)
        expected = plain + taps[0] * y[:, :-2] + taps[1] * y[:, 1:-1] + taps[2] * y[:, 2:]
    assert_near(made, expected)
    assert torch.equal(past, inner)
    assert_near(past, plain[:, -2:])


def test_a_long_stream_stays_finite_and_forgets() -> None:
    """Decay and window forget: two streams that began differently, but for the sink, grow alike."""
    model = small_dit(LINEAR)
    z, t, cond = inputs(model, 60, batch=1)
    other = z.clone()
    other[:, :3] = torch.randn(other[:, :3].shape)
    a, b = (in_chunks(model, x, t, cond, (3,) * 20)[0] for x in (z, other))
    assert a.isfinite().all()
    difference = (a - b).abs().amax((0, 2, 3, 4)).view(20, 3).amax(1)
    assert difference[-1] < 0.2 * difference[0]


@pytest.mark.parametrize("lens", [(4, 3, 3, 3), (1,) * 9, (2, 1, 3, 1, 1, 3, 2), (1, 4, 1)], ids=str)
@pytest.mark.parametrize("reach", [0, 1, 2])
def test_sparse_blocks_against_dense_softmax(lens: tuple[int, ...], reach: int) -> None:
    """Every call of a stream against attention written out over all tokens so far: window of tiles, last frames, the
    call itself, and the sink, which stays a chunk (or the first call, if that was longer) before the present."""
    config = replace(SMALL, layers=1, sparse_every=1, window=(reach, 1, 3))
    model = small_dit(config)
    layer, n = model.blocks[0].attn, GRID[0] * GRID[1]
    seen: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(lambda _, args, out: seen.append((args[0], out[0])))
    z, t, cond = inputs(model, sum(lens), batch=1)
    in_chunks(model, z, t, cond, lens)
    layouts = [hhattn.VideoLayout(c, *GRID, tile=(1, *config.tile)) for c in lens]
    x = torch.cat([layout.from_tiles(tokens) for layout, (tokens, _) in zip(layouts, seen, strict=True)], 1)

    def rotated(x: Tensor, start: int, frames: int) -> tuple[Tensor, Tensor]:
        q, k = layer.queries_and_keys(x, hhattn.rope_3d((frames, *GRID), config.head_dim, offset=(start, 0, 0)))
        return q[0].transpose(0, 1), k[0].transpose(0, 1)

    with torch.no_grad():
        q, k = rotated(x, 0, sum(lens))
        v = layer.heads(layer.to_v(x))[0].transpose(0, 1)
        tokens = torch.arange(sum(lens) * n)
        chunk = torch.arange(len(lens)).repeat_interleave(torch.tensor(lens) * n)
        mask = seen_pairs(tokens // n, chunk, tokens, tokens, GRID, config.window)
        start = 0
        for layout, (_, out), length in zip(layouts, seen, lens, strict=True):
            now, past = slice(start * n, (start + length) * n), slice(0, (start + length) * n)
            keys = k[:, past].clone()
            if start:
                keys[:, :n] = rotated(x[:, :n], max(0, start - max(lens[0], config.chunk)), 1)[1]
            y = F.scaled_dot_product_attention(q[:, now], keys, v[:, past], attn_mask=mask[now, past])
            expected = layer.to_out(y.transpose(0, 1).flatten(1)[None])
            assert_near(layout.from_tiles(out), expected)
            start += length


def near_tiles(a: Tensor, b: Tensor, size: int, window: int) -> Tensor:
    """Which positions ``b`` on an axis of ``size`` cells in tiles of 2 are in the window of ``a``: it is centred on
    the tile of ``a`` and moves inwards at an edge."""
    tiles = -(-size // 2)
    start = (a // 2 - (window - 1) // 2).clamp(0, max(tiles - window, 0))
    return (start[:, None] <= b // 2) & (b // 2 < start[:, None] + window)


def seen_pairs(
    frames: Tensor, chunk: Tensor, queries: Tensor, keys: Tensor, grid: tuple[int, int], window: tuple[int, int, int]
) -> Tensor:
    """The definition of :func:`window_mask` for tokens in raster order, ``frames`` and ``chunk`` for each of them."""
    n = grid[0] * grid[1]
    row, col = torch.arange(len(frames)) % n // grid[1], torch.arange(len(frames)) % grid[1]
    near = near_tiles(row[queries], row[keys], grid[0], window[1])
    near &= near_tiles(col[queries], col[keys], grid[1], window[2])
    close = (frames[queries][:, None] - frames[keys]).abs() <= window[0]
    return near & ((close & (chunk[keys] <= chunk[queries][:, None])) | (frames[keys] == 0))


@pytest.mark.parametrize("window", [(2, 3, 1), (1, 1, 3), (3, 5, 5)])
@pytest.mark.parametrize(("lens", "past"), [((4,), 0), ((4, 4), 0), ((4, 2), 0), ((4,), 3), ((1,), 3)])
def test_window_mask_is_its_definition(lens: tuple[int, ...], past: int, window: tuple[int, int, int]) -> None:
    grid, frames = (5, 9), sum(lens)
    n = grid[0] * grid[1]
    dense = window_mask(replace(SMALL, chunk=4, window=window), grid, frames, lens, past).to_dense("raster")[0, 0]
    frame = torch.arange(past + frames).repeat_interleave(n)
    chunk = torch.tensor([0] * past + [i for i, c in enumerate(lens) for _ in range(c)]).repeat_interleave(n)
    tokens = torch.arange(len(frame))
    assert torch.equal(dense, seen_pairs(frame, chunk, tokens[past * n :], tokens, grid, window))


@pytest.mark.parametrize(("lens", "past"), [((3, 4), 0), ((4, 3, 4), 0), ((3, 3), 3)])
def test_window_mask_refuses_other_chunks(lens: tuple[int, ...], past: int) -> None:
    with pytest.raises(ValueError, match="chunk_lens="):
        window_mask(SMALL, GRID, sum(lens), lens, past)


def test_a_clean_latent_comes_back() -> None:
    """At level 0 nothing is unknown: x0 is z, whatever the network says; at level 1 nothing of z passes by it."""
    model = small_dit()
    z, _, cond = inputs(model, 3)
    with torch.no_grad():
        x0, _ = model(z, torch.zeros(2, 3), cond, (3,))
        torch.testing.assert_close(x0, z, rtol=1e-6, atol=1e-6)
        silent = small_dit()
        for p in silent.head[-1].parameters():
            p.zero_()
        guess, _ = silent(z, torch.full((2, 3), 0.6), cond, (3,))
        assert not silent(z, torch.ones(2, 3), cond, (3,))[0].any()
    # E[x0 | z] of independent Gaussians, which a network that says nothing has to fall back on
    variance = model.spread.view(-1, 1, 1) ** 2
    torch.testing.assert_close(guess, z * 0.4 * variance / (0.16 * variance + 0.36))


@pytest.mark.parametrize("pathway", PATHWAYS)
def test_gradients_reach_every_parameter(pathway: str) -> None:
    model = small_dit(replace(SMALL, pathway=pathway)).train()
    z, t, _ = inputs(model, 6)
    ids = torch.tensor([[1, 2, 3, 4, 1], [5, 3, 0, 2, 0]])
    poses = torch.rand(2, 6, 4, 4) * torch.tensor([0.2, 0.1, 0.1, 9.0])
    cond = model.condition(ids, torch.rand(2, 6, 4), poses, torch.zeros(2, 2), GRID)
    model(z, t, cond, (3, 3))[0].square().mean().backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pathway": "diagonal"}, "pathway='diagonal'; accepted: joint, spatial, temporal, alternating"),
        ({"decay": (0.5,)}, "decay has 1 values; one for each of the 2 heads"),
        ({"chunk": 2}, r"chunk=2; accepted with window=\(2, 3, 3\): more than 2"),
    ],
)
def test_config_refuses(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


def test_config_places_the_sparse_blocks() -> None:
    assert [Config().is_sparse(i) for i in range(6)] == [False, False, True, False, False, True]
    assert not any(LINEAR.is_sparse(i) for i in range(6))
    alternating = replace(LINEAR, pathway="alternating")
    assert [alternating.sees(i) for i in range(3)] == ["spatial", "temporal", "spatial"]


def test_the_published_size_builds_without_memory() -> None:
    with torch.device("meta"):
        model = VideoDiT(SANA_VIDEO_2B)
    parameters = sum(p.numel() for p in model.parameters())
    assert 1.5e9 < parameters < 2.6e9
    assert all(p.is_meta for p in model.parameters())
    assert cost(SANA_VIDEO_2B, (23, 40)).parameters == parameters


def test_cost_counts_what_runs() -> None:
    config = replace(Config(), sparse_every=0)  # no counter knows the operations of a sparse block
    model, frames, grid = VideoDiT(config).eval(), 2, (23, 40)
    z = torch.randn(1, frames, config.channels, *grid)
    # the reference is made of operations that the counter knows
    with torch.no_grad(), hhattn.use_impl("reference"), FlopCounterMode(display=False) as counter:
        cond = model.condition(
            torch.zeros(1, 5, dtype=torch.long), torch.zeros(1, frames, 4), torch.rand(1, frames, 4, 4),
            torch.zeros(1, 2), grid,
        )  # fmt: skip
        model(z, torch.ones(1, frames), cond, (frames,))
    counted = cost(config, grid)
    assert counter.get_total_flops() / frames == pytest.approx(counted.flops, rel=0.01)
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert cost(Config(), grid).flops > cost(Config(), (12, 20)).flops * 3.5


def test_a_window_of_cells_is_a_cut_of_the_field() -> None:
    """Crops train what whole frames use: the features of a cell depend on its place, not on the crop."""
    model = small_dit()
    ids, times, poses = torch.tensor([[1, 2, 3, 4, 1]]), torch.rand(1, 2, 4), torch.rand(1, 2, 4, 4)
    with torch.no_grad():
        whole = model.condition(ids, times, poses, torch.zeros(1, 2), (6, 8)).field.view(1, 2, 6, 8, -1)
        part = model.condition(ids, times, poses, torch.tensor([[2, 3]]), (4, 5)).field.view(1, 2, 4, 5, -1)
    torch.testing.assert_close(part, whole[:, :, 2:, 3:], rtol=1e-4, atol=1e-5)


def test_the_field_follows_subject_and_camera() -> None:
    model = small_dit()
    ids, times = torch.tensor([[1, 2, 3, 4, 1]]), torch.zeros(1, 1, 4)

    def field(*pose: float) -> Tensor:
        poses = torch.tensor(pose).expand(1, 1, 4, 4)
        return model.condition(ids, times, poses, torch.zeros(1, 2), (20, 30)).field.view(20, 30, -1)

    with torch.no_grad():
        here, moved = field(0.2, 0.2, 0.0, 0.0), field(0.2 + 3 * 32 / 720, 0.2 + 2 * 32 / 720, 0.0, 0.0)
        nowhere = field(-5.0, -5.0, 0.0, 0.0)
        # cells that the subject doesn't reach only see that it is somewhere up left
        torch.testing.assert_close(here[18:, 20:], nowhere[18:, 20:], rtol=0, atol=1e-5)
        torch.testing.assert_close(moved[18:, 20:], nowhere[18:, 20:], rtol=0, atol=1e-5)
        assert (here - nowhere)[2:7, 2:7].abs().amax(-1).min() > 1e-2
        assert (moved - here)[2:9, 2:10].abs().amax(-1).min() > 1e-2
        turned = field(0.2, 0.2, 0.0, CAMERA_PERIOD)
        torch.testing.assert_close(turned, here, rtol=0, atol=1e-3)
        assert not torch.allclose(field(0.2, 0.2, 0.0, 1.0), here, atol=1e-2)


def test_the_field_turns_with_the_subject() -> None:
    """A quarter turn moves what is right of the subject to below it: features of cell (a, b) are those that cell
    (b, -a) had. Scene planes are emptied, and a cell's four sample points are made to count alike."""
    field = small_dit().field
    with torch.no_grad():
        for plane in field.backdrop:
            plane.zero_()
        samples = field.proj.weight[:, :-5].unflatten(1, (4, -1))
        samples.copy_(samples.mean(1, keepdim=True).expand_as(samples))
        centre = torch.tensor([8 * 32 / 720, (8 * 32 - 8) / 720])  # a corner of cells, in the middle of 16 x 16

        def seen(angle: float) -> Tensor:
            pose = torch.tensor([*centre, angle, 0.0]).expand(1, 1, 4, 4)
            at = (torch.tensor([2]), torch.tensor([3]), torch.ones(1, 40), torch.zeros(1, 1, 4))
            return field(*at, pose, torch.zeros(1, 2), (16, 16), 8)[0, 0]

        upright, turned = seen(0.0), seen(math.pi / 2)
    torch.testing.assert_close(turned, upright.rot90(-1), rtol=0, atol=1e-4)
    assert not torch.allclose(turned, upright, atol=1e-2)


def test_the_clock_closes() -> None:
    t = torch.linspace(0, 5, 7)
    torch.testing.assert_close(clock(t), clock(t + CLOCK_SECONDS), rtol=0, atol=1e-4)
    assert (torch.cdist(clock(t), clock(t)) + torch.eye(7) > 0.5).all(), "two moments look the same"


def test_timestep_features_tell_levels_apart() -> None:
    f = timestep_features(torch.linspace(0, 1, 33))
    assert f.shape == (33, 64)
    assert (torch.cdist(f, f) + torch.eye(33) > 0.05).all()


@pytest.mark.parametrize("batch", [1, 3])
def test_batch_items_do_not_mix(batch: int) -> None:
    model = small_dit()
    z, t, cond = inputs(model, 3, batch)
    with torch.no_grad():
        together, _ = model(z, t, cond, (3,))
        last = type(cond)(cond.words[-1:], cond.field[-1:])
        alone, _ = model(z[-1:], t[-1:], last, (3,))
    assert_near(together[-1:], alone)
