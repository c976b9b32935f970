"""``hhattn masks``: figures of a pattern, its picture, and what it refuses."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hhattn import VideoLayout, masks
from hhattn.cli import app
from hhattn.masks import _draw

DOCS = (Path(__file__).parents[1] / "docs" / "masks.md").read_text()


def run(*args: str) -> str:
    result = CliRunner().invoke(app, ["masks", *args])
    assert result.exit_code == 0, result.output
    return result.output


def test_list_names_every_pattern_and_its_options() -> None:
    lines = run("list").splitlines()
    builders = set(masks.__all__) - {"BlockMask", "QLists"}
    assert {line.split()[0] for line in lines} >= builders & {"radial", "neighborhood", "sliding_tile", "text", "dense"}
    assert next(line for line in lines if line.startswith("neighborhood")).endswith(
        "kernel_size, stride=1, dilation=1, causal=False"
    )


def test_show_reports_the_mask_that_python_builds() -> None:
    args = ["--grid", "4x5x6", "--tile", "2x2x3", "--text", "3", "--block", "8x16", "--order", "tile"]
    args += [
        "--option",
        "kernel_size=3,3,1;1,5,5",
        "--option",
        "causal=true,false,false",
        "--option",
        "radial.decay=0.5",
    ]
    report = json.loads(run("show", "neighborhood & radial | sink | text", *args, "--json", "--head-dim", "64"))
    layout = VideoLayout(4, 5, 6, tile=(2, 2, 3), text_len=3)
    common = {"block_size": (8, 16), "order": "tile"}
    near = masks.neighborhood(layout, [(3, 3, 1), (1, 5, 5)], causal=(True, False, False), **common)
    mask = near & masks.radial(layout, 0.5, **common) | masks.sink(layout, **common) | masks.text(layout, **common)
    assert report["density"] == mask.density
    assert report["block_density"] == mask.block_density
    assert report["heads"] == 2
    assert report["flops"] == mask.flops(64, heads=2)
    assert report["flops_executed"] == mask.flops(64, heads=2, executed=True)
    assert report["flops_dense"] == 2 * 123 * 123 * 4 * 64
    assert report["predicted_speedup"] == report["flops_dense"] / report["flops_executed"]
    assert report["bytes"] == mask.nbytes
    assert 0 < report["build_seconds"] < 60


def test_an_option_may_be_a_list_of_one() -> None:
    one = json.loads(run("show", "text", "--grid", "2x3x4", "--text", "5", "--option", "text_lens=2,", "--json"))
    two = json.loads(run("show", "text", "--grid", "2x3x4", "--text", "5", "--option", "text_lens=2,5", "--json"))
    assert (one["batch"], two["batch"]) == (1, 2)
    assert one["density"] == pytest.approx((26**2 - 24**2) / 29**2)


def test_show_prints_a_table_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "mask.png"
    text = run("show", "radial", "--grid", "20x4x5", "--option", "min_width=2", "-o", str(picture))
    assert "density" in text
    assert "not measured" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    ours = tmp_path / "query.png"
    run("show", "spatial", "--grid", "2x4x5", "--order", "tile", "--text", "3", "--query", "1,3,4", "-o", str(ours))
    assert ours.stat().st_size > 5_000


@pytest.mark.parametrize("order", ["raster", "tile"])
def test_keys_that_are_drawn_are_the_query_s(order: str) -> None:
    layout = VideoLayout(3, 4, 5, tile=(2, 2, 2), text_len=3)
    common = {"block_size": (16, 8), "order": order}
    mask = masks.neighborhood(layout, [(3, 3, 3), (1, 3, 5)], **common) | masks.text(layout, **common)
    dense = mask.to_dense()
    for head, query in ((h, q) for h in range(2) for q in range(layout.seq_len)):
        assert torch.equal(_draw.keys_of(mask, query, head=head), dense[0, head, query])
    far = _draw._chosen_frames(torch.ones(40, 2, 2, dtype=torch.bool), 39)  # ever fewer, the last one included
    assert (len(far), far[0], far[-3:]) == (12, 0, [36, 38, 39])
    assert _draw._chosen_frames(torch.ones(13, 2, 2, dtype=torch.bool), 0) == [*range(11), 12]
    assert _draw._chosen_frames(torch.zeros(40, 2, 2, dtype=torch.bool), 7) == [7]


@pytest.mark.parametrize("number", range(5))
def test_the_page_s_code_runs(number: int) -> None:
    blocks = re.findall(r"```python\n(.*?)```", DOCS, re.S)
    assert len(blocks) == 5
    exec(compile(blocks[number], f"docs/masks.md, block {number}", "exec"), {"__name__": "masks"})


def test_the_page_s_pictures_are_there_and_their_commands_work() -> None:
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)\n\n`hhattn masks (show [^`]+) -o docs/([^`]+)`", DOCS)
    assert len(pictures) == DOCS.count("![") - DOCS.count("](recall.png)")  # which benchmarks/recall.py makes
    assert (Path(__file__).parents[1] / "docs" / "recall.png").exists()
    for picture, command, output in pictures:
        assert picture == output
        assert (Path(__file__).parents[1] / "docs" / picture).exists()
        assert json.loads(run(*shlex.split(command), "--json"))["density"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["ring"], "pattern='ring': accepted are"),
        (["neighborhood"], "needs --option kernel_size"),
        (["spatial", "--option", "decay=1"], "option=decay: spatial has no such option"),
        (["spatial", "--option", "decay"], "accepted is name=value"),
        (["radial", "--option", "decay=wide"], "accepted are numbers"),
        (["radial", "--grid", "8x23"], "grid=8x23: accepted are 3 whole numbers"),
        (["radial", "--order", "rows"], "accepted are"),
        (["radial", "--grid", "2x2x2", "--query", "2,0,0", "-o", "x.png"], "query=2,0,0: accepted are"),
        (["radial", "--grid", "2x2x2", "--head", "1", "-o", "x.png"], "head=1: accepted are 0 ... 0"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else None,
)
def test_refusals(args: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["masks", "show", *args])
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.iterdir())
