"""How a clip holds up over its length, judged against the world it was trained on.

The generated path and the prompt's words say what the world itself would have shown; that picture is the truth.
Errors are taken inside the subject's box, where a missing or wrongly coloured subject costs most, and stand beside
trivial baselines: the true picture without the subject, and with the subject in another colour.
``hhattn evaluate``.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .codec import TIME
from .generate import Pipeline, Request
from .text import SLOTS
from .world import COLORS, scene_picture

MARKS = (1.0, 5.0, 15.0, 30.0, 60.0)
STRIDE = 2  # pictures are compared at half size


@dataclass(frozen=True)
class Figures:
    """One moment of one clip. PSNR in dB; errors in shares of the range (colour) and of a frame height (position)."""

    seconds: float
    box: float
    full: float
    box_no_subject: float
    box_wrong_color: float
    background: float
    color_error: float
    position_error: float
    color_right: bool


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None) -> float:
    """``a, b [3, h, w]``, optional mask ``[h, w]``."""
    error = (a - b).square().mean(0)
    mse = error.mean() if mask is None else (error * mask).sum() / mask.sum()
    return -10 * math.log10(max(float(mse), 1e-10))


def _truths(words: dict[str, str], pose: Tensor, t: float, h: int, w: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The world's picture, the one without a subject, the one in a wrong colour, and the subject's cover."""
    wrong = list(COLORS)[(list(COLORS).index(words["color"]) + 3) % len(COLORS)]
    truth, cover = scene_picture(words, pose, t, h, w)
    other, _ = scene_picture({**words, "color": wrong}, pose, t, h, w)
    away = pose.clone()
    away[1] = -5.0
    empty, _ = scene_picture(words, away, t, h, w)
    return truth, empty, other, cover


def _mean(picture: Tensor, mask: Tensor) -> Tensor:
    """Mean colour ``[3]`` of a picture under a mask."""
    return (picture * mask).sum((1, 2)) / mask.sum()


def _centre(change: Tensor, box: Tensor) -> Tensor:
    """Where a picture differs from the empty scene: the centre (x, y) of ``change [3, h, w]`` inside the box, in
    frame heights."""
    h, w = box.shape
    weight = (change.mean(0) - 0.04).clamp(min=0) * box
    y, x = (torch.arange(h) + 0.5)[:, None] / h, (torch.arange(w) + 0.5)[None] / h
    return torch.stack([(weight * x).sum(), (weight * y).sum()]) / weight.sum().clamp(min=1e-6)


def judge(frame: Tensor, words: dict[str, str], pose: Tensor, t: float) -> Figures:
    """``frame [3, h, w]`` made at time ``t`` with pose ``[4]``."""
    _, h, w = frame.shape
    truth, empty, other, cover = _truths(words, pose, t, h, w)
    y, x = (torch.arange(h) + 0.5)[:, None] / h, (torch.arange(w) + 0.5)[None] / h
    box = (((x - pose[0]).abs() < 0.25) & ((y - pose[1]).abs() < 0.25)).float()
    core = (cover > 0.95).float()
    color = {}
    for name in COLORS:
        color[name] = float(
            (_mean(frame, core) - _mean(scene_picture({**words, "color": name}, pose, t, h, w)[0], core)).abs().mean()
        )
    return Figures(
        seconds=round(t, 2),
        box=psnr(frame, truth, box),
        full=psnr(frame, truth),
        box_no_subject=psnr(empty, truth, box),
        box_wrong_color=psnr(other, truth, box),
        background=psnr(frame, truth, 1 - box),
        color_error=color[words["color"]],
        position_error=float((_centre((frame - empty).abs(), box) - _centre((truth - empty).abs(), box)).norm()),
        color_right=min(color, key=lambda k: color[k]) == words["color"],
    )


@dataclass(frozen=True)
class Steadiness:
    """Of a whole clip, from the decoded frames round the chunks' borders and from its path."""

    seam_ratio: float  # mean frame difference at chunk borders over the mean elsewhere; 1 is seamless
    jitter: float  # rms second difference of the subject's path over the rms first difference, per frame
    motion: float  # rms speed of the subject, frame heights a second: a still clip is steady too


def measure(pipeline: Pipeline, request: Request, marks: tuple[float, ...] = MARKS) -> tuple[list[Figures], Steadiness]:
    """Generate one clip; judge the frame at each mark, and the steadiness round the marks. Only those chunks are
    decoded."""
    words = pipeline.understand(request).words
    figures: list[Figures] = []
    border: list[float] = []
    inside: list[float] = []
    path: list[Tensor] = []
    last: Tensor | None = None
    shown = 0
    left = [m for m in marks if m <= request.seconds]
    whole, lead = TIME * pipeline.dit.config.chunk, TIME - 1  # pictures in a chunk, and how many fewer in the first
    ends = {math.ceil((m * request.fps + lead) / whole) - 1 for m in left}  # the chunks that the marks end in
    for chunk in pipeline.stream(request, wanted=lambda index: index in ends or index + 1 in ends):
        shown += min(whole - lead * (chunk.index == 0), request.frames - shown)
        pose = chunk.poses.flatten(0, 1)
        pose = pose[lead:] if chunk.index == 0 else pose
        path.append(pose[:, :2])
        if not len(chunk.frames):
            last = None
            continue
        frames = torch.nn.functional.avg_pool2d(chunk.frames.permute(0, 3, 1, 2).float() / 255, STRIDE)
        if last is not None:
            border.append(float((frames[0] - last).abs().mean()))
        inside += (frames[1:] - frames[:-1]).abs().mean((1, 2, 3)).tolist()
        last = frames[-1]
        if left and shown / request.fps >= left[0] - 1e-6:
            left.pop(0)
            figures.append(judge(last, words, pose[len(frames) - 1], (shown - 1) / request.fps))
    track_ = torch.cat(path)
    speed, bend = torch.diff(track_, dim=0), torch.diff(track_, n=2, dim=0)
    seam = (sum(border) / len(border)) / (sum(inside) / len(inside)) if border else 1.0
    return figures, Steadiness(seam, _rms(bend) / max(_rms(speed), 1e-9), _rms(speed) * request.fps)


def _rms(v: Tensor) -> float:
    return float(v.square().sum(-1).mean().sqrt())


def prompts(count: int, seed: int = 0) -> list[str]:
    """Prompts that between them use every subject, scene and motion before repeating one."""
    rng = random.Random(seed)
    columns = {
        slot: [w for _ in range(count) for w in rng.sample(options, len(options))][:count]
        for slot, options in SLOTS.items()
    }
    return [" ".join(columns[slot][i] for slot in SLOTS) for i in range(count)]


def plot(clips: list[dict[str, Any]], path: Path) -> None:
    """The subject's box against time, a line a clip, between what the trivial baselines reach."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for clip in clips:
        axes.plot([f["seconds"] for f in clip["at"]], [f["box"] for f in clip["at"]], marker="o", label=clip["prompt"])
    for name, label in (("box_wrong_color", "wrong colour"), ("box_no_subject", "no subject")):
        mean = sum(f[name] for c in clips for f in c["at"]) / sum(len(c["at"]) for c in clips)
        axes.axhline(mean, linestyle="--", color="grey")
        axes.text(0, mean + 0.1, label, color="grey")
    axes.set(xlabel="seconds into the clip", ylabel="PSNR inside the subject's box, dB")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150, format="png")
    plt.close(figure)
