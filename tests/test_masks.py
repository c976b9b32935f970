"""Masks: every builder equals its token-by-token definition on any grid, and masks combine and convert exactly."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hhattn import BlockMask, VideoLayout, masks

Rule = Callable[[tuple[int, int, int], tuple[int, int, int]], bool]


def brute_force(layout: VideoLayout, rule: Rule) -> Tensor:
    """[S, S] over video tokens in raster order; text tokens attend nothing."""
    keep = torch.zeros(layout.seq_len, layout.seq_len, dtype=torch.bool)
    t, h, w = layout.grid
    where = [(a, b, c) for a in range(t) for b in range(h) for c in range(w)]
    start = layout.video_slice.start
    for i, p in enumerate(where):
        for j, q in enumerate(where):
            keep[start + i, start + j] = rule(p, q)
    return keep


def clamped(p: int, q: int, size: int, tile: int, window: int) -> bool:
    """Sliding tile attention along one axis, as its paper draws it."""
    count = -(-size // tile)
    if window >= count:
        return True
    first = min(max(p // tile - (window - 1) // 2, 0), count - window)
    return first <= q // tile < first + window


layouts = st.builds(
    VideoLayout,
    frames=st.integers(1, 4),
    height=st.integers(1, 5),
    width=st.integers(1, 6),
    tile=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    text_len=st.integers(0, 5),
    text_first=st.booleans(),
)
orders = st.sampled_from(["raster", "tile"])
blocks = st.sampled_from([(8, 8), (16, 4), (5, 7)])


@settings(max_examples=60, deadline=None)
@given(layout=layouts, order=orders, block=blocks, window=st.tuples(*[st.integers(1, 3)] * 3))
def test_sliding_tile(layout: VideoLayout, order: str, block: tuple[int, int], window: tuple[int, int, int]) -> None:
    def rule(p: tuple[int, int, int], q: tuple[int, int, int]) -> bool:
        axes = zip(p, q, layout.grid, layout.tile, window, strict=True)
        return all(clamped(*axis) for axis in axes)

    mask = masks.sliding_tile(layout, window, block_size=block, order=order)
    assert torch.equal(mask.to_dense(order="raster")[0, 0], brute_force(layout, rule))


@settings(max_examples=60, deadline=None)
@given(layout=layouts, order=orders, block=blocks, n=st.integers(0, 3))
def test_frame_patterns(layout: VideoLayout, order: str, block: tuple[int, int], n: int) -> None:
    rules: dict[str, tuple[BlockMask, Rule]] = {
        "window": (
            masks.frame_window(layout, n, block_size=block, order=order),
            lambda p, q: abs(p[0] - q[0]) <= n,
        ),
        "sink": (masks.sink(layout, n, block_size=block, order=order), lambda p, q: q[0] < n),
        "causal": (
            masks.block_causal(layout, n + 1, block_size=block, order=order),
            lambda p, q: q[0] // (n + 1) <= p[0] // (n + 1),
        ),
    }
    for name, (mask, rule) in rules.items():
        assert torch.equal(mask.to_dense(order="raster")[0, 0], brute_force(layout, rule)), name


@settings(max_examples=40, deadline=None)
@given(layout=layouts, order=orders, block=blocks)
def test_dense_and_text(layout: VideoLayout, order: str, block: tuple[int, int]) -> None:
    assert masks.dense(layout, block_size=block, order=order).to_dense().all()
    text = torch.zeros(layout.seq_len, dtype=torch.bool)
    text[layout.text_slice] = True
    got = masks.text(layout, block_size=block, order=order).to_dense(order="raster")[0, 0]
    assert torch.equal(got, text[:, None] | text[None, :])


@settings(max_examples=40, deadline=None)
@given(sq=st.integers(1, 40), sk=st.integers(1, 40), block=blocks, seed=st.integers(0, 99))
def test_conversions_and_algebra_are_exact(sq: int, sk: int, block: tuple[int, int], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(1, 2, sq, sk, generator=g) < 0.4 for _ in range(2))
    ma, mb = (BlockMask.from_dense(x, block_size=block) for x in (a, b))
    assert torch.equal(ma.to_dense(), a)
    assert torch.equal((ma & mb).to_dense(), a & b)
    assert torch.equal((ma | mb).to_dense(), a | b)
    assert torch.equal((~ma).to_dense(), ~a)
    assert ma.density == pytest.approx(float(a.float().mean()))


def test_from_blocks_covers_ragged_ends() -> None:
    kept = torch.tensor([[True, False, True], [False, True, True]])
    mask = BlockMask.from_blocks(kept[None, None], block_size=(8, 4), q_len=11, k_len=10)
    expected = kept.repeat_interleave(8, 0).repeat_interleave(4, 1)[:11, :10]
    assert torch.equal(mask.to_dense()[0, 0], expected)


def test_equals_flex_attentions_own_dense_form() -> None:
    from torch.nn.attention.flex_attention import create_mask

    layout = VideoLayout(3, 6, 7, tile=(1, 3, 3))
    mask = masks.sliding_tile(layout, (3, 1, 3)) & masks.frame_window(layout, 1)
    flex = mask.to_flex()
    n = layout.seq_len
    assert torch.equal(create_mask(flex.mask_mod, 1, 1, n, n, device="cpu"), mask.to_dense())
    assert torch.equal(BlockMask.from_flex(flex).to_dense(), mask.to_dense())


def test_queries_of_a_chunk_and_keys_that_a_cache_holds() -> None:
    layout = VideoLayout(6, 4, 5, tile=(1, 2, 2))
    whole = masks.frame_window(layout, 2).to_dense()[0, 0].view(6, 20, 6, 20)
    part = masks.frame_window(layout, 2, q_frames=[4, 5], k_frames=[0, 3, 4, 5])
    expected = whole[[4, 5]][:, :, [0, 3, 4, 5]].reshape(40, 80)
    assert torch.equal(part.to_dense()[0, 0], expected)


def test_each_head_has_its_window() -> None:
    layout = VideoLayout(4, 5, 6, tile=(2, 2, 2), text_len=3)
    windows = [(1, 1, 1), (2, 1, 3), (1, 3, 2)]
    mask = masks.sliding_tile(layout, windows, block_size=(16, 8), order="tile")
    alone = [masks.sliding_tile(layout, w, block_size=(16, 8), order="tile").to_dense() for w in windows]
    assert torch.equal(mask.to_dense(), torch.cat(alone, 1))
    joint = mask | masks.text(layout, block_size=(16, 8), order="tile")
    assert torch.equal(joint.to_dense(), mask.to_dense() | ~mask.to_dense().any(-1, keepdim=True) | text_keys(layout))


def text_keys(layout: VideoLayout) -> Tensor:
    """[S] bool in either order."""
    return torch.arange(layout.seq_len) >= layout.video_len


@settings(max_examples=30, deadline=None)
@given(sq=st.integers(1, 40), sk=st.integers(1, 40), block=blocks, seed=st.integers(0, 99))
def test_other_forms_list_the_same_blocks(sq: int, sk: int, block: tuple[int, int], seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(2, 3, -(-sq // block[0]), -(-sk // block[1]), generator=g) < 0.5
    dense = kept.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[:, :, :sq, :sk]
    holes = (torch.rand(2, 3, sq, sk, generator=g) < 0.1) & (torch.rand(2, 3, 1, 1, generator=g) < 0.5)
    dense = dense & ~holes
    mask = BlockMask.from_dense(dense, block_size=block)
    (nq, nk), (bq, bk) = mask.num_blocks, block
    padded = torch.zeros(2, 3, nq * bq, nk * bk, dtype=torch.bool)
    padded[:, :, :sq, :sk] = dense
    tiles = padded.view(2, 3, nq, bq, nk, bk).transpose(3, 4)
    touched, full = tiles.any(-1).any(-1), tiles.all(-1).all(-1)
    assert mask.flops(5, 7, batch=2, heads=3, executed=True) == int(touched.sum()) * bq * bk * 2 * (5 + 7)
    assert mask.flops(5, batch=2, heads=3, backward=True) == int(dense.sum()) * 2 * 5 * 5
    lists = mask.q_lists()
    for b, h, j in [(b, h, j) for b in range(2) for h in range(3) for j in range(nk)]:
        rows = lists.indices[b, h, lists.offsets[b, h, j] : lists.offsets[b, h, j + 1]]
        full_rows = lists.full_indices[b, h, lists.full_offsets[b, h, j] : lists.full_offsets[b, h, j + 1]]
        assert rows.tolist() == (touched & ~full)[b, h, :, j].nonzero().flatten().tolist()
        assert full_rows.tolist() == full[b, h, :, j].nonzero().flatten().tolist()
        places = lists.tiles[b, h, lists.offsets[b, h, j] : lists.offsets[b, h, j + 1]].long()
        bits = (mask.tiles[places][..., None] >> torch.arange(8)) & 1
        assert torch.equal(bits.flatten(-2)[..., :bk].bool(), tiles[b, h, rows.long(), j])
    bsr = mask.to_bsr(batch=1, head=2)
    row, column = touched[1, 2].nonzero(as_tuple=True)
    assert bsr.indices.tolist() == column.tolist()
    assert bsr.indptr.diff().tolist() == touched[1, 2].sum(-1).tolist()
    assert torch.equal(bsr.mask, tiles[1, 2, row, column])


def test_masks_move_between_devices() -> None:
    mask = masks.frame_window(VideoLayout(3, 4, 5), 1, block_size=(8, 8))
    mask.q_lists()
    moved = mask.to("meta")
    assert moved.device.type == "meta"
    assert moved.q_lists().indices.device.type == "meta"
    assert mask.device.type == "cpu"


def test_a_minute_at_720p_builds_in_a_second_and_tens_of_megabytes() -> None:
    layout = VideoLayout(240, 23, 40, tile=(4, 4, 4))
    assert layout.seq_len == 220_800
    builders: dict[str, Callable[[], BlockMask]] = {
        "sliding_tile": lambda: masks.sliding_tile(layout, (3, 3, 3), order="tile"),
        "sliding_tile, raster": lambda: masks.sliding_tile(layout, (3, 3, 3)),
        "sliding_tile, raster, wide": lambda: masks.sliding_tile(layout, (6, 6, 6)),
        "frame_window": lambda: masks.frame_window(layout, 4),
        "block_causal": lambda: masks.block_causal(layout, 4),
        "sink": lambda: masks.sink(layout, 1),
    }
    for name, build in builders.items():
        best = min(timed(build) for _ in range(2))
        assert best < 1.0, f"{name} took {best:.1f} s"
        assert build().nbytes < 64e6, name


PEAK_OF_BUILDING = """
import hhattn
status = lambda: open("/proc/self/status")  # getrusage counts what the process that started this one holds
peak = lambda: next(int(line.split()[1]) for line in status() if line.startswith("VmHWM")) // 1024
hhattn.masks.sliding_tile(hhattn.VideoLayout(4, 4, 4), (3, 3, 3))
before, layout = peak(), hhattn.VideoLayout(240, 23, 40)
hhattn.masks.sliding_tile(layout, (3, 3, 3))
hhattn.masks.dense(layout)
print(peak() - before)
"""


def test_building_a_minute_takes_little_memory_on_the_way() -> None:
    """In a process of its own, whose peak tells. The lists of the dense mask take 45 MB, pairs would take 49 GB."""
    run = subprocess.run([sys.executable, "-c", PEAK_OF_BUILDING], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 144


@pytest.mark.parametrize("order", ["raster", "tile"])
def test_a_block_may_hold_many_groups(order: str) -> None:
    """Tiles of one token: blocks of 40 tokens hold 40 groups, some of them related and some not."""
    layout = VideoLayout(2, 5, 9, tile=(1, 1, 1), text_len=3)

    def rule(p: tuple[int, int, int], q: tuple[int, int, int]) -> bool:
        return all(clamped(*axis) for axis in zip(p, q, layout.grid, layout.tile, (1, 3, 5), strict=True))

    expected = brute_force(layout, rule)
    for block in ((40, 40), (16, 40), (40, 9), (9, 1)):
        mask = masks.sliding_tile(layout, (1, 3, 5), block_size=block, order=order)
        assert torch.equal(mask.to_dense(order="raster")[0, 0], expected)
        assert len(torch.unique(mask.tiles, dim=0)) == len(mask.tiles)


def timed(build: Callable[[], BlockMask]) -> float:
    """Processor time, which other programs on the machine don't lengthen."""
    start = time.process_time()
    build()
    return time.process_time() - start


def test_plots_and_refusals() -> None:
    layout = VideoLayout(2, 4, 4)
    assert masks.dense(layout).plot() is not None
    with pytest.raises(ValueError, match="window"):
        masks.sliding_tile(layout, (1, 0, 1))
    with pytest.raises(ValueError, match="frames_per_chunk"):
        masks.block_causal(layout, 0)
    with pytest.raises((ValueError, TypeError)):
        masks.dense(layout) & masks.dense(VideoLayout(2, 4, 5))
    with pytest.raises(ValueError, match=r"frames.*2\.5.*whole sizes"):
        VideoLayout(2.5, 4, 4)  # type: ignore[arg-type]
