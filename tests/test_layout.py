"""VideoLayout against a definition that walks the tiles one by one."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from hhattn.layout import VideoLayout

sizes = st.integers(1, 9)
layouts = st.builds(
    VideoLayout,
    frames=sizes,
    height=sizes,
    width=sizes,
    tile=st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    text_len=st.integers(0, 11),
    text_first=st.booleans(),
)


def walk(layout: VideoLayout) -> list[int]:
    """Raster numbers of the tokens in tile order, by walking tiles and the tokens inside them."""
    (F, H, W), (t, h, w) = layout.grid, layout.tile
    video = []
    for f0, r0, c0 in itertools.product(range(0, F, t), range(0, H, h), range(0, W, w)):
        for f, r, c in itertools.product(range(f0, f0 + t), range(r0, r0 + h), range(c0, c0 + w)):
            if f < F and r < H and c < W:
                video.append((f * H + r) * W + c)
    if layout.text_first:
        return list(range(layout.text_len)) + [i + layout.text_len for i in video]
    return video + list(range(F * H * W, layout.seq_len))


@settings(max_examples=60, deadline=None)
@given(layouts)
def test_tile_order_is_the_walk_over_tiles(layout: VideoLayout) -> None:
    assert layout.tile_index().tolist() == walk(layout)
    assert layout.tile_index()[layout.raster_index()].tolist() == list(range(layout.seq_len))


@settings(max_examples=30, deadline=None)
@given(layouts)
def test_tiles_are_runs_of_tile_order(layout: VideoLayout) -> None:
    ids = layout.tile_ids("tile")
    video, text = ids[layout.video_slice], ids[layout.text_slice]
    assert (video.diff() >= 0).all()
    assert (text.diff() >= 0).all()
    assert sorted(set(ids.tolist())) == list(range(layout.num_tiles))
    assert ids.bincount().max() <= layout.tile_len
    assert torch.equal(layout.to_tiles(layout.tile_ids("raster"), dim=0), ids)


@settings(max_examples=30, deadline=None)
@given(layouts)
def test_positions_number_the_tokens(layout: VideoLayout) -> None:
    f, r, c = layout.positions("raster")[layout.video_slice].unbind(-1)
    assert ((f * layout.height + r) * layout.width + c).tolist() == list(range(layout.video_len))
    assert (layout.positions("raster")[layout.text_slice] == -1).all()
    assert torch.equal(layout.positions("tile"), layout.positions("raster")[layout.tile_index()])


@pytest.mark.parametrize("dim", [0, 1, 2, -2])
def test_round_trip_along_any_dim_and_its_gradient(dim: int) -> None:
    layout = VideoLayout(5, 7, 6, tile=(2, 3, 4), text_len=3)
    shape = [2, 3, 4]
    shape[dim] = layout.seq_len
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    tiled = layout.to_tiles(x, dim)
    assert torch.equal(tiled, x.index_select(dim, torch.tensor(walk(layout))))
    assert torch.equal(layout.from_tiles(tiled, dim), x)
    weight = torch.randn(shape, dtype=torch.float64)
    (grad,) = torch.autograd.grad((tiled * weight).sum(), x)
    assert torch.equal(grad, layout.from_tiles(weight, dim))


def test_a_layout_is_a_key() -> None:
    a, b = VideoLayout(4, 5, 6, tile=[2, 2, 2]), VideoLayout(4, 5, 6, tile=(2, 2, 2))  # type: ignore[arg-type]
    assert a == b
    assert hash(a) == hash(b)
    assert a != VideoLayout(4, 5, 6)
    assert a.tile_index() is b.tile_index()
    with pytest.raises(AttributeError):
        a.frames = 5  # type: ignore[misc]


def test_compiles_without_a_break() -> None:
    layout = VideoLayout(3, 5, 7, tile=(2, 2, 2), text_len=2)
    x = torch.randn(2, layout.seq_len, 3)
    f = torch.compile(lambda x: layout.from_tiles(layout.to_tiles(x) * 2), fullgraph=True, backend="aot_eager")
    assert torch.equal(f(x), x * 2)


def test_cached_indices_serve_training_after_inference_and_fake_tensors() -> None:
    layout = VideoLayout(3, 5, 4, tile=(2, 2, 3))
    with FakeTensorMode():
        assert layout.to_tiles(torch.empty(2, layout.seq_len)).shape == (2, layout.seq_len)
    with torch.inference_mode():
        layout.to_tiles(torch.zeros(2, layout.seq_len))
    x = torch.randn(2, layout.seq_len, requires_grad=True)
    layout.from_tiles(layout.to_tiles(x)).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    with FakeTensorMode():
        assert layout.to_tiles(torch.empty(2, layout.seq_len)).shape == (2, layout.seq_len)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"frames": 0, "height": 2, "width": 2}, r"\(0, 2, 2\).*at least 1"),
        ({"frames": 1, "height": 2, "width": 2, "tile": (4, 4)}, r"tile=\(4, 4\).*three"),
        ({"frames": 1, "height": 2, "width": 2, "tile": (4, 0, 4)}, r"tile=\(4, 0, 4\)"),
        ({"frames": 1, "height": 2, "width": 2, "text_len": -1}, "text_len=-1"),
    ],
)
def test_refuses_what_is_no_grid(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VideoLayout(**kwargs)


def test_refuses_the_wrong_number_of_tokens_or_order() -> None:
    layout = VideoLayout(2, 3, 4)
    with pytest.raises(ValueError, match=r"x\.shape\[1\]=23.*24 tokens"):
        layout.to_tiles(torch.zeros(1, 23))
    with pytest.raises(ValueError, match='order=\'rows\': accepted are "raster" and "tile"'):
        layout.positions("rows")  # type: ignore[arg-type]
