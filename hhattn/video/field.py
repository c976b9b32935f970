"""Position conditioning: what the words put where, as seen from the subject and from the camera.

A diffusion transformer usually gets positions as sines. Here every latent cell gets learned features looked up at its
place: one plane per subject word, indexed in the subject's own frame (so it moves and tilts with the predicted path),
and per scene word one plane for each parallax layer, indexed by the predicted camera travel. A small MLP, modulated
by the words (colour) and a 6-second clock (wings, waves), turns them into the features of one of the four frames in a
latent.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codec import SPACE, TIME

CLOCK_SECONDS = 6.0
_CLOCK_HARMONICS = (1, 2, 3, 6, 12)
_UNIT = 720  # pixels in a frame height, the unit of poses
_REACH = 1.4 * 0.18  # half the side of a subject plane


@dataclass(frozen=True)
class Backdrop:
    """One background plane: it moves ``depth`` times as fast as the camera and repeats every ``period`` (None:
    never)."""

    depth: float
    period: float | None
    columns: int


BACKDROPS = (Backdrop(0.0, None, 48), Backdrop(0.25, 2.4, 64), Backdrop(0.5, 4.8, 128), Backdrop(1.0, 4.8, 128))


def clock(t: Tensor) -> Tensor:
    """Seconds ``[...]`` -> sines and cosines of the clock ``[..., 10]``; periodic, hence the same at any clip
    length."""
    turn = t[..., None] * (2 * math.pi / CLOCK_SECONDS) * torch.tensor(_CLOCK_HARMONICS, dtype=t.dtype, device=t.device)
    return torch.cat([turn.sin(), turn.cos()], -1)


class PositionField(nn.Module):
    """(words, times, poses, cells) -> features ``[B, T, h, w, 4·width]``, one quarter for each frame of the latent."""

    def __init__(self, subjects: int, scenes: int, words: int, width: int = 64, hidden: int = 160):
        super().__init__()
        self.subject = nn.Parameter(torch.randn(subjects, 16, 26, 26) * 0.3)
        self.backdrop = nn.ParameterList(torch.randn(scenes, 8, 26, b.columns) * 0.3 for b in BACKDROPS)
        self.proj = nn.Linear(4 * (16 + 8 * len(BACKDROPS)) + 5, hidden)
        self.film = nn.Linear(words + 2 * len(_CLOCK_HARMONICS), 2 * hidden)
        self.out = nn.Linear(hidden, width)

    def cells(self, origin: Tensor, h: int, w: int, margin: int) -> tuple[Tensor, Tensor]:
        """Four sample points in each cell: x, y ``[B, h, w, 4]`` in frame heights. ``origin [B, 2]``: first row and
        column."""
        dev = origin.device
        off = torch.tensor([-0.25, 0.25], device=dev)
        rows = (origin[:, :1] + torch.arange(h, device=dev) + 0.5)[:, :, None] + off
        cols = (origin[:, 1:] + torch.arange(w, device=dev) + 0.5)[:, :, None] + off
        y = ((rows * SPACE - margin) / _UNIT)[:, :, None, :, None].expand(-1, h, w, 2, 2)
        x = (cols * SPACE / _UNIT)[:, None, :, None, :].expand(-1, h, w, 2, 2)
        return x.flatten(3), y.flatten(3)

    def forward(
        self,
        subject: Tensor,
        scene: Tensor,
        words: Tensor,
        times: Tensor,
        poses: Tensor,
        origin: Tensor,
        hw: tuple[int, int],
        margin: int,
    ) -> Tensor:
        """``subject, scene [B]`` word ids, ``words [B, n]``, ``times [B, T, 4]``, ``poses [B, T, 4, 4]``,
        ``origin [B, 2]``."""
        b, t = times.shape[:2]
        h, w = hw
        x, y = (c[:, None] for c in self.cells(origin, h, w, margin))  # [B, 1, h, w, 4]
        px, py, angle, camera = (p.reshape(b, t * TIME, 1, 1, 1) for p in poses.unbind(-1))
        dx, dy = (x - px) / _REACH, (y - py) / _REACH
        c, s = torch.cos(angle), torch.sin(angle)
        local = torch.stack([dx * c + dy * s, dy * c - dx * s], -1)  # [B, 4T, h, w, 4, 2]
        parts = [_lookup(self.subject[subject], local, "zeros")]
        height = (y * 2 - 1).expand(-1, t * TIME, -1, -1, -1)
        for drop, planes in zip(BACKDROPS, self.backdrop, strict=True):
            plane = planes[scene]
            if drop.period is None:
                u = (x * (2 * _UNIT / 1280) - 1).expand_as(height)
            else:
                u = torch.remainder((x + drop.depth * camera) / drop.period, 1.0) * 2 - 1
                plane = torch.cat([plane, plane[..., :1]], -1)
            parts.append(_lookup(plane, torch.stack([u, height], -1), "border"))
        centre = local.mean(-2)
        near = torch.exp(-(centre.square().sum(-1, keepdim=True) * 0.5).square())
        extra = torch.cat([centre.clamp(-2, 2), near, centre * near], -1)
        seen = torch.cat([torch.cat(parts, -1).flatten(-2), extra], -1)
        scale, shift = self.film(torch.cat([words[:, None].expand(-1, t * TIME, -1), clock(times.flatten(1))], -1))[
            :, :, None, None
        ].chunk(2, -1)
        y_ = self.out(F.silu(self.proj(seen) * (1 + scale) + shift))
        return y_.unflatten(1, (t, TIME)).permute(0, 1, 3, 4, 2, 5).flatten(-2)


def _lookup(plane: Tensor, at: Tensor, padding: str) -> Tensor:
    """Bilinear look-up. ``plane [B, c, H, W]``, ``at [B, ..., 2]`` in [-1, 1] -> ``[B, ..., c]``."""
    got = F.grid_sample(plane, at.reshape(at.shape[0], -1, 1, 2), padding_mode=padding, align_corners=True)
    return got[..., 0].movedim(1, -1).reshape(*at.shape[:-1], -1)
