"""Reads a picture: which words describe it and where its subject is.

Needed for image-to-video, where the words may be missing and the path must start where the picture has its subject.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .codec import CHANNELS, SPACE
from .text import SLOTS

_UNIT = 720


@dataclass(frozen=True)
class Reading:
    """Words by slot (colour, subject, scene), how sure of the least sure of them, and the subject's x, y and angle
    ``[3]``."""

    words: dict[str, str]
    confidence: float
    pose: Tensor


class Reader(nn.Module):
    """A small convolutional network on one latent frame."""

    def __init__(self, channels: int = CHANNELS, dim: int = 96):
        super().__init__()
        self.stem = nn.Conv2d(channels + 4, dim, 1)
        self.convs = nn.ModuleList(nn.Conv2d(dim, dim, 3, padding=1) for _ in range(6))
        self.sizes = {"color": len(SLOTS["color"]), "subject": len(SLOTS["subject"]), "scene": len(SLOTS["scene"])}
        self.where = nn.Conv2d(dim, 1, 1)
        self.shift = nn.Conv2d(dim, 3, 1)  # offset within the cell (cells), angle
        self.words = nn.ModuleDict({k: nn.Linear(2 * dim, n) for k, n in self.sizes.items()})

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        """``z [B, C, h, w]`` -> logits by slot, ``where [B, h·w]`` (log-probabilities), ``shift [B, 3, h·w]``."""
        b, _, h, w = z.shape
        rows, cols = torch.arange(h, device=z.device) / 23, torch.arange(w, device=z.device) / 40
        turn = 2 * math.pi * cols
        place = torch.stack(
            [rows[:, None].expand(h, w), cols.expand(h, w), turn.sin().expand(h, w), turn.cos().expand(h, w)]
        )
        x = self.stem(torch.cat([z, place.expand(b, -1, -1, -1)], 1))
        for i, conv in enumerate(self.convs):
            x = x + F.silu(conv(F.silu(x) if i else x))
        where = self.where(x).flatten(1).log_softmax(-1)
        flat = x.flatten(2)
        here = (flat * where.exp()[:, None]).sum(-1)
        both = torch.cat([here, flat.mean(-1)], -1)
        out = {k: head(both) for k, head in self.words.items()}
        return out | {"where": where, "shift": self.shift(x).flatten(2)}

    @torch.no_grad()
    def read(self, z: Tensor, margin: int = 8) -> Reading:
        """One latent frame ``[1, C, h, w]``."""
        out, w = self(z), z.shape[-1]
        words = {k: SLOTS[k][int(out[k][0].argmax())] for k in self.sizes}
        sure = min(float(out[k][0].softmax(-1).max()) for k in self.sizes)
        cell = int(out["where"][0].argmax())
        row, col, angle = out["shift"][0, :, cell].tolist()
        x = (cell % w + 0.5 + col) * SPACE / _UNIT
        y = ((cell // w + 0.5 + row) * SPACE - margin) / _UNIT
        return Reading(words, sure, torch.tensor([x, y, angle]))
