"""The subjects: each paints itself in its own frame (X, Y in units of its radius, Y downwards) and returns its cover.

All are symmetric from left to right, so that none ever travels backwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .canvas import cover, ellipse, over, polygon, rgb, shade
from .scenes import SECONDS

RADIUS = 0.18  # frame heights
REACH = 1.35  # no subject is drawn farther than this many radii from its centre
WHITE, DARK, WOOD = (0.97, 0.96, 0.93), (0.13, 0.11, 0.15), (0.55, 0.33, 0.18)


class Brush:
    """Paints shapes over a picture and keeps the union of what was painted."""

    def __init__(self, picture: Tensor, px: float):
        self.picture, self.px = picture, px
        self.mask = torch.zeros_like(picture[:, 0])

    def put(self, color: Tensor, distance: Tensor) -> None:
        m = cover(distance, self.px)
        self.picture = over(self.picture, color, m)
        self.mask = torch.maximum(self.mask, m)


def ball(b: Brush, x: Tensor, y: Tensor, color: Tensor, turn: Tensor) -> None:
    b.put(shade(x, y, 0, 0, 0.92, 0.92, color), ellipse(x, y, 0, 0, 0.92, 0.92))
    band = torch.maximum(ellipse(x, y, 0, 0, 0.92, 0.92), (y + 0.25 * x * x - 0.05).abs() - 0.15)
    b.put(shade(x, y, 0, 0, 0.92, 0.92, rgb(WHITE)), band)


def balloon(b: Brush, x: Tensor, y: Tensor, color: Tensor, turn: Tensor) -> None:
    for side in (-1, 1):
        rope = (x - side * (0.14 + 0.3 * (0.86 - y))).abs() - 0.018
        b.put(rgb(DARK), torch.maximum(rope, torch.maximum(0.45 - y, y - 0.86)))
    b.put(shade(x, y, 0, 0.95, 0.35, 0.3, rgb(WOOD), 0.1), torch.maximum(x.abs() - 0.18, (y - 0.96).abs() - 0.14))
    cone = polygon(x, y, (-0.72, 0.18), (-0.17, 0.8), (0.17, 0.8), (0.72, 0.18))
    body = torch.maximum(torch.minimum(ellipse(x, y, 0, -0.2, 0.8, 0.82), cone), y - 0.72)
    b.put(shade(x, y, 0, -0.2, 0.85, 1.05, color), body)
    bulge = (0.80 * (1 - ((y + 0.2) / 1.02) ** 2).clamp(0.02, 1).sqrt()).clamp(0.17)
    stripes = ((x / bulge).clamp(-1, 1).asin() * 7 / math.pi).sub(0.5)
    stripe = (torch.remainder(stripes, 2) - 1).abs() - 0.5
    b.put(shade(x, y, 0, -0.2, 0.85, 1.05, rgb(WHITE)), torch.maximum(body, stripe * bulge * 0.4))


def rocket(b: Brush, x: Tensor, y: Tensor, color: Tensor, turn: Tensor) -> None:
    length = 1.12 + 0.08 * torch.sin(6 * turn)
    flame = torch.maximum(x.abs() - 0.17 * (length - y) / 0.45, 0.66 - y)
    b.put(rgb((1.0, 0.62, 0.16)), flame)
    b.put(rgb((1.0, 0.90, 0.50)), torch.maximum(x.abs() - 0.09 * (length - 0.1 - y) / 0.4, 0.66 - y))
    for side in (-1, 1):
        b.put(color * 0.6, polygon(x, y, (side * 0.22, 0.22), (side * 0.62, 0.82), (side * 0.2, 0.66)))
    hull = torch.maximum(ellipse(x, y, 0, -0.02, 0.36, 1.1), y - 0.72)
    b.put(shade(x, y, 0, 0, 0.42, 1.3, color), hull)
    b.put(shade(x, y, 0, 0, 0.42, 1.3, rgb(WHITE)), torch.maximum(hull, y + 0.52))
    b.put(shade(x, y, 0, 0, 0.42, 1.3, rgb(WHITE)), torch.maximum(hull, (y - 0.52).abs() - 0.07))
    b.put(rgb(WHITE), ellipse(x, y, 0, -0.12, 0.21, 0.21))
    b.put(shade(x, y, 0, -0.12, 0.2, 0.2, rgb((0.30, 0.60, 0.85))), ellipse(x, y, 0, -0.12, 0.14, 0.14))


def butterfly(b: Brush, x: Tensor, y: Tensor, color: Tensor, turn: Tensor) -> None:
    u = x.abs() / (0.78 + 0.22 * torch.sin(6 * turn))  # wings beat: their width swings once a second
    upper = ellipse(u * 0.85 + y * 0.52, y * 0.85 - u * 0.52, 0.40, -0.64, 0.42, 0.46)
    lower = ellipse(u, y, 0.42, 0.42, 0.38, 0.40)
    wings = torch.minimum(upper, lower)
    b.put(color * 0.35, wings)
    b.put(shade(x, y, 0, -0.2, 1.3, 1.3, color, 0.1), wings + 0.09)
    b.put(rgb(WHITE), torch.minimum(ellipse(u, y, 0.70, -0.46, 0.13, 0.13), ellipse(u, y, 0.46, 0.46, 0.12, 0.12)))
    b.put(rgb(DARK), torch.minimum(ellipse(x, y, 0, 0.05, 0.085, 0.58), ellipse(x, y, 0, -0.55, 0.12, 0.12)))


def ufo(b: Brush, x: Tensor, y: Tensor, color: Tensor, turn: Tensor) -> None:
    b.put(shade(x, y, 0, -0.15, 0.55, 0.62, rgb((0.62, 0.86, 0.95)), 0.6), ellipse(x, y, 0, -0.15, 0.50, 0.55))
    b.put(color * 0.5, ellipse(x, y, 0, 0.24, 0.62, 0.26))
    b.put(shade(x, y, 0, 0.02, 1.12, 0.5, color), ellipse(x, y, 0, 0.06, 1.08, 0.28))
    for i, cx in enumerate((-0.72, -0.25, 0.25, 0.72)):
        glow = 0.7 + 0.3 * torch.sin(6 * turn + math.pi * i).unsqueeze(1)
        b.put(rgb((1.0, 0.95, 0.65)) * glow, ellipse(x, y, cx, 0.10, 0.10, 0.075))


def kite(b: Brush, x: Tensor, y: Tensor, color: Tensor, turn: Tensor) -> None:
    sway = 0.10 * torch.sin(4.5 * (y - 0.5) - 6 * turn) * ((y - 0.45) * 2).clamp(0, 1)
    b.put(rgb(DARK), torch.maximum((x - sway).abs() - 0.02, torch.maximum(0.4 - y, y - 1.25)))
    for cy in (0.78, 1.05):
        bow = (y - cy).abs() - 0.10 * ((x - sway).abs() / 0.14)
        b.put(color, torch.maximum(bow, (x - sway).abs() - 0.14))
    points = (0.0, -1.0), (0.72, -0.32), (0.0, 0.55), (-0.72, -0.32)
    sail = polygon(x, y, *points)
    b.put(rgb(WHITE), sail)
    quarter = torch.minimum(torch.maximum(x, y + 0.32), torch.maximum(-x, -y - 0.32))
    b.put(color * (1.05 - 0.12 * y.unsqueeze(1)).clamp(0.8, 1.1), torch.maximum(sail + 0.05, quarter))
    b.put(color * 0.7, torch.maximum(sail + 0.05, -quarter))
    b.put(rgb(DARK), torch.maximum(sail, torch.minimum(x.abs(), (y + 0.32).abs()) - 0.018))


Painter = Callable[[Brush, Tensor, Tensor, Tensor, Tensor], None]
SUBJECTS: dict[str, Painter] = {
    "ball": ball,
    "balloon": balloon,
    "rocket": rocket,
    "butterfly": butterfly,
    "ufo": ufo,
    "kite": kite,
}
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.16, 0.18),
    "orange": (0.97, 0.52, 0.12),
    "yellow": (0.98, 0.84, 0.20),
    "green": (0.22, 0.72, 0.32),
    "blue": (0.16, 0.42, 0.92),
    "purple": (0.56, 0.26, 0.82),
    "pink": (0.98, 0.50, 0.70),
    "white": (0.95, 0.95, 0.97),
}


def paint(
    kind: str, color: Tensor, picture: Tensor, x: Tensor, y: Tensor, pose: Tensor, t: Tensor, px: float
) -> tuple[Tensor, Tensor]:
    """Draw a subject. ``color [N,3]``, ``picture [N,3,h,w]``, ``x [N,1,w]``, ``y [N,h,1]``, ``pose [N,3]`` (x, y,
    angle), ``t [N]`` seconds -> the picture and the subject's cover ``[N,h,w]``."""
    x0, y0, angle = (p.view(-1, 1, 1) for p in pose.unbind(1))
    dx, dy = (x - x0) / RADIUS, (y - y0) / RADIUS
    brush = Brush(picture, px / RADIUS)
    turn = (2 * math.pi * t / SECONDS).view(-1, 1, 1)
    c, s = torch.cos(angle), torch.sin(angle)
    SUBJECTS[kind](brush, dx * c + dy * s, dy * c - dx * s, color.view(-1, 3, 1, 1), turn)
    return brush.picture.clamp(0, 1), brush.mask
