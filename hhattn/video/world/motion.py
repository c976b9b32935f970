"""Where the subject and the camera are at any time: closed-form, smooth, stationary paths.

Lengths are in frame heights, x from the left edge, y downwards; angles in radians; times in seconds.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

PAN_SPEED = 0.06  # frame heights a second that the nearest layer moves
CAMERA_PERIOD = (
    9.6  # the panorama repeats after this much camera travel; every layer's own period divides its share of it
)

# motion -> (period in s, x and y amplitude, x and y harmonic, y phase in turns, tilt's amplitude and harmonic)
CURVES = {
    "floating": (5.0, 0.03, 0.15, 1, 1, 0.25, 0.05, 1),
    "gliding": (12.0, 0.48, 0.03, 1, 2, 0.0, 0.14, 1),
    "circling": (9.0, 0.36, 0.16, 1, 1, 0.25, 0.10, 1),
    "looping": (12.0, 0.46, 0.14, 1, 2, 0.0, 0.12, 1),
    "swaying": (5.0, 0.15, 0.02, 1, 2, 0.25, 0.30, 1),
}


@dataclass(frozen=True)
class Path:
    """The free choices of one clip's movement. Angles and phases in turns (1 = a full circle)."""

    motion: str
    panning: bool
    phase: float
    direction: int
    amplitude: float
    tempo: float
    center: tuple[float, float]
    camera_start: float
    camera_direction: int

    @staticmethod
    def draw(rng: random.Random, motion: str, camera: str) -> Path:
        return Path(
            motion=motion,
            panning=camera == "panning",
            phase=rng.random(),
            direction=rng.choice((-1, 1)),
            amplitude=rng.uniform(0.85, 1.15),
            tempo=rng.uniform(0.9, 1.1),
            center=(rng.uniform(-0.12, 0.12), 0.45 + rng.uniform(-0.04, 0.04)),
            camera_start=rng.uniform(0, CAMERA_PERIOD),
            camera_direction=rng.choice((-1, 1)),
        )

    def __call__(self, t: Tensor, aspect: float = 16 / 9) -> Tensor:
        """``t [N]`` in seconds -> ``[N, 4]``: x, y, angle of the subject, and the camera's travel."""
        period, ax, ay, hx, hy, py, tilt, ht = CURVES[self.motion]
        turn = 2 * math.pi * (t / (period / self.tempo) + self.phase)
        x = (
            aspect / 2
            + self.center[0]
            + self.amplitude * ax * aspect / (16 / 9) * torch.sin(hx * turn) * self.direction
        )
        y = self.center[1] + self.amplitude * ay * torch.sin(hy * turn + 2 * math.pi * py)
        angle = self.amplitude * tilt * torch.cos(ht * turn) * self.direction
        camera = self.camera_start + self.panning * self.camera_direction * PAN_SPEED * t
        return torch.stack([x, y, angle, camera], -1)
