"""``hhattn generate``: a playable clip, one JSON object, and one clear line with exit code 2 for what can't be done."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner
from video_models import TINY, write_untrained

from hhattn.cli import app
from hhattn.video import cli, weights
from hhattn.video.generate import Chunk, Pipeline
from hhattn.video.presets import SIZES
from hhattn.video.text import SLOTS


def call(*args: str, command: str = "generate") -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [command, *args])
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="session")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    write_untrained(folder)
    return folder


@pytest.fixture
def tiny(untrained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A size of 48x96 and weights that were never trained: everything runs, in a fraction of the time."""
    monkeypatch.setitem(SIZES, "tiny", TINY)
    monkeypatch.setattr(weights, "FOLDER", untrained)


def watch(path: Path) -> tuple[av.VideoStream, np.ndarray]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return stream, np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])


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
    stream, pictures = watch(out)
    assert stream.codec_context.name == "h264"
    assert stream.average_rate == 16
    assert pictures.shape == (8, 180, 320, 3)
    assert pictures[0].std() > 5


@pytest.mark.usefixtures("tiny")
def test_the_report(tmp_path: Path) -> None:
    """One JSON object on the last line of stdout, which says what the file says."""
    out = tmp_path / "clip.mp4"
    args = ("red kite", "--seconds", "1.5", "--size", "tiny", "--fps", "24", "--seed", "7", "-o", str(out))
    code, stdout, stderr = call(*args, "--json")
    assert code == 0
    report = json.loads(stdout.splitlines()[-1])
    stream, pictures = watch(out)
    assert pictures.shape == (report["frames"], report["height"], report["width"], 3) == (36, 48, 96, 3)
    assert report["fps"] == stream.average_rate == 24
    assert (report["seed"], report["output"], report["model"]) == (7, str(out), "hhattn-dit-3m")
    assert set(report["stages"]) == {"motion", "denoise", "decode", "encode"}
    assert 0 < sum(report["stages"].values()) <= report["seconds_wall"] + 0.05
    assert {slot: report["prompt"][slot] in words for slot, words in SLOTS.items()} == dict.fromkeys(SLOTS, True)
    assert "left open, chosen by the seed: motion, scene, camera" in " ".join(stderr.split())
    code, stdout, _ = call(*args)
    assert code == 0
    assert stdout == "", "without --json stdout stays empty"


@pytest.mark.usefixtures("tiny")
def test_a_seed_is_a_clip(tmp_path: Path) -> None:
    films = []
    for i, seed in enumerate("445"):
        out = tmp_path / f"{i}.mp4"
        assert (
            call("red ball looping city", "--seconds", "0.5", "--size", "tiny", "--seed", seed, "-o", str(out))[0] == 0
        )
        films.append(watch(out)[1])
    assert np.array_equal(films[0], films[1])
    assert not np.array_equal(films[0], films[2])


@pytest.mark.usefixtures("tiny")
def test_a_picture_begins_the_clip(tmp_path: Path) -> None:
    """The words may be left out then, and the first frame is nearer to the picture than any without it."""
    ramp = np.linspace(0, 255, 96).astype(np.uint8)
    picture = np.stack(
        [np.broadcast_to(ramp, (48, 96)), np.full((48, 96), 90, np.uint8), 255 - ramp[None].repeat(48, 0)], 2
    )
    Image.fromarray(picture).save(tmp_path / "first.png")
    args = ("--seconds", "0.2", "--size", "tiny", "-o", str(tmp_path / "x.mp4"))
    code, _, _ = call("--image", str(tmp_path / "first.png"), *args)
    assert code == 0
    begun = watch(tmp_path / "x.mp4")[1]
    assert call("red ball", *args)[0] == 0
    other = watch(tmp_path / "x.mp4")[1]
    assert len(begun) == 3
    apart = [np.abs(f[0].astype(float) - picture).mean() for f in (begun, other)]
    assert apart[0] < 0.5 * apart[1]


def test_words_lists_the_vocabulary() -> None:
    code, stdout, _ = call(command="words")
    assert code == 0
    for line, (slot, options) in zip(stdout.splitlines(), SLOTS.items(), strict=True):
        name, *listed = re.sub(r" \(.*?\)", "", line).replace(",", "").split()
        assert (name, *listed) == (slot, *options)
    assert "pink (rose)" in stdout


def test_terminated_it_leaves_no_file(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the midst of writing, as `timeout` does it."""

    write = cli.VideoWriter.write

    def terminate(writer: cli.VideoWriter, frames: Tensor) -> None:
        write(writer, frames)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(cli.VideoWriter, "write", terminate)
    before = signal.getsignal(signal.SIGTERM)
    code, _, _ = call("red ball", "--seconds", "0.2", "--size", "tiny", "-o", str(tmp_path / "x.mp4"))
    assert code == 143
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before


def test_without_a_terminal_it_says_how_far_it_is(tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "QUIET", 0.0)
    code, _, stderr = call("red ball", "--seconds", "1", "--size", "tiny", "-o", str(tmp_path / "x.mp4"))
    assert code == 0
    assert re.search(r"13/16 frames in \d+ s, \d+ s to go", stderr)


def refusal(monkeypatch: pytest.MonkeyPatch, *args: str, command: str = "generate") -> str:
    """The one line on stderr of a call that ends with exit code 2 before the weights are loaded."""
    monkeypatch.setattr(cli, "Pipeline", lambda *_: pytest.fail("the weights were loaded"))
    code, stdout, stderr = call(*args, command=command)
    assert code == 2
    assert stdout == ""
    (line,) = stderr.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--seconds", "-1"], "seconds"),
        (["--seconds", "1e308"], "seconds"),
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
        ([""], "names nothing"),
        (["--seed", "-1"], "seed"),
        (["--seed", str(10**20)], "seed"),
        (["--seconds", "nan"], "seconds"),
        (["--image", "missing.png"], "missing.png"),
    ],
)
def test_bad_input_ends_with_one_line_before_any_work(
    args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert words in refusal(monkeypatch, *args, "-o", str(tmp_path / "new" / "x.mp4"))
    assert not list(tmp_path.iterdir()), "not even a folder is left"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--steps", "0"], "steps=0; accepted: 1 to 100"),
        (["--seconds", "0.5"], "seconds=0.5; accepted: 1 or more"),
        (["--seconds", "nan"], "seconds=nan; accepted: 1 or more"),
        (["--seconds", "1e6"], "seconds=1000000.0; accepted"),
        (["--prompts", "0"], "prompts=0; accepted: 1 or more"),
        (["--plot", "{new}/x.png"], "--plot needs matplotlib"),
    ],
)
def test_bad_input_of_an_evaluation(
    args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    new = tmp_path / "new"
    told = refusal(monkeypatch, *(a.format(new=new) for a in args), "--out", str(new / "x.json"), command="evaluate")
    assert words in told
    assert not list(tmp_path.iterdir()), "not even a folder is left"


def test_an_evaluation_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is a folder" in refusal(monkeypatch, "--out", str(tmp_path), command="evaluate")
    monkeypatch.setitem(sys.modules, "matplotlib", SimpleNamespace(__spec__=True))
    args = ("--out", str(tmp_path / "x.json"), "--plot", str(tmp_path))
    assert "is a folder" in refusal(monkeypatch, *args, command="evaluate")


def test_an_evaluation_of_missing_weights(tmp_path: Path) -> None:
    args = ("--weights", str(tmp_path / "none"), "--out", str(tmp_path / "x.json"))
    code, _, stderr = call(*args, command="evaluate")
    assert code == 2
    assert "codec.safetensors not found" in stderr
    assert len(stderr.strip().splitlines()) == 1


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    for place, reason in (("file/x.mp4", "can't be made"), ("", "is a folder"), ("x" * 400 + ".mp4", "too long")):
        assert reason in refusal(monkeypatch, "red ball", "-o", str(tmp_path / place))
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_unreadable_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.png").write_text("not a picture")
    for picture in ("x.png", "."):
        line = refusal(
            monkeypatch, "red ball", "--image", str(tmp_path / picture), "-o", str(tmp_path / "new" / "x.mp4")
        )
        assert "not a readable picture" in line
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_missing_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    code, _, stderr = call("red ball", "-o", str(tmp_path / "x.mp4"))
    assert code == 2
    assert "codec.safetensors not found" in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(("error", "told"), [(RuntimeError("lost power"), False), (OSError("no space left"), True)])
def test_a_run_that_fails_keeps_the_old_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, told: bool
) -> None:
    out = tmp_path / "clip.mp4"
    out.write_bytes(b"the old one")
    whole = Pipeline.stream

    def breaks(self: Pipeline, *args: object) -> Iterator[Chunk]:
        yield next(whole(self, *args))
        assert len(list(tmp_path.glob("clip.mp4.*.part"))) == 1, "the first chunk is being written"
        raise error

    monkeypatch.setattr(Pipeline, "stream", breaks)
    code, stdout, stderr = call("red ball", "--seconds", "3", "--size", "tiny", "-o", str(out), "--json")
    assert code == 1
    assert stdout == "", "no report of a clip that isn't there"
    assert ("no space left" in stderr) == told
    assert out.read_bytes() == b"the old one"
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_clip(tmp_path: Path) -> None:
    """Whole processes, pixels and encoder included: five times the clip, the same peak."""
    peaks = []
    for seconds in ("2", "10"):
        args = [
            "generate",
            "red ball",
            "--seconds",
            seconds,
            "--size",
            "180x320",
            "-o",
            str(tmp_path / "x.mp4"),
            "--json",
        ]
        done = subprocess.run([sys.executable, "-m", "hhattn.cli", *args], capture_output=True, text=True, check=True)
        peaks.append(json.loads(done.stdout.splitlines()[-1])["peak_rss_mb"])
    assert peaks[1] < 1.03 * peaks[0] + 10
