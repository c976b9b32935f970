"""The motion prior: words -> where the subject and the camera go, one knot every half second, sampled token by token.

A knot is four numbers: x, y and angle of the subject, and the camera's travel. The first knot's tokens are quantised
values, the second's are first differences, all later ones are second differences against what was really reconstructed
(closed loop, so rounding never adds up). Each knot's four tokens are drawn one after another from a small causal
transformer that sees the reconstructed knots of the last 24 seconds; temperature, top-k and top-p act on every draw.
Frames between knots lie on a Catmull-Rom spline. Continuous inputs let a path start anywhere, e.g. where a picture
has its subject.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .world.motion import CAMERA_PERIOD

KNOT_SECONDS = 0.5
LEVELS = 65  # tokens a channel; the middle one of the differences is exactly zero
CONTEXT = 48  # knots
# half range of (value, first difference, second difference) for x, y, angle, camera; values are centred on CENTRE
RANGES = torch.tensor(
    [[0.90, 0.50, 0.55, CAMERA_PERIOD / 2], [0.20, 0.16, 0.25, 0.05], [0.11, 0.11, 0.16, 0.05]], dtype=torch.float32
)
CENTRE = torch.tensor([8 / 9, 0.45, 0.0, CAMERA_PERIOD / 2])


def levels(order: int, channel: int) -> Tensor:
    """The values that tokens stand for: evenly spaced for knots, denser towards zero for differences."""
    u = torch.linspace(-1, 1, LEVELS)
    return float(RANGES[order, channel]) * (u if order == 0 else u.sign() * u.abs() ** 1.6)


def predict(knots: Tensor) -> tuple[int, Tensor]:
    """``knots [B, n, 4]`` so far -> the order of the next difference, and the value it is added to ``[B, 4]``."""
    n = knots.shape[1]
    if n == 0:
        return 0, CENTRE.expand(knots.shape[0], 4)
    return (1, knots[:, -1]) if n == 1 else (2, 2 * knots[:, -1] - knots[:, -2])


def tokenize(path: Tensor) -> tuple[Tensor, Tensor]:
    """True knots ``[B, n, 4]`` -> tokens ``[B, n, 4]`` and the knots that those reconstruct.

    The camera's path is first moved to begin on a level. Its steps are smaller than that level's rounding, so they
    would otherwise spend themselves on making the rounding good, in a direction that nothing foretells, and the prior
    would learn that a still camera moves.
    """
    knots, tokens = path[:, :0], []
    first = CENTRE[3] + levels(0, 3)
    start = first[(path[:, :1, 3:] - first).abs().argmin(-1)]
    path = torch.cat([path[..., :3], path[..., 3:] + (start - path[:, 0, 3:])[:, None]], -1)
    for i in range(path.shape[1]):
        order, base = predict(knots)
        rest = path[:, i] - base
        token = torch.stack([(rest[:, c, None] - levels(order, c)).abs().argmin(-1) for c in range(4)], -1)
        value = torch.stack([levels(order, c)[token[:, c]] for c in range(4)], -1)
        tokens.append(token)
        knots = torch.cat([knots, (base + value)[:, None]], 1)
    return torch.stack(tokens, 1), knots


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. ``temperature`` 0 takes the likeliest; ``top_k`` 0 and ``top_p`` 1 leave all tokens in."""

    temperature: float = 0.6
    top_k: int = 0
    top_p: float = 0.9

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature}; accepted: 0 (likeliest) or more")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}; accepted: 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}; accepted: above 0, up to 1")

    def draw(self, logits: Tensor, g: torch.Generator) -> Tensor:
        """``logits [B, n]`` -> token ``[B]``."""
        if self.temperature == 0:
            return logits.argmax(-1)
        p, order = (logits / self.temperature).softmax(-1).sort(-1, descending=True)
        out = p.cumsum(-1) - p >= self.top_p
        if self.top_k:
            out[:, self.top_k :] = True
        return order.gather(-1, torch.multinomial(p.masked_fill(out, 0), 1, generator=g))[:, 0]


class Layer(nn.Module):
    """Pre-norm causal attention over the last CONTEXT knots, distance as a learned bias, and an MLP."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.distance = nn.Parameter(torch.zeros(heads, CONTEXT))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.SiLU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        gap = torch.arange(n)[:, None] - torch.arange(n)[None]
        bias = self.distance[:, gap.clamp(0, CONTEXT - 1)].masked_fill((gap < 0) | (gap >= CONTEXT), -torch.inf)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).reshape(b, n, d))
        return x + self.mlp(self.norm_2(x))


class MotionPrior(nn.Module):
    """p(tokens of the next knot | knots so far, motion word, camera word)."""

    def __init__(self, motions: int = 5, cameras: int = 2, dim: int = 96, layers: int = 3, heads: int = 4):
        super().__init__()
        self.motion, self.camera = nn.Embedding(motions, dim), nn.Embedding(cameras, dim)
        self.start = nn.Parameter(torch.zeros(2, dim))
        self.embed = nn.Linear(10, dim)
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(dim)
        self.drawn = nn.ModuleList(nn.Embedding(LEVELS, dim) for _ in range(3))  # a knot's tokens drawn so far
        self.heads = nn.ModuleList(nn.Linear(dim, 3 * LEVELS) for _ in range(4))  # one set of logits for each order

    def features(self, knots: Tensor, words: Tensor, begun: bool = False) -> Tensor:
        """Knots ``[B, n, 4]``, ids of motion and camera ``[B, 2]`` -> states ``[B, n + 1, dim]``, before each knot
        and after the last; ``begun`` says that the knots continue a longer path, and leaves the first state out."""
        step = torch.diff(knots, dim=1, prepend=knots[:, :1])
        accel = torch.diff(step, dim=1, prepend=step[:, :1])
        place = (knots - CENTRE)[..., :3] * 2  # the camera's own place says nothing about where it goes
        seen = self.embed(torch.cat([place, step * 10, accel[..., :3] * 30], -1))
        x = seen
        if not begun:
            first = self.start[0].expand(len(words), 1, -1)
            x = torch.cat([first, seen[:, :1] + self.start[1], seen[:, 1:]], 1)
        x = x + (self.motion(words[:, 0]) + self.camera(words[:, 1]))[:, None]
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)

    def logits(self, x: Tensor, drawn: list[Tensor], order: Tensor) -> Tensor:
        """States ``[..., dim]``, the knot's tokens so far, difference order ``[...]`` -> logits ``[..., LEVELS]`` of
        the next."""
        for table, token in zip(self.drawn, drawn, strict=False):
            x = x + table(token)
        every = self.heads[len(drawn)](x).unflatten(-1, (3, LEVELS))
        return every.gather(-2, order[..., None, None].expand(*order.shape, 1, LEVELS)).squeeze(-2)

    def loss(self, tokens: Tensor, knots: Tensor, words: Tensor) -> Tensor:
        """Mean negative log likelihood a token, in nats."""
        x = self.features(knots, words)[:, :-1]
        order = torch.arange(tokens.shape[1]).clamp(max=2).expand(tokens.shape[:2])
        parts = [self.logits(x, [tokens[..., j] for j in range(c)], order) for c in range(4)]
        return torch.stack(
            [F.cross_entropy(p.flatten(0, 1), tokens[..., c].flatten()) for c, p in enumerate(parts)]
        ).mean()

    @torch.no_grad()
    def extend(self, knots: Tensor, words: Tensor, count: int, sampling: Sampling, g: torch.Generator) -> Tensor:
        """Draw ``count`` more knots after ``knots [B, n, 4]``; only the last CONTEXT of them matter."""
        for _ in range(count):
            order, base = predict(knots)
            recent = knots[:, -2 * CONTEXT :]
            x = self.features(recent, words, begun=knots.shape[1] > 2 * CONTEXT)[:, -1]
            drawn: list[Tensor] = []
            for _ in range(4):
                drawn.append(sampling.draw(self.logits(x, drawn, torch.full((len(words),), order)), g))
            value = torch.stack([levels(order, c)[drawn[c]] for c in range(4)], -1)
            knots = torch.cat([knots, (base + value)[:, None]], 1)
        return knots


def interpolate(knots: Tensor, t: Tensor) -> Tensor:
    """Catmull-Rom spline through ``knots [B, n, 4]`` (the first at time 0) at seconds ``t [m]`` -> ``[B, m, 4]``."""
    u = t / KNOT_SECONDS
    i = u.floor().long().clamp(0, knots.shape[1] - 2)
    f = (u - i).view(1, -1, 1)
    p0, p1, p2, p3 = (knots[:, (i + j).clamp(0, knots.shape[1] - 1)] for j in (-1, 0, 1, 2))
    p0 = torch.where((i == 0).view(1, -1, 1), 2 * p1 - p2, p0)
    p3 = torch.where((i + 2 >= knots.shape[1]).view(1, -1, 1), 2 * p2 - p1, p3)
    return p1 + 0.5 * f * (p2 - p0 + f * (2 * p0 - 5 * p1 + 4 * p2 - p3 + f * (3 * (p1 - p2) + p3 - p0)))
