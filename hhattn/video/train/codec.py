"""Train the codec's decoder on crops of the world at full size; the encoder is fitted in closed form beforehand."""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..codec import TIME, Codec
from ..text import SLOTS
from ..world import Clip, paint, render
from .data import FPS, MARGIN, frame_times, load_codec
from .loop import run
from .muon import Muon

CROP, LATENTS, CLIPS = 128, 2, 6  # pixels, latent frames, clips a step
FIRST, POOL = 1200, 6000  # clips rendered before the first step, and kept for reuse; two are added each step
_ROWS, _COLUMNS, _UNIT = 736, 1280, 720


def crop(rng: random.Random) -> Tensor:
    """``[4·LATENTS, 3, CROP, CROP]``: three of four round the subject, some from the very start of a video."""
    clip = Clip.draw(rng)
    t = frame_times(rng.uniform(0, 60), LATENTS + 1)[(rng.random() < 0.8) :][:LATENTS].flatten()
    poses = clip.path(t)
    if rng.random() < 0.75:
        x, y = poses[rng.randrange(len(t)), :2].tolist()
        at = (y * _UNIT + MARGIN + rng.uniform(-1, 1) * 110 - CROP / 2, x * _UNIT + rng.uniform(-1, 1) * 110 - CROP / 2)
    else:
        at = (rng.random() * _ROWS, rng.random() * _COLUMNS)
    row, col = (round(min(max(a, 0), size - CROP) / 8) * 8 for a, size in zip(at, (_ROWS, _COLUMNS), strict=True))
    ys = ((torch.arange(CROP) + row + 0.5 - MARGIN) / _UNIT).expand(len(t), -1)
    xs = ((torch.arange(CROP) + col + 0.5) / _UNIT).expand(len(t), -1)
    return paint([clip] * len(t), poses, t, xs, ys, 1 / _UNIT)[0]


class Crops:
    """A pool of rendered crops, slowly renewed."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)
        self.pool: list[Tensor] = []

    def draw(self, count: int) -> Tensor:
        for _ in range(2 if self.pool else FIRST):
            self.pool.append((crop(self.rng) * 255).byte())
        del self.pool[: max(0, len(self.pool) - POOL)]
        picks = torch.stack([self.rng.choice(self.pool) for _ in range(count)]).float() / 255
        return picks.flip(-1) if self.rng.random() < 0.5 else picks


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def loss_of(codec: Codec, truth: Tensor, g: torch.Generator) -> Tensor:
    """Root mean square and absolute error, and absolute error of edges, coarse cells and frame differences. Latents
    carry a little noise, so that the decoder forgives the DiT's small errors."""
    z = codec.project(codec.blocks(truth))
    z = z + torch.randn(z.shape, generator=g) * 0.15 * torch.rand(len(z), 1, 1, 1, 1, generator=g)
    error = codec.reconstruct(z)[0] - truth
    edges = sum(e.abs().mean() for e in _edges(error))
    cells = F.avg_pool2d(error.flatten(0, 1), 8).abs().mean()
    motion = (error[:, 1:] - error[:, :-1]).abs().mean()
    return error.square().mean((1, 2, 3, 4)).sqrt().mean() + error.abs().mean() + 0.5 * edges + cells + 0.3 * motion


@torch.no_grad()
def evaluate(codec: Codec, rounds: int = 1) -> dict[str, float]:
    """PSNR at 720x1280 on unseen clips, every scene equally often: whole frames, the worst scene, and the subject's
    pixels."""
    rng, full, mask = random.Random("unseen"), [], []
    for scene in SLOTS["scene"] * rounds:
        clip = Clip.draw(rng, scene=scene)
        t = rng.uniform(0, 60) + torch.arange(1 + 2 * TIME) / FPS
        truth, cover = render(clip, t, margin=MARGIN)
        z, _ = codec.encode(truth[None])
        made, _ = codec.decode(z)
        error = (made[0].clamp(0, 1) - truth).square().mean(1)[:, MARGIN:-MARGIN]
        cover = cover[:, MARGIN:-MARGIN]
        full.append(-10 * math.log10(error.mean()))
        mask.append(-10 * math.log10((error * cover).sum() / cover.sum()))
    return {"psnr": sum(full) / len(full), "psnr_worst": min(full), "psnr_subject": sum(mask) / len(mask)}


def optimizers(decoder: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the convolutions (each kernel one matrix, outputs x inputs), AdamW for the stem, the last layer and
    vectors."""
    muon = [
        p
        for n, p in decoder.named_parameters()
        if p.ndim > 1 and not n.startswith(("stem", "look", "pixel_2")) and "scale" not in n
    ]
    kept = {id(p) for p in muon}
    adam = [p for p in decoder.parameters() if id(p) not in kept]
    return [Muon(muon, lr), torch.optim.AdamW(adam, lr, betas=(0.9, 0.98), weight_decay=0.0)]


def train(data: Path, out: Path, minutes: float, lr: float = 1.5e-3, seed: int = 0, every: float = 5.0) -> Codec:
    """Train the decoder on top of the encoder in ``data/encoder.pt``; see :func:`hhattn.video.train.loop.run`."""
    torch.manual_seed(seed)
    codec, crops = load_codec(data), Crops(seed)
    return run(
        "codec",
        out,
        codec,
        optimizers(codec.decoder, lr),
        lambda m, g: loss_of(m, crops.draw(CLIPS), g),
        evaluate,
        minutes=minutes,
        seed=seed,
        every=every,
    )
