"""Anti-aliased painting with signed distances, batched over images.

A picture is ``[N, 3, h, w]`` in [0, 1]; distances and masks are ``[N, h, w]`` in world units (frame heights); a mask
is the share of a pixel that a shape covers, from its signed distance (negative inside) and the size of a pixel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rgb(color: tuple[float, float, float]) -> Tensor:
    """A colour as ``[1, 3, 1, 1]``."""
    return torch.tensor(color, dtype=torch.float32).view(1, 3, 1, 1)


def cover(distance: Tensor, px: float, blur: float = 1.0) -> Tensor:
    """Share of each pixel inside the shape; ``blur`` widens the edge beyond one pixel."""
    return (0.5 - distance / (px * blur)).clamp(0, 1)


def over(picture: Tensor, color: Tensor, mask: Tensor) -> Tensor:
    """``picture·(1 - mask) + color·mask``."""
    return picture + (color - picture) * mask.unsqueeze(1)


def mix(a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    return a + (b - a) * m


def vertical(y: Tensor, *stops: tuple[float, float, float]) -> Tensor:
    """Vertical gradient through evenly spaced colours; ``y [N, h, 1]`` in [0, 1] -> ``[N, 3, h, 1]``."""
    u = y.clamp(0, 1).unsqueeze(1) * (len(stops) - 1)
    out = rgb(stops[0])
    for i in range(len(stops) - 1):
        out = mix(out, rgb(stops[i + 1]), (u - i).clamp(0, 1))
    return out


def wrap(d: Tensor, period: float) -> Tensor:
    """The shortest signed way round a circle of length ``period``."""
    return torch.remainder(d + period / 2, period) - period / 2


def blobs(u: Tensor, y: Tensor, points: Tensor, period: float) -> Tensor:
    """Sum of separable Gaussians on a strip of length ``period``. ``u [N, 1, w]``, ``y [N, h, 1]``; points ``[K, 5]``
    hold u, y, width, height, weight -> ``[N, h, w]``. Separable, hence one small matrix product."""
    pu, py, wu, wy, a = (c.view(1, -1, 1) for c in points.unbind(1))
    row = torch.exp(-((wrap(u - pu, period) / wu) ** 2)) * a
    col = torch.exp(-(((y.transpose(1, 2) - py) / wy) ** 2))
    return col.transpose(1, 2) @ row


def ridge(u: Tensor, period: float, base: float, amp: float, seed: int) -> Tensor:
    """Height of a smooth, periodic ridge line: three harmonics with seeded phases."""
    turn, height = 2 * math.pi * u / period, torch.full_like(u, base)
    for n, weight in ((1, 0.45), (2, 0.6), (3 + seed % 2, 0.35)):
        height = height + amp * weight * torch.sin(n * turn + 1.7 * seed + 2.1 * n * seed)
    return height


def ellipse(x: Tensor, y: Tensor, cx: float, cy: float, a: float, b: float) -> Tensor:
    """Approximate signed distance to an axis-parallel ellipse."""
    return ((((x - cx) / a) ** 2 + ((y - cy) / b) ** 2).sqrt() - 1) * min(a, b)


def polygon(x: Tensor, y: Tensor, *points: tuple[float, float]) -> Tensor:
    """Signed distance (exact inside, a bound outside) to a convex polygon, either winding."""
    area = sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(points, points[1:] + points[:1], strict=True))
    ring = points if area > 0 else points[::-1]
    out: Tensor | None = None
    for a, b in zip(ring, ring[1:] + ring[:1], strict=True):
        side = ((b[1] - a[1]) * (x - a[0]) - (b[0] - a[0]) * (y - a[1])) / math.hypot(b[0] - a[0], b[1] - a[1])
        out = side if out is None else torch.maximum(out, side)
    assert out is not None
    return out


def shade(x: Tensor, y: Tensor, cx: float, cy: float, a: float, b: float, color: Tensor, gloss: float = 0.4) -> Tensor:
    """``color`` lit from the upper left as on an ellipsoid: ambient + diffuse + a highlight."""
    u, v = (x - cx) / a, (y - cy) / b
    w = (1 - u * u - v * v).clamp(0, 1).sqrt()
    light = (-0.45 * u - 0.6 * v + 0.66 * w).clamp(0, 1).unsqueeze(1)
    return (color * (0.45 + 0.68 * light) + gloss * light**10).clamp(0, 1)
