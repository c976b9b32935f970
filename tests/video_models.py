"""Small and untrained stand-ins for the bundled video models: they prove logic, not training."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from hhattn.video.codec import Codec
from hhattn.video.generate import Pipeline
from hhattn.video.model import Condition, Config, Memory, VideoDiT
from hhattn.video.presets import Size
from hhattn.video.prior import MotionPrior
from hhattn.video.reader import Reader
from hhattn.video.train.data import fit_codec
from hhattn.video.weights import store

TINY = Size((48, 96), (48, 96))  # 2 x 3 cells, eight rows cropped above and below
HALF = Size((48, 96), (24, 48))
SMALL = Config(
    channels=8,
    dim=32,
    heads=2,
    layers=4,
    ffn=48,
    sparse_every=2,
    tile=(2, 2),
    block=(16, 16),
    window=(2, 3, 3),
    chunk=3,
    decay=(0.5, 0.9),
    word_dim=8,
    field_width=8,
)
GRID = (4, 6)


def wake(module: nn.Module, std: float = 0.1) -> nn.Module:
    """Give every parameter that starts at zero random values, so that no branch is silent."""
    g = torch.Generator().manual_seed(0)
    for p in module.parameters():
        if not p.any():
            p.data = torch.randn(p.shape, generator=g) * std
    return module


def small_dit(config: Config = SMALL) -> VideoDiT:
    torch.manual_seed(0)
    model = wake(VideoDiT(config), 0.3).eval()
    model.spread.copy_(torch.rand(config.channels) + 0.5)
    return model


def inputs(model: VideoDiT, frames: int, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Condition]:
    """Latents, noise levels and a condition for ``frames`` latent frames on GRID."""
    g = torch.Generator().manual_seed(seed)
    c = model.config
    z = torch.randn(batch, frames, c.channels, *GRID, generator=g)
    ids = torch.stack([torch.randint(n, (batch,), generator=g) for n in c.word_slots], 1)
    times, poses = (
        torch.rand(batch, frames, 4, generator=g) * 9,
        torch.rand(batch, frames, 4, 4, generator=g) * 0.3,
    )
    return z, torch.rand(batch, frames, generator=g), model.condition(ids, times, poses, torch.zeros(batch, 2), GRID)


def cut(cond: Condition, part: slice) -> Condition:
    """A condition's share for some of its frames."""
    return Condition(cond.words[:, part], cond.field[:, part])


@torch.no_grad()
def in_chunks(
    model: VideoDiT, z: Tensor, t: Tensor, cond: Condition, lens: tuple[int, ...], memory: Memory | None = None
) -> tuple[Tensor, list[Memory]]:
    """Call after call with the memory of the one before; all results together, and the memory after each."""
    out, memories, start = [], [], 0
    for n in lens:
        part = slice(start, start + n)
        x0, memory = model(z[:, part], t[:, part], cut(cond, part), (n,), memory)
        out.append(x0)
        memories.append(memory)
        start += n
    return torch.cat(out, 1), memories


def tensors_of(memory: Memory) -> list[Tensor]:
    held = [t for m in memory.layers for t in (*(m.linear or ()), *(m.ring or ()), m.conv)]
    return [t for t in held if t is not None]


@cache
def untrained_codec() -> Codec:
    """A fitted encoder and a decoder with random weights."""
    torch.manual_seed(0)
    codec = fit_codec(random.Random(0), clips=4)
    return wake(codec, 0.02).eval().requires_grad_(False)


def write_untrained(folder: Path) -> None:
    """Weights of every model of the pipeline, in the package's own format."""
    torch.manual_seed(0)
    models = {"codec": untrained_codec(), "dit": VideoDiT(), "prior": MotionPrior(), "reader": Reader()}
    for name, model in models.items():
        store(wake(model, 0.05), name, folder)


def untrained_pipeline(folder: Path) -> Pipeline:
    write_untrained(folder)
    return Pipeline(folder)
