"""Train the DiT on kept latents: crops round the subject, whole frames, and clips of two chunks that use the memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..codec import SPACE, Codec
from ..model import VideoDiT
from .data import MARGIN, load_codec
from .loop import run
from .muon import Muon

DROP = 0.05  # share of clips that train without words, for guidance


@dataclass(frozen=True)
class Kind:
    """One kind of batch: how many clips, latent frames and cells (None: the whole frame), and its share of the
    steps."""

    clips: int
    frames: int
    cells: int | None
    share: float


KINDS = (
    Kind(24, 1, 10, 0.43),
    Kind(3, 1, None, 0.19),
    Kind(2, 8, 10, 0.24),
    Kind(1, 8, 16, 0.10),
    Kind(1, 5, None, 0.04),
)


@dataclass
class Batch:
    z: Tensor
    words: Tensor
    times: Tensor
    poses: Tensor
    origin: Tensor


class Pool:
    """Every shard under a folder; new shards are picked up by :meth:`refresh`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.shards: dict[str, dict[str, Tensor]] = {}
        self.refresh()

    def refresh(self) -> None:
        for path in sorted(self.folder.glob("clips-*.pt")):
            if path.name not in self.shards:
                self.shards[path.name] = torch.load(path, mmap=True)
        self.names = sorted(self.shards)

    def spread(self) -> Tensor:
        """Root mean square of each latent channel."""
        return torch.cat([self.shards[n]["z"][:, 0] for n in self.names[:4]]).float().square().mean((0, 2, 3)).sqrt()

    def draw(self, kind: Kind, g: torch.Generator) -> Batch:
        rows = []
        for _ in range(kind.clips):
            shard = self.shards[self.names[_below(len(self.names), g)]]
            i = _below(len(shard["words"]), g)
            f = _below(shard["z"].shape[1] - kind.frames + 1, g)
            cut = slice(f, f + kind.frames)
            z, poses = shard["z"][i, cut], shard["poses"][i, cut]
            row, col = (0, 0) if kind.cells is None else _corner(poses, (z.shape[-2], z.shape[-1]), kind.cells, g)
            n = kind.cells or max(z.shape[-2:])
            rows.append(
                (
                    z[..., row : row + n, col : col + n].float(),
                    shard["words"][i],
                    shard["times"][i, cut],
                    poses,
                    torch.tensor([row, col]),
                )
            )
        return Batch(*(torch.stack(column) for column in zip(*rows, strict=True)))


def _below(n: int, g: torch.Generator) -> int:
    return int(torch.randint(n, (), generator=g))


def _corner(poses: Tensor, hw: tuple[int, int], n: int, g: torch.Generator) -> tuple[int, int]:
    """First cell of a crop: three of four round the subject (jittered), the others anywhere."""
    if float(torch.rand((), generator=g)) < 0.75:
        x, y = poses[_below(len(poses), g), -1, :2].tolist()
        jitter = ((torch.rand(2, generator=g) - 0.5) * n * 0.7).tolist()
        row, col = (y * 720 + MARGIN) / SPACE - n / 2 + jitter[0], x * 720 / SPACE - n / 2 + jitter[1]
    else:
        row, col = (torch.rand(2, generator=g) * torch.tensor([hw[0] - n, hw[1] - n])).tolist()
    return min(max(round(row), 0), hw[0] - n), min(max(round(col), 0), hw[1] - n)


def optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks and the head, AdamW for embeddings, planes, biases and modulation."""
    muon: list[Tensor] = []
    adam: list[Tensor] = []
    planes: list[Tensor] = []
    for name, p in model.named_parameters():
        inside = name.startswith(("blocks.", "head.0", "field.proj")) and p.ndim == 2 and min(p.shape) > 8
        if name.startswith(("field.subject", "field.backdrop")):
            planes.append(p)
        else:
            (muon if inside and ".ada." not in name else adam).append(p)
    groups: list[dict[str, Any]] = [{"params": adam}, {"params": planes, "lr": 3 * lr}]
    return [
        Muon(muon, lr),
        torch.optim.AdamW(groups, lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def noise_levels(b: int, frames: int, chunk: int, g: torch.Generator) -> Tensor:
    """Levels ``[b, frames]``: one a chunk, shifted towards noise. A clip's first chunk is mostly clean, as the past
    is when generating, and its first frame sometimes is given, as a picture is."""
    u = torch.rand(b, math.ceil(frames / chunk), generator=g)
    t = (2 * u / (1 + u)).clamp(0.02, 0.999)
    if t.shape[1] > 1:
        clean = torch.rand(b, generator=g) < 0.7
        t[:, 0] = torch.where(clean, 0.15 * torch.rand(b, generator=g) ** 2, t[:, 0])
    t = t.repeat_interleave(chunk, 1)[:, :frames]
    if frames > 1:
        t[:, 0] = torch.where(torch.rand(b, generator=g) < 0.2, 0.0, t[:, 0])
    return t


def loss_of(model: VideoDiT, batch: Batch, weight: Tensor, g: torch.Generator) -> Tensor:
    b, frames = batch.z.shape[:2]
    grid = (batch.z.shape[-2], batch.z.shape[-1])
    chunk = model.config.chunk
    t = noise_levels(b, frames, chunk, g)
    level = t[:, :, None, None, None]
    noisy = (1 - level) * batch.z + level * torch.randn(batch.z.shape, generator=g)
    dropped = (torch.rand(b, 1, generator=g) < DROP).expand_as(batch.words)
    words = torch.where(dropped, model.no_words(b), batch.words)
    cond = model.condition(words, batch.times, batch.poses, batch.origin, grid, MARGIN)
    lens = tuple(min(chunk, frames - i) for i in range(0, frames, chunk))
    x0, _ = model(noisy, t, cond, lens)
    error = ((x0 - batch.z).square() * weight).mean((2, 3, 4))
    return (error / (t + 0.3)).mean()


@torch.no_grad()
def evaluate(
    model: VideoDiT, codec: Codec, held: dict[str, Tensor], steps: int = 3, count: int = 24
) -> tuple[dict[str, float], Tensor]:
    """PSNR of single generated latent frames against the world, decoded linearly at quarter size: whole frame, the
    subject's box."""
    g = torch.Generator().manual_seed(5)
    z, words, times, poses = (
        held[k][:count, -1:] if k != "words" else held[k][:count] for k in ("z", "words", "times", "poses")
    )
    z = z.float()
    cond = model.condition(words, times, poses, torch.zeros(len(z), 2), (z.shape[-2], z.shape[-1]), MARGIN)
    x = torch.randn(z.shape, generator=g)
    ts = torch.linspace(0.999, 0, steps + 1)
    for a, b in pairwise(ts):
        x0, _ = model(x, a.expand(len(z), 1), cond, (1,))
        x = x0 + (x - x0) * (b / a)
    truth, made = (codec.decode_linear(v).clamp(0, 1) for v in (z, x))
    error = (truth - made).square().mean(2)
    h, w = error.shape[-2:]
    rows, cols = (torch.arange(h) + 0.5)[:, None] * 4 - MARGIN, (torch.arange(w) + 0.5)[None] * 4
    px, py = (poses[:, 0, :, i, None, None] * 720 for i in (0, 1))
    box = ((cols - px).abs() < 180) & ((rows - py).abs() < 180)
    figures = {}
    for name, m in (("full", torch.ones_like(error)), ("box", box.float())):
        figures[name] = float((-10 * torch.log10((error * m).sum((1, 2, 3)) / m.sum((1, 2, 3)))).mean())
    return figures, torch.stack([made[:, 0], truth[:, 0]], 1)


def picture(pairs: Tensor, path: Path) -> None:
    """Made beside true, three pairs a row."""
    from PIL import Image

    rows = [torch.cat([p for pair in pairs[i : i + 3] for p in pair], 2) for i in range(0, len(pairs), 3)]
    Image.fromarray((torch.cat(rows, 1).permute(1, 2, 0) * 255).byte().numpy()).save(path)


def train(
    data: Path,
    out: Path,
    minutes: float,
    lr: float = 2e-3,
    seed: int = 0,
    every: float = 5.0,
    kinds: tuple[Kind, ...] = KINDS,
    start_from: Path | None = None,
) -> VideoDiT:
    """Train on the latents under ``data``; see :func:`hhattn.video.train.loop.run` for resuming and pausing."""
    torch.manual_seed(seed)
    codec = load_codec(data)
    pool, held, model = Pool(data), torch.load(data / "held.pt"), VideoDiT()
    model.spread.copy_(pool.spread())
    weight = codec.spread**2
    weight = (weight / (weight * model.spread**2).mean()).view(-1, 1, 1)  # the loss is a mean square error of pixels
    shares = torch.tensor([k.share for k in kinds])

    def step_loss(m: VideoDiT, g: torch.Generator) -> Tensor:
        kind = kinds[int(torch.multinomial(shares, 1, generator=g))]
        return loss_of(m, pool.draw(kind, g), weight, g)

    def figures(m: VideoDiT) -> dict[str, float]:
        pool.refresh()
        out_figures, pairs = evaluate(m, codec, held)
        picture(pairs, out / "dit.png")
        return out_figures

    return run(
        "dit",
        out,
        model,
        optimizers(model, lr),
        step_loss,
        figures,
        minutes=minutes,
        seed=seed,
        every=every,
        start_from=start_from,
    )
