"""A long clip from a SANA-Video pipeline's folder as an MP4: a part for each chunk, and at the end all in one file.

Beside the output lies ``NAME.parts`` while it is made: the parts, and what the model remembers after the last of them.
A run that was stopped goes on from there when the same is asked for again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .io import VideoWriter, read_picture


@dataclass(frozen=True)
class Clip:
    """What ``hhattn generate --model`` was asked for. ``size`` is height x width of the pictures written; the model's
    are the next larger ones that it takes, cropped."""

    model: Path
    prompts: dict[int, str]
    seconds: float
    size: tuple[int, int]
    fps: float
    seed: int
    steps: int | None
    guidance: float
    chunk: int
    image: Path | None

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 86_400:
            raise ValueError(f"seconds={self.seconds}; accepted: a number above 0, up to 86400 (a day)")
        if not 1 <= self.fps <= 240:
            raise ValueError(f"fps={self.fps}; accepted: 1 to 240")

    def told(self) -> str:
        """All of it as text, the picture by what is in it, to know a half-made clip again."""
        rows: dict[str, Any] = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self).items()}
        if self.image is not None:
            rows["image"] = hashlib.sha256(self.image.read_bytes()).hexdigest()
        return json.dumps(rows, sort_keys=True)


def parse_size(size: str) -> tuple[int, int]:
    """``"HEIGHTxWIDTH"`` -> (height, width). ValueError for anything else, odd sizes among it: H.264 takes none."""
    try:
        height, width = (int(n) for n in size.split("x"))
    except ValueError:
        raise ValueError(f"size={size!r}; accepted: HEIGHTxWIDTH, as 720x1280") from None
    if min(height, width) < 2 or height % 2 or width % 2:
        raise ValueError(f"size={size!r}; accepted: even numbers of 2 or more")
    return height, width


def parse_switches(prompt: str, switches: list[str]) -> dict[int, str]:
    """The prompts by chunk: ``prompt`` at 0 and each ``"CHUNK:PROMPT"`` from its chunk on."""
    prompts = {0: prompt}
    for switch in switches:
        at, colon, words = switch.partition(":")
        if not colon or not at.strip().isdigit() or not int(at) or not words.strip():
            raise ValueError(f"then={switch!r}; accepted: CHUNK:PROMPT, as '4:a boat at night'")
        prompts[int(at)] = words.strip()
    return prompts


class Job:
    """One clip in the making. Raises ValueError for what the model doesn't take, or another clip's parts in the way."""

    def __init__(self, clip: Clip, output: Path) -> None:
        from hhattn.integrations.diffusers.long_sana import FEW_STEPS, LongRequest, LongSana

        if not (clip.model / "model_index.json").is_file():
            raise ValueError(
                f"model {clip.model}: accepted is a folder of a SANA-Video pipeline (no model_index.json there)"
            )
        self.clip, self.output, self.parts = clip, output, output.with_name(f"{output.name}.parts")
        told = self.parts / "clip.json"
        if self.parts.exists() and not told.exists() and (not self.parts.is_dir() or any(self.parts.iterdir())):
            raise ValueError(
                f"output {output}: {self.parts} is in the way, and not of a clip; move it or write elsewhere"
            )
        if told.exists() and told.read_text() != clip.told():
            raise ValueError(
                f"output {output}: {self.parts} holds parts of another clip; remove it or give another name"
            )
        self.sana = LongSana.from_pretrained(clip.model)
        patch = self.sana.pipeline.transformer.config.patch_size[1]
        unit = int(self.sana.pipeline.vae_scale_factor_spatial) * patch
        height, width = (-(-n // unit) * unit for n in clip.size)
        count = -(-max(1, round(clip.seconds * clip.fps)) // int(self.sana.pipeline.vae_scale_factor_temporal))
        last = count // clip.chunk
        if max(clip.prompts) > last:
            accepted = f"chunks of the clip, 1 ... {last}" if last else "none, since the clip is one chunk"
            raise ValueError(f"then={max(clip.prompts)}:...; accepted: {accepted}")
        image = None if clip.image is None else read_picture(clip.image, height, width) * 2 - 1
        self.request = LongRequest(
            clip.prompts,
            frames=max(1, round(clip.seconds * clip.fps)),
            height=height,
            width=width,
            chunk=clip.chunk,
            steps=FEW_STEPS if clip.steps is None else clip.steps,
            guidance=clip.guidance,
            seed=clip.seed,
            image=image,
        )
        self.state = self._found()
        self.sana.stream(self.request, self.state)  # checks everything

    @property
    def done(self) -> int:
        """Pictures that an earlier run made."""
        return 0 if self.state is None else int(self.state["at"]["done"])

    def run(self, console: Console) -> dict[str, Any]:
        """Make the rest, join the parts and return figures."""
        start, before = time.perf_counter(), self.done
        self.parts.mkdir(exist_ok=True)
        _write(self.parts / "clip.json", self.clip.told().encode())
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} frames"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task("generating", total=self.request.frames, completed=before)
            for chunk in self.sana.stream(self.request, self.state):
                with VideoWriter(self._part(chunk.index), *self.clip.size, self.clip.fps, b_frames=False) as writer:
                    writer.write(_cropped(chunk.frames, self.clip.size))
                self._save()
                progress.update(task, advance=len(chunk.frames))
        count = -(-self.sana.latent_frames(self.request) // self.clip.chunk)
        join([self._part(i) for i in range(count)], self.output)
        for path in (
            *(self._part(i) for i in range(count)),
            *(self.parts / name for name in ("clip.json", "state.pt")),
        ):
            path.unlink(missing_ok=True)
        with suppress(OSError):  # somebody put something of theirs there
            self.parts.rmdir()
        return {
            "frames": self.request.frames,
            "resumed_at": before,
            "seconds_wall": round(time.perf_counter() - start, 2),
            "memory_of_the_past_mb": round(self.sana.nbytes / 2**20, 2),
        }

    def _save(self) -> None:
        state = self.parts / "state.pt.new"
        try:
            torch.save(self.sana.state(), state)
            os.replace(state, self.parts / "state.pt")
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"{state} can't be written ({error})") from error
        finally:
            state.unlink(missing_ok=True)

    def _part(self, index: int) -> Path:
        return self.parts / f"{index:05}.mp4"

    def _found(self) -> dict[str, Any] | None:
        state = self.parts / "state.pt"
        return torch.load(state, weights_only=True) if state.exists() else None


def _cropped(frames: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The middle ``size`` of pictures [n, H, W, 3]."""
    top, left = ((have - want) // 2 for have, want in zip(frames.shape[1:3], size, strict=True))
    return frames[:, top : top + size[0], left : left + size[1]]


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f"{path.name}.new")
    part.write_bytes(data)
    os.replace(part, path)


def join(parts: list[Path], output: Path) -> None:
    """One MP4 of several with the same settings, without encoding again; it gets its name only when it is whole."""
    part = output.with_name(f"{output.name}.joined.part")
    try:
        with av.open(str(part), "w", format="mp4", options={"movflags": "faststart"}) as whole:
            stream, past = None, Fraction(0)
            for path in parts:
                with av.open(str(path)) as one:
                    source = one.streams.video[0]
                    stream = stream or whole.add_stream_from_template(source)
                    for packet in one.demux(source):
                        if packet.dts is None:  # the end
                            continue
                        shift = int(past / packet.time_base)
                        packet.dts, packet.pts = packet.dts + shift, packet.pts + shift
                        packet.stream = stream
                        whole.mux(packet)
                    past += Fraction(source.frames) / source.average_rate
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
