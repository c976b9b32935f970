"""Masks combine and convert exactly, and a minute of video builds in a second."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import bench_masks
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_patterns import blocks, examples

from hhattn import BlockMask, VideoLayout, masks


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


@pytest.mark.parametrize("order", ["raster", "tile"])
def test_heads_and_batch_entries_side_by_side(order: str) -> None:
    layout = VideoLayout(3, 4, 5, tile=(2, 2, 2), text_len=3)
    made = {name: mask for name, mask in examples(layout, block_size=(16, 8), order=order).items() if "by" not in name}
    by_head = BlockMask.cat(list(made.values()))
    assert torch.equal(by_head.to_dense(), torch.cat([m.to_dense() for m in made.values()], 1))
    assert by_head.kv_num_blocks.shape[:2] == (1, len(made))
    assert len(torch.unique(by_head.tiles, dim=0)) == len(by_head.tiles) < sum(len(m.tiles) for m in made.values())
    by_batch = BlockMask.cat([by_head, made["dense"], by_head], dim="batch")
    dense = made["dense"].to_dense().expand(-1, len(made), -1, -1)
    assert torch.equal(by_batch.to_dense(), torch.cat([by_head.to_dense(), dense, by_head.to_dense()]))
    both = BlockMask.cat([by_batch, made["spatial"], by_batch])
    spatial = made["spatial"].to_dense().expand(3, -1, -1, -1)
    assert torch.equal(both.to_dense(), torch.cat([by_batch.to_dense(), spatial, by_batch.to_dense()], 1))
    assert both.layouts() == (layout, layout)
    assert torch.equal(BlockMask.cat([by_head]).to_dense(), by_head.to_dense())
    with pytest.raises(ValueError, match=r"0 masks.*accepted are one or more"):
        BlockMask.cat([])
    with pytest.raises(ValueError, match=r"dim='rows'.*batch"):
        BlockMask.cat([by_head], dim="rows")
    with pytest.raises(ValueError, match="differ in block_size"):
        BlockMask.cat([by_head, masks.dense(layout, order=order)])
    with pytest.raises(ValueError, match="along the other dim masks have 3 and 2"):
        BlockMask.cat([by_batch, BlockMask.cat([made["dense"]] * 2, dim="batch")])


def test_flash_attention_4_reads_the_same_pairs() -> None:
    """As its kernels do: all pairs of full blocks, the predicate's of the others, which looks them up as documented."""
    layout = VideoLayout(3, 4, 5, tile=(2, 2, 2), text_len=3)
    for name, mask in examples(layout, block_size=(16, 8)).items():
        (bq, bk), (nq, nk) = mask.block_size, mask.num_blocks
        lists = mask.to_fa4()
        codes, tiles = lists.aux_tensors
        batch, heads = codes.shape[:2]
        seen = torch.zeros(batch, heads, nq * bq, nk * bk, dtype=torch.bool)
        for b, h, i in ((b, h, i) for b in range(batch) for h in range(heads) for i in range(nq)):
            rows = slice(i * bq, (i + 1) * bq)
            for j in lists.full_block_idx[b, h, i, : lists.full_block_cnt[b, h, i]].tolist():
                seen[b, h, rows, j * bk : (j + 1) * bk] = True
            for j in lists.mask_block_idx[b, h, i, : lists.mask_block_cnt[b, h, i]].tolist():
                for x, y in ((x, y) for x in range(bq) for y in range(bk)):
                    byte = int(tiles[codes[b, h, i, j] - 2, x, y // 8])
                    seen[b, h, i * bq + x, j * bk + y] = byte >> (y % 8) & 1
        assert torch.equal(seen[:, :, : mask.q_len, : mask.k_len], mask.to_dense()), name
        assert lists.mask_block_idx.shape == (batch, heads, nq, nk)
        assert not seen[:, :, mask.q_len :].any()
        assert not seen[:, :, :, mask.k_len :].any()


def test_maps_of_whole_blocks() -> None:
    kept = torch.rand(2, 3, 5, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    whole = BlockMask.from_blocks(kept, (8, 16), q_len=35, k_len=60)
    assert torch.equal(whole.to_block_map(), kept)
    partial = whole & ~BlockMask.from_dense((torch.arange(60) == 17).expand(1, 1, 35, 60), (8, 16))
    with pytest.raises(ValueError, match=r'in which some pairs are attended and some not.*partial="full"'):
        partial.to_block_map()
    assert torch.equal(partial.to_block_map("full"), kept)
    assert torch.equal(partial.to_block_map("empty"), kept & (torch.arange(4) != 1))
    with pytest.raises(ValueError, match="partial='half'"):
        partial.to_block_map("half")


def test_masks_move_between_devices() -> None:
    mask = masks.frame_window(VideoLayout(3, 4, 5), 1, block_size=(8, 8))
    mask.q_lists()
    moved = mask.to("meta")
    assert moved.device.type == "meta"
    assert moved.q_lists().indices.device.type == "meta"
    assert mask.device.type == "cpu"


@pytest.fixture(scope="module")
def minute(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every static mask of a minute at 720p, built on one thread of a process of its own, whose peak tells. Other
    programs and the system's own counting only add to time and peak, so the least of up to three processes counts."""
    least: list[dict[str, Any]] = []
    for i in range(3):
        file = tmp_path_factory.mktemp("minute") / "masks.json"
        command = [sys.executable, bench_masks.__file__, "--json", str(file), "--quick", "--threads", "1"]
        subprocess.run(command, capture_output=True, text=True, check=True)
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        for best, row in zip(least or rows, rows, strict=True):
            best |= {name: min(best[name], row[name]) for name in ("processor_ms", "peak_beside_mb")}
        least = least or rows
        if i == 2 or all(fits(row) for row in least):
            break
    return least


def fits(row: dict[str, Any]) -> bool:
    """Radial bands are runs of raster tokens, and cut up by tiles they touch 3 million blocks, 3 times as many: it has
    twice as much of both."""
    factor = 2 if row["pattern"] == "radial" and row["order"] == "tile" else 1
    return bool(row["processor_ms"] < 1000 * factor and row["peak_beside_mb"] < 64 * factor)


def test_a_minute_at_720p_builds_in_a_second_and_tens_of_megabytes(minute: list[dict[str, Any]]) -> None:
    """Processor time, which other programs lengthen less. Pairs as bytes would take 49 GB."""
    assert {r["order"] for r in minute} == {"raster", "tile"}
    assert len(minute) == 2 * len(bench_masks.PATTERNS)
    for r in minute:
        assert fits(r), r
        assert r["mask_mb"] < 64, r


def test_plots_and_refusals() -> None:
    layout = VideoLayout(2, 4, 4)
    assert masks.dense(layout).plot() is not None
    with pytest.raises((ValueError, TypeError)):
        masks.dense(layout) & masks.dense(VideoLayout(2, 4, 5))
    with pytest.raises(ValueError, match=r"frames.*2\.5.*whole sizes"):
        VideoLayout(2.5, 4, 4)  # type: ignore[arg-type]
