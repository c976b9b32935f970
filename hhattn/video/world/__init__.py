"""A procedural, closed-form world: words + seed -> video with ground truth, at any size, frame rate or crop.

It is the bundled model's training set and its test oracle; nothing of it is used when generating.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ..text import SLOTS
from . import subjects
from .motion import CAMERA_PERIOD, Path
from .scenes import DEPTHS, SCENES, STRIP
from .subjects import COLORS, RADIUS, REACH


@dataclass(frozen=True)
class Clip:
    """What is shown (a word for each slot) and how it moves."""

    words: dict[str, str]
    path: Path

    @staticmethod
    def draw(rng: random.Random, **words: str) -> Clip:
        """A random clip; words given by slot are kept."""
        full = {slot: words.get(slot) or rng.choice(options) for slot, options in SLOTS.items()}
        return Clip(full, Path.draw(rng, full["motion"], full["camera"]))

    def caption(self) -> str:
        w = self.words
        place = {"meadow": "a meadow", "sunset": "hills at sunset", "night": "hills at night", "ocean": "the ocean"}
        where = place.get(w["scene"], {"city": "a city", "space": "space"}.get(w["scene"], w["scene"]))
        article = "an" if w["color"][0] in "aeiou" else "a"
        return f"{article} {w['color']} {w['subject']} {w['motion']} over {where}, {w['camera']} camera"


def paint(clips: list[Clip], poses: Tensor, t: Tensor, x: Tensor, y: Tensor, px: float) -> tuple[Tensor, Tensor]:
    """Draw N pictures of one scene and one subject.

    ``poses [N,4]`` (x, y, angle, camera), ``t [N]`` seconds, pixel centres ``x [N,w]``, ``y [N,h]`` in frame heights,
    pixel size ``px`` -> pictures ``[N,3,h,w]`` and the subject's cover ``[N,h,w]``.
    """
    words = clips[0].words
    x, y = x[:, None, :], y[:, :, None]
    still = (
        len(t) > 1
        and words["scene"] != "ocean"
        and bool((poses[:, 3] == poses[0, 3]).all() & (x == x[:1]).all() & (y == y[:1]).all())
    )
    n = 1 if still else len(t)  # a background that doesn't change is drawn once
    us = [x[:n] + k * poses[:n, 3].view(-1, 1, 1) for k in DEPTHS]
    picture = SCENES[words["scene"]](x[:n], y[:n], us, t[:n].view(-1, 1, 1), px).expand(len(t), -1, -1, -1)
    color = torch.tensor([COLORS[c.words["color"]] for c in clips])
    return subjects.paint(words["subject"], color, picture, x, y, poses[:, :3], t, px)


def render(
    clip: Clip, t: Tensor, height: int = 720, width: int = 1280, *, margin: int = 0, stride: int = 1
) -> tuple[Tensor, Tensor]:
    """Render a clip's frames at times ``t [T]`` (seconds) -> ``[T,3,h,w]`` in [0,1] and the subject's cover
    ``[T,h,w]``.

    ``margin`` adds that many rows above and below (720 + 2·8 = 736 is what the model generates); ``stride`` renders
    every stride-th pixel's centre with a pixel of that size, i.e. an anti-aliased picture of ``1/stride`` the size.
    """
    px = stride / height
    y = ((torch.arange((height + 2 * margin) // stride) + 0.5) * stride - margin) / height
    x = (torch.arange(width // stride) + 0.5) * stride / height
    poses = clip.path(t, width / height)
    n = len(t)
    return paint([clip] * n, poses, t, x.expand(n, -1), y.expand(n, -1), px)


def scene_picture(words: dict[str, str], pose: Tensor, t: float, height: int, width: int) -> tuple[Tensor, Tensor]:
    """One picture ``[3, h, w]`` of the world for a given pose ``[4]`` at ``t`` seconds, and the subject's cover
    ``[h, w]``: the truth that a generated frame is compared with."""
    clip = Clip(words, Path.draw(random.Random(0), words["motion"], words["camera"]))
    y, x = ((torch.arange(n) + 0.5)[None] / height for n in (height, width))
    picture, cover = paint([clip], pose[None], torch.tensor([t]), x, y, 1 / height)
    return picture[0], cover[0]


__all__ = [
    "CAMERA_PERIOD",
    "COLORS",
    "DEPTHS",
    "RADIUS",
    "REACH",
    "SLOTS",
    "STRIP",
    "Clip",
    "Path",
    "paint",
    "render",
    "scene_picture",
]
