"""Train the picture reader on stills of the world."""

from __future__ import annotations

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..codec import SPACE, TIME, Codec
from ..reader import Reader
from ..world import SLOTS, Clip, render
from .data import MARGIN, load_codec, word_ids
from .loop import run, save


@torch.no_grad()
def stills(codec: Codec, rng: random.Random, count: int) -> dict[str, Tensor]:
    """Latents of single pictures ``z [n, C, 23, 40]`` fp16, ``words [n, 5]``, ``poses [n, 4]``."""
    z = torch.empty(count, codec.channels, 23, 40, dtype=torch.float16)  # filled in place: small results between large
    words, poses = (
        torch.empty(count, 5, dtype=torch.int64),
        torch.empty(count, 4),
    )  # temporaries would scatter over the heap
    for i in range(count):
        clip, t = Clip.draw(rng), torch.tensor([rng.uniform(0, 60)])
        picture, _ = render(clip, t, margin=MARGIN, stride=4)
        z[i] = codec.project(codec.blocks(picture.expand(TIME, -1, -1, -1)[None], 1))[0, 0]
        words[i], poses[i] = word_ids(clip), clip.path(t)[0]
    return {"z": z, "words": words, "poses": poses}


def targets(words: Tensor, poses: Tensor, w: int = 40) -> dict[str, Tensor]:
    """What the reader should say: word ids, the subject's cell, its place inside and its angle."""
    x = poses[:, 0] * 720 / SPACE
    y = (poses[:, 1] * 720 + MARGIN) / SPACE
    cell = y.long() * w + x.long()
    shift = torch.stack([y - y.floor() - 0.5, x - x.floor() - 0.5, poses[:, 2]], 1)
    ids = {k: words[:, list(SLOTS).index(k)] for k in ("color", "subject", "scene")}
    return ids | {"cell": cell, "shift": shift}


def loss_of(model: Reader, z: Tensor, t: dict[str, Tensor]) -> Tensor:
    out, rows = model(z), torch.arange(len(z))
    words = sum(F.cross_entropy(out[k], t[k]) for k in model.sizes)
    place = F.nll_loss(out["where"], t["cell"]) + 10 * F.smooth_l1_loss(
        out["shift"][rows, :, t["cell"]], t["shift"], beta=0.1
    )
    return words + place


def train(
    data: Path,
    out: Path,
    minutes: float,
    lr: float = 1e-3,
    seed: int = 0,
    every: float = 2.0,
    start_from: Path | None = None,
) -> Reader:
    torch.manual_seed(seed)
    codec = load_codec(data)
    path = data / "stills.pt"
    if not path.exists():
        save(path, stills(codec, random.Random("stills"), 6000))
    pool, held = torch.load(path), stills(codec, random.Random("held stills"), 128)

    def step_loss(model: Reader, g: torch.Generator) -> Tensor:
        i = torch.randint(len(pool["z"]), (24,), generator=g)
        z = pool["z"][i].float()
        z = z + torch.randn(z.shape, generator=g) * 0.1 * torch.rand(len(z), 1, 1, 1, generator=g)
        return loss_of(model, z, targets(pool["words"][i], pool["poses"][i]))

    @torch.no_grad()
    def evaluate(model: Reader) -> dict[str, float]:
        readings = [model.read(z[None].float()) for z in held["z"]]
        right = dict.fromkeys(model.sizes, 0.0)
        for reading, words in zip(readings, held["words"], strict=True):
            for k in right:
                right[k] += (reading.words[k] == SLOTS[k][int(words[list(SLOTS).index(k)])]) / len(readings)
        error = (torch.stack([r.pose for r in readings]) - held["poses"][:, :3]).abs().median(0).values
        return right | dict(zip(("x", "y", "angle"), error.tolist(), strict=True))

    model = Reader()
    optimizers = [torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.98), weight_decay=0.01)]
    return run(
        "reader",
        out,
        model,
        optimizers,
        step_loss,
        evaluate,
        minutes=minutes,
        seed=seed,
        every=every,
        start_from=start_from,
    )
