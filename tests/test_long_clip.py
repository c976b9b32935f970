"""``hhattn generate --model``: an MP4 from a SANA-Video pipeline's folder, stopped and gone on with."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("av")

import av
import sana_pipeline

from hhattn.video import long_clip
from hhattn.video.long_clip import Clip, Job, parse_size, parse_switches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sana_pipeline.save(tmp_path_factory.mktemp("sana"))


def clip(folder: Path, seed: int = 0) -> Clip:
    return Clip(folder, {0: "a red balloon", 2: "a boat"}, 2.5, (30, 60), 16, seed, None, 1.0, 4, None)


def pictures(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    times = [frame.pts * frame.time_base for frame in frames]
    assert times == [i / 16 for i in range(len(frames))], "no picture twice, none left out"
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def test_a_stopped_clip_goes_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, list[Tensor]] = {}

    class Seen(long_clip.VideoWriter):
        """What is written, before the encoder, which now and then makes other bits of the same pictures."""

        def write(self, frames: Tensor) -> None:
            written.setdefault(self.path.parent.name, []).append(frames)
            super().write(frames)

    monkeypatch.setattr(long_clip, "VideoWriter", Seen)
    console = Console(quiet=True)
    whole = tmp_path / "whole.mp4"
    report = Job(clip(folder), whole).run(console)
    assert report["frames"] == 40
    assert pictures(whole).shape == (40, 30, 60, 3)

    class Full(Seen):
        def write(self, frames: Tensor) -> None:
            if self.path.name == "00002.mp4":
                raise OSError("no space left on device")
            super().write(frames)

    stopped = tmp_path / "stopped.mp4"
    with monkeypatch.context() as patch:
        patch.setattr(long_clip, "VideoWriter", Full)
        with pytest.raises(OSError, match="no space left"):
            Job(clip(folder), stopped).run(console)
    assert not stopped.exists()
    with pytest.raises(ValueError, match=r"stopped\.mp4\.parts holds parts of another clip; remove it"):
        Job(clip(folder, seed=1), stopped)
    job = Job(clip(folder), stopped)
    assert job.done == 29
    assert job.run(console)["resumed_at"] == 29
    assert pictures(stopped).shape == (40, 30, 60, 3)
    assert torch.equal(torch.cat(written["stopped.mp4.parts"]), torch.cat(written["whole.mp4.parts"]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stopped.mp4", "whole.mp4"]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hhattn.cli", "generate", *args]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_chunks_of_one_frame_are_joined_in_time(folder: Path, tmp_path: Path) -> None:
    asked = Clip(folder, {0: "a boat"}, 1, (30, 60), 24, 0, None, 1.0, 1, None)
    Job(asked, tmp_path / "one.mp4").run(Console(quiet=True))
    with av.open(str(tmp_path / "one.mp4")) as container:
        times = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
    assert times == pytest.approx([i / 24 for i in range(24)], abs=1e-3)


def test_a_folder_of_somebody_else_is_left_alone(folder: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "out.mp4.parts"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out\.mp4\.parts is in the way, and not of a clip"):
        Job(clip(folder), tmp_path / "out.mp4")
    assert (theirs / "thesis.txt").read_text() == "mine"


def test_what_cannot_be_made_is_refused(folder: Path, tmp_path: Path) -> None:
    assert parse_size("720x1280") == (720, 1280)
    for size in ("720", "720x", "x", "31x60", "0x2"):
        with pytest.raises(ValueError, match=f"size='{size}'; accepted"):
            parse_size(size)
    assert parse_switches("a", ["3: b:c "]) == {0: "a", 3: "b:c"}
    for switch in ("b", "x:b", "3:", "0:b"):
        with pytest.raises(ValueError, match="then="):
            parse_switches("a", [switch])
    with pytest.raises(ValueError, match=r"no model_index\.json there"):
        Job(clip(tmp_path), tmp_path / "out.mp4")
    done = run("--model", str(folder))
    assert done.returncode == 2
    assert "prompt is empty" in done.stderr


@pytest.mark.slow
def test_memory_is_that_of_ten_seconds_at_a_minute(folder: Path, tmp_path: Path) -> None:
    """Peak memory of whole processes, the loading of the libraries included; three runs each, since it scatters."""
    peaks: dict[int, list[float]] = {10: [], 60: []}
    for _ in range(3):
        for seconds, seen in peaks.items():
            output = str(tmp_path / f"{seconds}.mp4")
            settings = ("--seconds", str(seconds), "--size", "32x64", "--chunk", "4", "-o", output, "--json")
            done = run("a red balloon", "--model", str(folder), *settings)
            assert done.returncode == 0, done.stderr
            seen.append(json.loads(done.stdout.splitlines()[-1])["peak_rss_mb"])
    ten, sixty = (float(np.median(seen)) for seen in peaks.values())
    print(f"peak memory: {ten:.0f} MB for 10 s, {sixty:.0f} MB for 60 s")
    assert abs(sixty / ten - 1) < 0.05
