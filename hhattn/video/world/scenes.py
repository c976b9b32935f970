"""The backgrounds. Each has three parallax layers: a layer of depth k shows its strip at ``u = x + k·camera``.

Strips repeat every 2.4 (the deepest) or 4.8 frame heights, so the world is endless and the camera never leaves it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .canvas import blobs, cover, ellipse, mix, over, rgb, ridge, vertical, wrap

DEPTHS = (0.25, 0.5, 1.0)
STRIP = 2.4
SECONDS = 6.0  # everything that moves by itself repeats after this time
Color = tuple[float, float, float]
Painter = Callable[[Tensor, Tensor, list[Tensor], Tensor, float], Tensor]


def _scatter(n: int, seed: int, top: float, bottom: float, size: tuple[float, float]) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    r = torch.rand(n, 4, generator=g)
    w = size[0] + (size[1] - size[0]) * r[:, 2]
    return torch.stack([r[:, 0] * STRIP, top + (bottom - top) * r[:, 1], w, w, 0.35 + 0.65 * r[:, 3]], 1)


def _cloud_points() -> Tensor:
    puffs = ((0.0, 0.0, 0.15, 0.030, 1.0), (-0.08, -0.022, 0.075, 0.036, 0.9), (0.06, -0.03, 0.085, 0.042, 0.9))
    seats = ((0.25, 0.15), (0.95, 0.27), (1.50, 0.12), (2.05, 0.24))
    return torch.tensor([(u + p[0], y + p[1], *p[2:]) for u, y in seats for p in puffs])


_STARS = _scatter(70, 3, 0.0, 0.62, (0.0035, 0.0065))
_SPACE_STARS = _scatter(110, 5, 0.0, 1.0, (0.0035, 0.0075))
_CLOUDS = _cloud_points()


def _clouds(picture: Tensor, u: Tensor, y: Tensor, color: Color, strength: float) -> Tensor:
    return over(picture, rgb(color), ((blobs(u, y, _CLOUDS, STRIP) - 0.25) * 2.2).clamp(0, strength))


def _sun(
    picture: Tensor, x: Tensor, y: Tensor, px: float, at: tuple[float, float], r: float, color: Color, glow: float
) -> Tensor:
    d2 = (x - at[0]) ** 2 + (y - at[1]) ** 2
    picture = over(picture, rgb(color), glow * torch.exp(-d2 / (2.8 * r) ** 2))
    return over(picture, rgb(color), cover(d2.sqrt() - r, px, 2))


def _hills(picture: Tensor, us: list[Tensor], y: Tensor, px: float, colors: tuple[Color, Color, Color]) -> Tensor:
    shapes = ((0.64, 0.05, STRIP, 1), (0.75, 0.055, 2 * STRIP, 2), (0.88, 0.05, 2 * STRIP, 3))
    for u, (base, amp, period, seed), color in zip(us, shapes, colors, strict=True):
        top = ridge(u, period, base, amp, seed)
        depth = ((y - top) * 3.2).clamp(0, 1).unsqueeze(1)
        picture = over(picture, mix(rgb(color) * 1.18, rgb(color) * 0.72, depth), cover(top - y, px))
    return picture


def meadow(x: Tensor, y: Tensor, us: list[Tensor], clock: Tensor, px: float) -> Tensor:
    p = vertical(y / 0.8, (0.25, 0.55, 0.93), (0.52, 0.77, 0.98), (0.90, 0.95, 0.96)).expand(-1, -1, -1, x.shape[-1])
    p = _sun(p, x, y, px, (1.45, 0.20), 0.07, (1.0, 0.96, 0.78), 0.5)
    p = _clouds(p, us[0], y, (1.0, 1.0, 1.0), 0.9)
    return _hills(p, us, y, px, ((0.50, 0.72, 0.70), (0.36, 0.66, 0.38), (0.20, 0.52, 0.22)))


def sunset(x: Tensor, y: Tensor, us: list[Tensor], clock: Tensor, px: float) -> Tensor:
    p = vertical(y / 0.8, (0.28, 0.16, 0.42), (0.86, 0.36, 0.40), (1.0, 0.74, 0.42)).expand(-1, -1, -1, x.shape[-1])
    p = _sun(p, x, y, px, (1.30, 0.50), 0.12, (1.0, 0.90, 0.62), 0.5)
    p = _clouds(p, us[0], y, (1.0, 0.72, 0.62), 0.75)
    return _hills(p, us, y, px, ((0.58, 0.28, 0.44), (0.38, 0.18, 0.38), (0.20, 0.10, 0.26)))


def night(x: Tensor, y: Tensor, us: list[Tensor], clock: Tensor, px: float) -> Tensor:
    p = vertical(y / 0.8, (0.02, 0.03, 0.12), (0.06, 0.10, 0.28), (0.16, 0.22, 0.44)).expand(-1, -1, -1, x.shape[-1])
    p = over(p, rgb((1.0, 0.98, 0.92)), blobs(us[0], y, _STARS, STRIP).clamp(0, 0.9))
    p = _sun(p, x, y, px, (1.42, 0.19), 0.065, (0.95, 0.95, 0.86), 0.4)
    return _hills(p, us, y, px, ((0.11, 0.17, 0.34), (0.07, 0.12, 0.25), (0.03, 0.06, 0.15)))


def ocean(x: Tensor, y: Tensor, us: list[Tensor], clock: Tensor, px: float) -> Tensor:
    p = vertical(y / 0.6, (0.22, 0.50, 0.90), (0.55, 0.78, 0.97), (0.98, 0.92, 0.82)).expand(-1, -1, -1, x.shape[-1])
    p = _sun(p, x, y, px, (1.38, 0.30), 0.06, (1.0, 0.97, 0.82), 0.5)
    p = _clouds(p, us[0], y, (1.0, 1.0, 1.0), 0.9)
    for i, (layer, base, waves) in enumerate(((0, 0.58, 12), (1, 0.66, 8), (1, 0.74, 6), (2, 0.83, 5), (2, 0.92, 4))):
        swing = (0.05 + 0.01 * i) * torch.sin(2 * math.pi * clock / SECONDS + i)
        turn = 2 * math.pi * (us[layer] + swing) * waves / STRIP
        top = base + (0.004 + 0.003 * i) * torch.sin(turn + 1.3 * i)
        a = i / 4
        color = rgb((0.22 - 0.20 * a, 0.58 - 0.36 * a, 0.80 - 0.34 * a))
        depth = ((y - top) * 12).clamp(0, 1).unsqueeze(1)
        p = over(p, mix(color * 1.25, color * 0.92, depth), cover(top - y, px))
    return p


def _buildings(
    p: Tensor, u: Tensor, y: Tensor, px: float, n: int, base: float, amp: float, seed: int, color: Color, lit: bool
) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    heights, insets = torch.rand(n, generator=g), torch.rand(n, generator=g)
    windows = torch.rand(n, 5, 5, generator=g) > 0.45
    width = STRIP / n
    slot = torch.remainder(u, STRIP) / width
    k = slot.floor().long().clamp(0, n - 1)
    off = (slot - k - 0.5) * width
    half = width / 2 - 0.004 - 0.02 * insets[k]
    top = base - amp * heights[k]
    body = torch.maximum(top - y, off.abs() - half)
    p = over(p, mix(rgb(color) * 1.25, rgb(color) * 0.85, ((y - 0.4) * 2).clamp(0, 1).unsqueeze(1)), cover(body, px))
    if lit:
        gx, gy = 0.036, 0.052
        i, j = torch.round(off / gx), torch.floor((y - top - 0.02) / gy)
        wx, wy = (off - i * gx).abs() - gx * 0.28, ((y - top - 0.02) - (j + 0.5) * gy).abs() - gy * 0.3
        on = (
            windows[k.expand_as(j), (i.long() % 5).expand_as(j), j.long() % 5]
            & (j >= 0)
            & (off.abs() < half - gx * 0.5)
        )
        p = over(p, rgb((1.0, 0.84, 0.50)), cover(torch.maximum(wx, wy), px) * on * 0.9)
    return p


def city(x: Tensor, y: Tensor, us: list[Tensor], clock: Tensor, px: float) -> Tensor:
    p = vertical(y / 0.9, (0.07, 0.06, 0.22), (0.28, 0.16, 0.42), (0.86, 0.42, 0.46), (1.0, 0.70, 0.48))
    p = p.expand(-1, -1, -1, x.shape[-1])
    p = over(p, rgb((1.0, 0.90, 0.75)), 0.5 * torch.exp(-((x - 0.5) ** 2 + (y - 0.62) ** 2) / 0.1225))
    p = _buildings(p, us[0], y, px, 16, 0.66, 0.20, 1, (0.36, 0.23, 0.43), False)
    p = _buildings(p, us[1], y, px, 12, 0.80, 0.24, 2, (0.20, 0.14, 0.32), True)
    return _buildings(p, us[2], y, px, 9, 0.95, 0.20, 4, (0.09, 0.08, 0.19), True)


def space(x: Tensor, y: Tensor, us: list[Tensor], clock: Tensor, px: float) -> Tensor:
    p = vertical(y, (0.02, 0.02, 0.08), (0.07, 0.04, 0.18), (0.03, 0.03, 0.12)).expand(-1, -1, -1, x.shape[-1])
    for at, color in (((0.35, 0.35, 0.42), (0.50, 0.16, 0.60)), ((1.45, 0.75, 0.45), (0.12, 0.34, 0.66))):
        p = over(p, rgb(color), blobs(us[0], y, torch.tensor([(*at[:2], at[2], at[2], 0.55)]), STRIP))
    p = over(p, rgb((1.0, 0.98, 0.92)), blobs(us[0], y, _SPACE_STARS, STRIP).clamp(0, 1))
    dx, dy = wrap(us[1] - 1.5, 2 * STRIP), y - 0.24
    light = (0.75 - 3.2 * dx - 2.4 * dy).clamp(0.15, 1.25).unsqueeze(1)
    slant = dy + 0.25 * dx
    ring = cover((ellipse(dx, slant, 0, 0, 0.24, 0.047) + 0.004).abs() - 0.006, px, 1.5)
    behind = (slant < 0).float()
    p = over(p, rgb((0.86, 0.78, 0.66)), ring * behind * 0.8)
    planet = (rgb((0.92, 0.66, 0.42)) * light * (1 + 0.12 * torch.sin(slant * 70)).unsqueeze(1)).clamp(0, 1)
    p = over(p, planet, cover((dx**2 + dy**2).sqrt() - 0.13, px))
    return over(p, rgb((0.90, 0.82, 0.70)), ring * (1 - behind) * 0.9)


SCENES: dict[str, Painter] = {
    "meadow": meadow,
    "sunset": sunset,
    "night": night,
    "ocean": ocean,
    "city": city,
    "space": space,
}
