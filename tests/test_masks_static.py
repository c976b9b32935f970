"""Static masks: every builder equals its token-by-token definition on any grid, in any tile, order and block size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_patterns import PATTERNS, all_axes, blocks, brute_force, case, in_clamped_window, is_neighbor, layouts, orders

from hhattn import BlockMask, VideoLayout, masks


def assert_sound(mask: BlockMask) -> None:
    """Full blocks are full, partial ones neither full nor empty, tiles distinct and in use, padding's bits 0."""
    shape = (*mask.kv_num_blocks.shape[:2], *mask.num_blocks)
    (nq, nk), (bq, bk) = mask.num_blocks, mask.block_size
    padded = torch.zeros(*shape[:2], nq * bq, nk * bk, dtype=torch.bool)
    padded[:, :, : mask.q_len, : mask.k_len] = mask.to_dense()
    pairs = padded.unflatten(3, (nk, bk)).unflatten(2, (nq, bq)).sum((3, 5))
    assert torch.equal(mask.full_kv_num_blocks, (pairs == bq * bk).sum(-1))
    assert torch.equal(mask.kv_num_blocks, ((pairs > 0) & (pairs < bq * bk)).sum(-1))
    assert len(torch.unique(mask.tiles, dim=0)) == len(mask.tiles)
    listed = torch.arange(mask.kv_tiles.shape[-1]) < mask.kv_num_blocks[..., None]
    assert torch.equal(mask.kv_tiles[listed].unique(), torch.arange(len(mask.tiles), dtype=torch.int32))


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=220)
@given(data=st.data(), layout=layouts, order=orders, block=blocks)
def test_builders_equal_their_definition(
    name: str, data: st.DataObject, layout: VideoLayout, order: str, block: tuple[int, int]
) -> None:
    pattern = case(name, data.draw)
    mask = pattern.build(layout, block_size=block, order=order)
    assert torch.equal(mask.to_dense(order="raster")[0, 0], brute_force(layout, pattern.rule(layout)))
    assert_sound(mask)


@pytest.mark.parametrize("name", PATTERNS)
@settings(max_examples=40)
@given(data=st.data(), layout=layouts, order=orders, block=blocks)
def test_some_frames_as_queries_and_as_keys(
    name: str, data: st.DataObject, layout: VideoLayout, order: str, block: tuple[int, int]
) -> None:
    """The mask of some frames, in any order, is the whole mask's rows and columns of their tokens and the text's."""
    pattern = case(name, data.draw)
    frames = [data.draw(st.lists(st.integers(0, layout.frames - 1), min_size=1, max_size=4)) for _ in "qk"]
    part = pattern.build(layout, block_size=block, order=order, q_frames=frames[0], k_frames=frames[1])
    tokens = []
    for some in frames:
        video = torch.arange(layout.seq_len)[layout.video_slice].view(layout.frames, -1)[some].flatten()
        text = torch.arange(layout.seq_len)[layout.text_slice]
        tokens.append(torch.cat([text, video] if layout.text_first else [video, text]))
    whole = brute_force(layout, pattern.rule(layout))
    assert torch.equal(part.to_dense(order="raster")[0, 0], whole[tokens[0]][:, tokens[1]])


@settings(max_examples=220)
@given(layout=layouts, order=orders, block=blocks, data=st.data())
def test_text_and_dense(layout: VideoLayout, order: str, block: tuple[int, int], data: st.DataObject) -> None:
    lens = data.draw(st.none() | st.lists(st.integers(0, layout.text_len), min_size=1, max_size=3))
    for batch, length in enumerate([layout.text_len] if lens is None else lens):
        kind = ["video"] * layout.video_len
        text = ["text"] * length + ["padding"] * (layout.text_len - length)
        kind = text + kind if layout.text_first else kind + text
        real = [[p != "padding" != q for q in kind] for p in kind]
        with_text = [["text" in (p, q) and "padding" not in (p, q) for q in kind] for p in kind]
        for build, expected in ((masks.text, with_text), (masks.dense, real)):
            mask = build(layout, text_lens=lens, block_size=block, order=order)
            assert mask.kv_num_blocks.shape[0] == (1 if lens is None else len(lens))
            assert torch.equal(mask.to_dense(order="raster")[batch, 0], torch.tensor(expected))
            assert_sound(mask)


@settings(max_examples=40)
@given(layout=layouts, order=orders, block=blocks, data=st.data())
def test_each_head_has_its_own_window(
    layout: VideoLayout, order: str, block: tuple[int, int], data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.tuples(*[st.integers(1, 4)] * 3), min_size=2, max_size=3))
    for name, build, alone in (
        ("window", masks.sliding_tile, lambda s: all_axes(layout, in_clamped_window, layout.tile, s)),
        ("kernel_size", masks.neighborhood, lambda s: all_axes(layout, is_neighbor, s, [1] * 3, [1] * 3, [False] * 3)),
    ):
        mask = build(layout, **{name: sizes}, block_size=block, order=order)
        expected = torch.stack([brute_force(layout, alone(s)) for s in sizes])
        assert torch.equal(mask.to_dense(order="raster")[0], expected)
        assert_sound(mask)


@pytest.mark.parametrize("order", ["raster", "tile"])
def test_a_block_may_hold_many_frames(order: str) -> None:
    """Frames smaller than a block, tiles longer than the clip, outlines that no two blocks share."""
    for grid, tile in (((17, 1, 2), (3, 1, 1)), ((9, 1, 3), (16, 2, 2)), ((7, 3, 5), (2, 2, 2))):
        layout = VideoLayout(*grid, tile=tile, text_len=3, text_first=True)
        rule = all_axes(layout, is_neighbor, (5, 3, 3), (2, 1, 1), (1, 1, 1), (False, False, True))
        for block in ((40, 40), (16, 64), (3, 2)):
            mask = masks.neighborhood(
                layout, (5, 3, 3), (2, 1, 1), causal=(False, False, True), block_size=block, order=order
            )
            assert torch.equal(mask.to_dense(order="raster")[0, 0], brute_force(layout, rule))
            assert_sound(mask)


@pytest.mark.parametrize("limit", [1, 7, 64])
@pytest.mark.parametrize("order", ["raster", "tile"])
def test_tables_handled_in_parts_give_the_same_mask(monkeypatch: pytest.MonkeyPatch, order: str, limit: int) -> None:
    """Long videos go through in parts; a small one does where parts are made small."""
    from hhattn.masks import _grid

    layout = VideoLayout(6, 5, 7, tile=(2, 2, 3), text_len=4)
    build = [lambda: masks.radial(layout, min_width=5, block_size=(16, 8), order=order)]
    build.append(lambda: masks.neighborhood(layout, [(3, 3, 3), (1, 5, 2)], block_size=(8, 24), order=order))
    whole = [b() for b in build]
    for name in ("_TABLE", "_BITS", "_BYTES", "_ROWS"):
        monkeypatch.setattr(_grid, name, limit)
    for one, b in zip(whole, build, strict=True):
        assert torch.equal(b().to_dense(), one.to_dense())
        assert_sound(b())


def test_building_is_exact_whatever_the_precision_of_products() -> None:
    """Under autocast, with products in bfloat16, in another default dtype, without gradients: all of them a model's."""
    layout = VideoLayout(5, 16, 18, tile=(1, 8, 8))

    def build() -> BlockMask:
        return masks.neighborhood(layout, (3, 15, 13), block_size=(80, 96))

    expected = build().to_dense()
    precision, dtype = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    try:
        torch.set_float32_matmul_precision("medium")
        for default in (torch.float32, torch.bfloat16, torch.float64):
            torch.set_default_dtype(default)
            for context in (torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.no_grad()):
                with context:
                    mask = build()
                assert torch.equal(mask.to_dense(), expected)
                assert_sound(mask)
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.set_default_dtype(dtype)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"kernel_size": (3, 3, 3)}, (5, 6, 7)),
        ({"kernel_size": (2, 4, 3)}, (4, 5, 6)),
        ({"kernel_size": (3, 4, 5), "stride": (2, 3, 4)}, (6, 7, 8)),
        ({"kernel_size": (2, 2, 3), "dilation": (2, 3, 2)}, (5, 8, 7)),
        (
            {"kernel_size": (3, 3, 3), "stride": (1, 2, 3), "dilation": (1, 2, 1), "is_causal": (True, False, True)},
            (5, 7, 6),
        ),
    ],
    ids=str,
)
def test_neighborhood_equals_nattens_na3d(options: dict, shape: tuple[int, int, int]) -> None:
    """NATTEN's own attention under the same arguments, through FlexAttention, which is what it runs on a CPU."""
    natten = pytest.importorskip("natten")
    from hhattn import block_sparse_attention

    layout = VideoLayout(*shape)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, *shape, 2, 32, generator=g) for _ in range(3))
    expected = natten.na3d(q, k, v, **options, backend="flex-fna")
    mask = masks.neighborhood(layout, causal=options.pop("is_causal", False), **options)
    out = block_sparse_attention(*(x.flatten(1, 3) for x in (q, k, v)), mask)
    torch.testing.assert_close(out.unflatten(1, shape), expected, rtol=1e-5, atol=1e-5)


def test_refusals_name_the_argument() -> None:
    layout = VideoLayout(2, 4, 4, text_len=3)
    for message, build in {
        r"window=\(1, 0, 1\).*at least 1": lambda: masks.sliding_tile(layout, (1, 0, 1)),
        r"window=\[\].*three sizes": lambda: masks.sliding_tile(layout, []),
        r"window=\(3,\).*three sizes": lambda: masks.sliding_tile(layout, 3),
        r"text_lens=3.*one a batch entry": lambda: masks.text(layout, text_lens=3),
        r"kernel_size=\(3, 3\).*each axis": lambda: masks.neighborhood(layout, (3, 3)),
        r"kernel_size=\[\].*three sizes": lambda: masks.neighborhood(layout, []),
        r"stride=4.*at most kernel_size": lambda: masks.neighborhood(layout, 3, stride=4),
        r"dilation=0.*at least 1": lambda: masks.neighborhood(layout, 3, dilation=0),
        r"causal=\(True, False\).*bool": lambda: masks.neighborhood(layout, 3, causal=(True, False)),
        r"decay=0.*positive": lambda: masks.radial(layout, 0),
        r"decay=nan.*positive": lambda: masks.radial(layout, float("nan")),
        r"min_width=0.*1 or more": lambda: masks.radial(layout, min_width=0),
        r"frames_per_chunk=0.*1 or more": lambda: masks.block_causal(layout, 0),
        r"frames=-1.*0 or more": lambda: masks.sink(layout, -1),
        r"text_lens=\[4\].*0 \.\.\. 3": lambda: masks.text(layout, text_lens=[4]),
        r"text_lens=\[\].*one a batch entry": lambda: masks.dense(layout, text_lens=[]),
        r"q_frames=\[2\].*0 \.\.\. 1": lambda: masks.spatial(layout, q_frames=[2]),
        r"k_frames=\[\].*one or more": lambda: masks.temporal(layout, k_frames=[]),
        r"order='rows'": lambda: masks.dense(layout, order="rows"),
        r"block_size=\(0, 64\)": lambda: masks.dense(layout, block_size=(0, 64)),
    }.items():
        with pytest.raises(ValueError, match=message):
            build()
