"""Calibration: what it says of a pattern is what the pattern does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import randn
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from hhattn import VideoLayout, masks
from hhattn.cli import app
from hhattn.masks.calibrate import calibrate

LAYOUT = VideoLayout(4, 6, 10, tile=(2, 3, 4), text_len=5)


def qkv(queries: int, keys: int) -> list[Tensor]:
    return [randn(1, n, 2, 8, seed=i).cumsum(1) / 4 for i, n in enumerate((queries, keys, keys))]


def test_recall_falls_with_density_and_no_guess_beats_the_best_blocks() -> None:
    rows = list(calibrate(*qkv(245, 245), (0.2, 0.6, 1.0), layout=LAYOUT, block_size=(8, 8)))
    kept = {(row.pattern, row.target): row.recall for row in rows}
    names = {row.pattern for row in rows}
    assert names >= {"frame_window", "sliding_tile", "neighborhood", "radial", "mean_pool, top-k", "best blocks"}
    for name in names:
        assert kept[name, 0.2] <= kept[name, 0.6] + 1e-6 <= kept[name, 1.0] + 2e-6
    for row in rows:
        assert 0 < row.worst <= row.recall <= 1
        if "top-k" in row.pattern and "centroid" not in row.pattern:  # which has other blocks
            assert row.recall <= kept["best blocks", row.target] + 1e-5
            assert row.executed == pytest.approx(row.target, abs=0.03)
        if row.target == 1 and row.pattern != "radial":  # whose bands thin out at any decay
            assert row.recall == pytest.approx(1, abs=1e-5)
            assert row.error < 1e-5


def test_figures_are_those_of_the_mask_in_raster_order() -> None:
    """A pattern of the tokens as they come, by the dense matrices; queries are the last frames."""
    layout = VideoLayout(4, 6, 10, tile=(2, 3, 4))
    q, k, v = qkv(120, 240)
    row = next(r for r in calibrate(q, k, v, (0.5,), layout=layout, block_size=(8, 8)) if r.pattern == "frame_window")
    found = []
    for frames in range(5):
        keep = masks.frame_window(layout, frames, block_size=(8, 8), q_frames=[2, 3]).to_dense()[0, 0]
        found.append((abs(float(keep.float().mean()) - 0.5), keep))
    keep = min(found, key=lambda f: f[0])[1]
    recalls = []
    for head in range(2):
        weights = (q[0, :, head] @ k[0, :, head].T / 8**0.5).softmax(-1)
        recalls.append(float((weights * keep).sum(-1).mean()))
    assert row.density == pytest.approx(float(keep.float().mean()))
    assert row.recall == pytest.approx(sum(recalls) / 2, abs=1e-5)
    assert row.worst == pytest.approx(min(recalls), abs=1e-5)


def test_the_command_prints_a_row_a_pattern_and_density(tmp_path: Path) -> None:
    file = tmp_path / "qkv.safetensors"
    save_file(dict(zip("qkv", qkv(96, 96), strict=True)), file)
    options = ["--density", "0.25,0.5", "--block", "8x8"]
    result = CliRunner().invoke(app, ["masks", "calibrate", str(file), "--json", *options])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.output.splitlines()]
    assert len(rows) == 2 * 7
    q, k, _ = qkv(96, 96)
    mask = masks.select(q, k, masks.mean_pool(), masks.top_k(ratio=0.25), block_size=(8, 8))
    row = next(r for r in rows if r["pattern"] == "mean_pool, top-k" and r["target"] == 0.25)
    assert row["recall"] == pytest.approx(float(masks.recall(q, k, mask).mean()))
    result = CliRunner().invoke(app, ["masks", "calibrate", str(file), "--grid", "4x4x6", "--tile", "2x2x2", *options])
    assert result.exit_code == 0, result.output
    assert "sliding_tile" in result.output


def test_refusals(tmp_path: Path) -> None:
    file = tmp_path / "qkv.safetensors"
    save_file(dict(zip("qkv", qkv(96, 96), strict=True)), file)
    other = tmp_path / "other.safetensors"
    save_file({"q": torch.zeros(2, 3)}, other)
    refused = {
        (str(file), "--density", "0"): "density=0.0: accepted is a share of the pairs, in (0, 1]",
        (str(file), "--density", "a"): "density=a: accepted are numbers in (0, 1]",
        (str(file), "--grid", "4x4"): "grid=4x4: accepted are 3 whole numbers",
        (str(file), "--grid", "4x4x5"): "layout has 80 tokens in 4 frames, q has 96 and k 96",
        (str(other),): "has q [2, 3]: accepted are q, k and v, each [batch, tokens, heads, head dim]",
        (str(tmp_path / "none"),): "accepted is a .safetensors file",
    }
    for arguments, message in refused.items():
        result = CliRunner().invoke(app, ["masks", "calibrate", *arguments])
        assert result.exit_code == 2
        assert message in result.output.replace("\n", "")
