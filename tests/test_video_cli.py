"""``hhattn generate``: a playable clip, one JSON object, and one clear line with exit code 2 for what can't be done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import av
import pytest
import typer
from typer.testing import CliRunner

from hhattn.video import cli
from hhattn.video.generate import Chunk, Pipeline

APP = typer.Typer()
APP.command()(cli.generate)


def call(*args: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(APP, list(args))
    return result.exit_code, result.stdout, result.stderr


def test_a_short_clip(tmp_path: Path) -> None:
    out = tmp_path / "new folder" / "clip.mp4"
    code, stdout, _ = call("blue kite city", "--seconds", "0.5", "--size", "180x320", "-o", str(out), "--json")
    assert code == 0
    report = json.loads(stdout.splitlines()[-1])
    assert {k: report[k] for k in ("frames", "fps", "width", "height", "seed")} == {
        "frames": 8,
        "fps": 16.0,
        "width": 320,
        "height": 180,
        "seed": 0,
    }
    assert report["seconds_wall"] > 0
    assert report["peak_rss_mb"] > 50
    assert {"denoise", "decode", "encode"} <= set(report["stages"])
    assert report["prompt"]["subject"] == "kite"
    assert set(report["chosen_by_seed"]) == {"motion", "camera"}
    with av.open(str(out)) as container:
        stream = container.streams.video[0]
        pictures = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]
    assert stream.codec_context.name == "h264"
    assert len(pictures) == 8
    assert pictures[0].shape == (180, 320, 3)
    assert pictures[0].std() > 5


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--seconds", "-1"], "seconds"),
        (["--size", "1x1"], "720x1280"),
        (["--fps", "500"], "fps"),
        (["--steps", "0"], "steps"),
        (["--guidance", "-3"], "guidance"),
        (["--noise", "2"], "noise"),
        (["--temperature", "-1"], "temperature"),
        (["--top-p", "0"], "top_p"),
        (["--top-k", "-1"], "top_k"),
        (["a red bloon"], "balloon"),
        (["a red blue ball"], "color"),
        (["--image", "missing.png"], "missing.png"),
    ],
)
def test_bad_input_ends_with_one_line_before_any_work(
    args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "Pipeline", lambda: pytest.fail("the weights were loaded"))
    code, stdout, stderr = call(*args, "-o", str(tmp_path / "x.mp4"))
    assert code == 2
    assert stdout == ""
    assert len(stderr.strip().splitlines()) == 1
    assert words in stderr
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code, _, stderr = call("red ball", "-o", str(tmp_path / "file" / "x.mp4"))
    assert code == 2
    assert "output" in stderr
    code, _, stderr = call("red ball", "-o", str(tmp_path))
    assert code == 2
    assert "is a folder" in stderr


def test_an_unreadable_picture(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("not a picture")
    code, _, stderr = call("red ball", "--image", str(tmp_path / "x.png"), "-o", str(tmp_path / "x.mp4"))
    assert code == 2
    assert "not a readable picture" in stderr


def test_a_run_that_fails_keeps_the_old_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "clip.mp4"
    out.write_bytes(b"the old one")
    whole = Pipeline.stream

    def breaks(self: Pipeline, *args: object) -> Iterator[Chunk]:
        yield next(whole(self, *args))
        raise RuntimeError("lost power")

    monkeypatch.setattr(Pipeline, "stream", breaks)
    code, _, _ = call("red ball", "--seconds", "3", "--size", "180x320", "-o", str(out))
    assert code != 0
    assert out.read_bytes() == b"the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
