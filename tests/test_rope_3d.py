"""rope_3d against diffusers' tables and against the definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import DEVICE

import hhattn

pytestmark = pytest.mark.any_device


def rope_3d(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return hhattn.rope_3d(*args, **{"device": DEVICE, **kwargs})


def test_the_definition() -> None:
    cos, sin = rope_3d((2, 3, 5), 16, axes_dims=(8, 4, 4), offset=(7, 0, 0.5))
    assert cos.shape == sin.shape == (30, 16)
    assert cos.dtype == torch.float32
    token = (1 * 3 + 2) * 5 + 4  # frame 1, row 2, column 4
    assert cos[token, 2].item() == pytest.approx(math.cos((1 + 7) * 1e4 ** (-2 / 8)))
    assert sin[token, 8].item() == pytest.approx(math.sin(2))
    assert sin[token, 15].item() == pytest.approx(math.sin(4.5 * 1e4 ** (-2 / 4)))


@pytest.mark.parametrize(
    ("dim", "expected"), [(112, (40, 36, 36)), (128, (44, 42, 42)), (64, (24, 20, 20)), (2, (2, 0, 0))]
)
def test_default_axes(dim: int, expected: tuple[int, int, int]) -> None:
    torch.testing.assert_close(rope_3d((2, 3, 4), dim), rope_3d((2, 3, 4), dim, axes_dims=expected))


def test_same_as_diffusers() -> None:
    embeddings = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    grid, dim = (3, 4, 6), 44
    with torch.device("cpu"):
        theirs = embeddings.WanRotaryPosEmbed(dim, (1, 1, 1), 32)(torch.empty(1, 1, *grid))
    for ours, table in zip(rope_3d(grid, dim), theirs, strict=True):
        torch.testing.assert_close(ours, table.reshape(ours.shape).float().to(DEVICE))


def test_half_holds_the_same_angles_in_another_order() -> None:
    for a, b in zip(rope_3d((2, 3, 4), 20), rope_3d((2, 3, 4), 20, rotate="half"), strict=True):
        torch.testing.assert_close(torch.cat((a[:, ::2], a[:, 1::2]), 1), b)


def test_positions_as_tensors() -> None:
    cos, _ = rope_3d((torch.tensor([4.0, 4.5], device=DEVICE), 2, torch.tensor([1, 0], device=DEVICE)), 12)
    frames, _ = rope_3d((2, 2, 2), 12, axes_dims=(4, 4, 4), offset=(4, 0, 0))
    torch.testing.assert_close(cos[1, :], frames[0, :])  # columns run backwards
    assert cos[4, 0].item() == pytest.approx(math.cos(4.5))


def test_far_positions_stay_exact() -> None:
    """Float32 angles are wrong by 0.06 rad at position 10⁶; these are not."""
    cos, _ = rope_3d((1, 1, 1), 6, offset=(1e6 + 0.25, 0, 0))
    assert cos[0, 0].item() == pytest.approx(math.cos(1e6 + 0.25), abs=1e-7)


def test_a_chunk_continues_the_clip() -> None:
    whole, chunk = rope_3d((8, 2, 3), 12), rope_3d((3, 2, 3), 12, offset=(5, 0, 0))
    torch.testing.assert_close([t[30:] for t in whole], list(chunk), rtol=0, atol=0)


def test_compiled_without_a_break() -> None:
    compiled = torch.compile(lambda: rope_3d((2, 3, 4), 12), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), rope_3d((2, 3, 4), 12))


def test_empty_grid_and_meta() -> None:
    assert rope_3d((0, 3, 4), 12)[0].shape == (0, 12)
    assert rope_3d((2, 3, 4), 12, device="meta")[0].device.type == "meta"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grid": (2, 3)}, ValueError, r"grid must be \(frames, height, width\), got 2 entries"),
        ({"grid": (2, 3, -1)}, ValueError, "grid must hold lengths that are not negative, got -1"),
        ({"grid": (2, 3, 1.5)}, TypeError, "grid must hold lengths or 1-D tensors of positions, got float"),
        ({"grid": (2, 3, torch.zeros(2, 2))}, ValueError, "a tensor of positions must be 1-D"),
        ({"head_dim": 7}, ValueError, "head_dim=7 must be positive and even"),
        ({"theta": 0}, ValueError, "theta=0 must be positive"),
        ({"axes_dims": (4, 4, 2)}, ValueError, r"axes_dims=\(4, 4, 2\) must be three even numbers"),
        ({"axes_dims": (5, 4, 3)}, ValueError, "axes_dims"),
        ({"offset": (1,)}, ValueError, "offset must be"),
        ({"rotate": "whole"}, ValueError, "rotate='whole'"),
    ],
)
def test_refusals(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rope_3d(**{"grid": (2, 3, 4), "head_dim": 12, **change})
