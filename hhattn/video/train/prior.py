"""Train the motion prior on the world's paths; they cost nothing, so no two batches are alike."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor

from ..prior import KNOT_SECONDS, MotionPrior, Sampling, tokenize
from ..world import SLOTS
from ..world.motion import Path as Track
from .loop import run

KNOTS = 64


def draw(rng: random.Random, count: int, knots: int = KNOTS) -> tuple[Tensor, Tensor]:
    """True knots ``[count, knots, 4]`` (camera counted within one turn of the panorama at the start) and words
    ``[count, 2]``."""
    words = [(rng.randrange(len(SLOTS["motion"])), rng.randrange(len(SLOTS["camera"]))) for _ in range(count)]
    t = torch.arange(knots) * KNOT_SECONDS
    paths = [Track.draw(rng, SLOTS["motion"][m], SLOTS["camera"][c])(t) for m, c in words]
    return torch.stack(paths), torch.tensor(words)


def _camera_speed(knots: Tensor) -> Tensor:
    """Mean speed of each path's camera once it has settled, frame heights a second."""
    return torch.diff(knots[:, 4:, 3], dim=1).mean(1).abs() / KNOT_SECONDS


def _rough(knots: Tensor) -> float:
    """Root mean square third difference of the subject's path."""
    return float(torch.diff(knots[..., :2], n=3, dim=1).square().mean().sqrt())


def train(out: Path, minutes: float, lr: float = 2e-3, seed: int = 0, every: float = 2.0) -> MotionPrior:
    torch.manual_seed(seed)
    rng, held = random.Random(seed), random.Random("held out")
    held_path, held_words = draw(held, 64)
    held_tokens, held_knots = tokenize(held_path)

    def loss_of(model: MotionPrior, _: torch.Generator) -> Tensor:
        path, words = draw(rng, 48)
        tokens, knots = tokenize(path)
        return model.loss(tokens, knots, words)

    @torch.no_grad()
    def evaluate(model: MotionPrior) -> dict[str, float]:
        made = model.extend(held_path[:, :0], held_words, KNOTS, Sampling(), torch.Generator().manual_seed(0))
        inside = (
            ((made[..., 0] > 0) & (made[..., 0] < 16 / 9) & (made[..., 1] > 0.1) & (made[..., 1] < 0.8)).float().mean()
        )
        return {
            "nats": float(model.loss(held_tokens, held_knots, held_words)),
            "inside": float(inside),
            "camera_speed_error": float((_camera_speed(made) - _camera_speed(held_path)).abs().mean()),
            "roughness_ratio": _rough(made) / _rough(held_path),
            "reach_ratio": float(made[..., :2].std(1).mean() / held_path[..., :2].std(1).mean()),
        }

    model = MotionPrior()
    optimizers = [torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)]
    return run("prior", out, model, optimizers, loss_of, evaluate, minutes=minutes, seed=seed, every=every)
