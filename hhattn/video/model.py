"""The diffusion transformer: latents of a chunk, noisy -> clean, with a memory of the past that never grows.

Reads top to bottom: configuration, the memory, a block, the model. A latent frame is a grid of tokens (one per latent
cell). Three blocks of four use block linear attention: a token sees its whole chunk and, through one matrix a head,
everything before. The fourth uses softmax over a window of space-time tiles plus the first frame of the clip (the
sink); its past is a ring of the last frames' keys and values. Words enter through adaLN and through the position field.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hhattn
from hhattn import BlockMask, masks
from hhattn.nn import BlockLinearAttention, BlockSparseAttention, NormModulate

from .field import PositionField, clock

Rope = tuple[Tensor, Tensor]
PATHWAYS = ("joint", "spatial", "temporal", "alternating")


@dataclass(frozen=True)
class Config:
    """Sizes and choices. The defaults are the bundled model; ``SANA_VIDEO_2B`` the published one."""

    channels: int = 64
    dim: int = 160
    heads: int = 5
    layers: int = 6
    ffn: int = 320
    sparse_every: int = 3  # every n-th block is sparse softmax attention; 0: none
    pathway: str = "joint"  # what a linear block's tokens see: joint | spatial | temporal | alternating
    tile: tuple[int, int] = (4, 8)  # rows x columns of the sparse window's tiles
    block: tuple[int, int] = (64, 64)  # tokens in a block of the sparse mask
    window: tuple[int, int, int] = (2, 3, 3)  # frames to either side, and tiles across, of the sparse window
    chunk: int = 4  # latent frames denoised together
    decay: tuple[float, ...] = (0.5, 0.5, 0.75, 0.75, 0.875)  # of the carried state, per head and chunk
    word_slots: tuple[int, ...] = (8, 6, 5, 6, 2)  # colour, subject, motion, scene, camera
    word_dim: int = 48
    field_width: int = 64
    eps: float = 1.0

    def __post_init__(self) -> None:
        if self.pathway not in PATHWAYS:
            raise ValueError(f"pathway={self.pathway!r}; accepted: {', '.join(PATHWAYS)}")
        if len(self.decay) != self.heads:
            raise ValueError(f"decay has {len(self.decay)} values; one for each of the {self.heads} heads is needed")
        if self.sparse_every and self.chunk <= self.window[0]:
            raise ValueError(
                f"chunk={self.chunk}; accepted with window={self.window}: more than {self.window[0]}, so that the "
                "clip's first frame, kept a chunk before the present, stands before the window's frames"
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.heads

    def is_sparse(self, layer: int) -> bool:
        return self.sparse_every > 0 and (layer + 1) % self.sparse_every == 0

    def sees(self, layer: int) -> str:
        """The pathway of a linear block."""
        return ("spatial", "temporal")[layer % 2] if self.pathway == "alternating" else self.pathway


SANA_VIDEO_2B = Config(
    channels=128,
    dim=2240,
    heads=20,
    layers=20,
    ffn=6720,
    sparse_every=0,
    chunk=10,
    decay=(1.0,) * 20,
    word_dim=256,
    eps=1e-15,
)


@dataclass
class LayerMemory:
    """What one block keeps of the past; constant in size once the window's frames have come."""

    linear: hhattn.LinearAttentionState | None = None
    ring: tuple[Tensor, Tensor] | None = (
        None  # keys, values [B, (1 + window)·n, H, D]: sink frame first, then the last frames
    )
    conv: Tensor | None = None  # the temporal convolution's last inputs [B, 2, n, C]


@dataclass
class Memory:
    """What the model keeps of the past: one :class:`LayerMemory` a block, and how many latent frames were committed."""

    layers: list[LayerMemory]
    frames: int = 0

    def bytes(self) -> int:
        tensors = [t for m in self.layers for t in (*(m.linear or ()), *(m.ring or ()), m.conv) if t is not None]
        return sum(t.numel() * t.element_size() for t in tensors)


@dataclass
class Condition:
    """Everything but the latents and the noise level, computed once a chunk: ``words [B, d]`` and field
    ``[B, T, n, 4w]``."""

    words: Tensor
    field: Tensor


def timestep_features(t: Tensor, dim: int = 64) -> Tensor:
    """Sinusoidal features of noise levels in [0, 1]: ``[...] -> [..., dim]``."""
    freqs = torch.exp(-math.log(1e4) * torch.arange(dim // 2, device=t.device) / (dim // 2))
    angle = t[..., None] * 1000 * freqs
    return torch.cat([angle.sin(), angle.cos()], -1)


@lru_cache(maxsize=32)
def window_mask(
    config: Config,
    grid: tuple[int, int],
    frames: int,
    chunk_lens: tuple[int, ...],
    past: int,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """The sparse blocks' mask, in tile order.

    Keys: ``past`` frames from the ring (the first of them the sink), then the call's ``frames``; queries: the call's.
    A query sees a key if their tiles are within the window and the frames at most ``window[0]`` apart and not in a
    later chunk, or the key's frame is the sink: the clip's first.
    """
    if len(set(chunk_lens[:-1])) > 1 or chunk_lens[-1] > chunk_lens[0] or (past and len(chunk_lens) > 1):
        raise ValueError(
            f"chunk_lens={chunk_lens}; accepted: equal chunks, the last may be shorter; one chunk after a memory"
        )
    layout = hhattn.VideoLayout(past + frames, grid[0], grid[1], tile=(1, *config.tile))
    reach, rows, columns = config.window
    only: dict[str, Any] = {"block_size": config.block, "order": "tile", "q_frames": range(past, past + frames)}
    near = masks.sliding_tile(layout, (layout.frames, rows, columns), **only)
    seen = masks.frame_window(layout, reach, **only)
    if len(chunk_lens) > 1:
        seen = seen & masks.block_causal(layout, chunk_lens[0], **only)
    mask = near & (seen | masks.sink(layout, 1, **only))
    return mask if mask.device == torch.device(device) else mask.to(device)


class MixFFN(nn.Module):
    """Linear, depthwise 3x3, gated SiLU, linear, then a causal depthwise convolution over time (SANA-Video's
    Mix-FFN)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.up = nn.Linear(dim, 2 * hidden)
        self.depthwise = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden)
        self.down = nn.Linear(hidden, dim)
        self.time = nn.Parameter(torch.zeros(3, dim))

    def forward(self, x: Tensor, grid: tuple[int, int], past: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x [B, T, n, C]`` -> the same, and the last two frames that the temporal convolution saw."""
        b, t = x.shape[:2]
        y = self.up(x).view(b * t, *grid, -1).permute(0, 3, 1, 2)
        u, gate = self.depthwise(y).permute(0, 2, 3, 1).chunk(2, -1)
        y = self.down(F.silu(gate) * u).view(x.shape)
        padded = torch.cat([torch.zeros_like(y[:, :1]).expand(-1, 2, -1, -1) if past is None else past, y], 1)
        for i in range(3):
            y = y + padded[:, i : i + t] * self.time[i]
        return y, padded[:, -2:].clone()  # a view would keep the whole chunk alive


class Block(nn.Module):
    """adaLN -> attention -> gated residual -> adaLN -> Mix-FFN -> gated residual."""

    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.config, self.sparse, self.sees = config, config.is_sparse(layer), config.sees(layer)
        self.ada = nn.Linear(config.dim, 6 * config.dim)
        nn.init.normal_(self.ada.weight, std=0.02)
        nn.init.zeros_(self.ada.bias)
        self.norm_1, self.norm_2 = NormModulate(config.dim), NormModulate(config.dim)
        self.attn = (
            BlockSparseAttention(config.dim, config.heads)
            if self.sparse
            else BlockLinearAttention(config.dim, config.heads, eps=config.eps)
        )
        self.ffn = MixFFN(config.dim, config.ffn)
        self.register_buffer("decay", torch.tensor(config.decay), persistent=False)

    def forward(
        self,
        x: Tensor,
        c: Tensor,
        grid: tuple[int, int],
        rope: tuple[Tensor, Tensor],
        chunk_lens: tuple[int, ...],
        memory: LayerMemory,
    ) -> tuple[Tensor, LayerMemory]:
        """``x [B, T, n, C]``, ``c [B, T, C]`` -> the same shape, and this block's memory after these frames."""
        b, t, n, d = x.shape
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.ada(F.silu(c)).chunk(6, -1)
        flat = x.flatten(1, 2)
        y = self.norm_1(flat, scale_1, shift_1)
        attend = self._attend_window if self.sparse else self._attend_linear
        y, new = attend(y.view(b, t, n, d), grid, rope, chunk_lens, memory)
        y, flat = self.norm_2(y.flatten(1, 2), scale_2, shift_2, residual=flat, gate=1 + gate_1)
        y, conv = self.ffn(y.view(b, t, n, d), grid, memory.conv)
        return flat.view(b, t, n, d) + (1 + gate_2).unsqueeze(2) * y, replace(new, conv=conv)

    def _attend_linear(
        self, x: Tensor, grid: tuple[int, int], rope: Rope, chunk_lens: tuple[int, ...], memory: LayerMemory
    ) -> tuple[Tensor, LayerMemory]:
        b, t, n, d = x.shape
        if self.sees == "spatial":
            return self.attn(x.flatten(0, 1), rope=(rope[0][:n], rope[1][:n])).view(x.shape), LayerMemory()
        lens, tokens = [c * n for c in chunk_lens], x.flatten(1, 2)
        if self.sees == "temporal":
            lens, tokens = list(chunk_lens), x.transpose(1, 2).flatten(0, 1)
            rope = (rope[0].view(t, n, -1)[:, 0], rope[1].view(t, n, -1)[:, 0])
        decay = self.decay if len(lens) > 1 or memory.linear is not None else None
        y, state = self.attn(
            tokens, rope=rope, chunk_lens=lens, decay=decay, initial_state=memory.linear, output_final_state=True
        )
        y = y.view(b, n, t, d).transpose(1, 2) if self.sees == "temporal" else y.view(x.shape)
        return y, LayerMemory(linear=state)

    def _attend_window(
        self, x: Tensor, grid: tuple[int, int], rope: Rope, chunk_lens: tuple[int, ...], memory: LayerMemory
    ) -> tuple[Tensor, LayerMemory]:
        t, n = x.shape[1:3]
        layout = hhattn.VideoLayout(t, grid[0], grid[1], tile=(1, *self.config.tile))
        past = 0 if memory.ring is None else memory.ring[0].shape[1] // n
        mask = window_mask(self.config, grid, t, chunk_lens, past, x.device)
        tokens = layout.to_tiles(x.flatten(1, 2), dim=1)
        rope = (layout.to_tiles(rope[0], dim=0), layout.to_tiles(rope[1], dim=0))
        y, kv = self.attn(tokens, mask, rope=rope, kv_cache=memory.ring, return_kv=True)
        every = [torch.cat(pair, 1) for pair in zip(memory.ring, kv, strict=True)] if memory.ring else kv
        last = max(n, (past + t - self.config.window[0]) * n)  # a call shorter than the window leaves older frames in
        keys, values = (torch.cat([e[:, :n], e[:, last:]], 1) for e in every)
        return layout.from_tiles(y, dim=1).view(x.shape), LayerMemory(ring=(keys, values))


class VideoDiT(nn.Module):
    """The model: see the module's docstring. Predicts clean latents ``x0`` from ``z_t = (1 - t)·x0 + t·noise``."""

    spread: Tensor

    def __init__(self, config: Config | None = None):
        super().__init__()
        self.config = c = config or Config()
        # every slot has one word more than the vocabulary: "nothing said", which guidance compares with
        self.words = nn.ModuleList(nn.Embedding(n + 1, c.word_dim) for n in c.word_slots)
        width = c.word_dim * len(c.word_slots)
        self.pool = nn.Sequential(nn.Linear(width + 10, 256), nn.SiLU(), nn.Linear(256, c.dim))
        self.time = nn.Sequential(nn.Linear(64, c.dim), nn.SiLU(), nn.Linear(c.dim, c.dim))
        self.field = PositionField(c.word_slots[1] + 1, c.word_slots[3] + 1, width, c.field_width)
        self.embed = nn.Linear(c.channels, c.dim)
        self.place = nn.Linear(4 * c.field_width, c.dim)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.layers))
        self.final = NormModulate(c.dim)
        self.final_ada = nn.Linear(c.dim, 2 * c.dim)
        self.head = nn.Sequential(nn.Linear(c.dim + 4 * c.field_width, 256), nn.SiLU(), nn.Linear(256, c.channels))
        for p in self.head[-1].parameters():
            nn.init.zeros_(p)
        self.register_buffer("spread", torch.ones(c.channels))  # standard deviation of each latent channel

    def no_words(self, batch: int) -> Tensor:
        """The ids ``[B, 5]`` of a prompt that says nothing."""
        return torch.tensor(self.config.word_slots, device=self.spread.device).expand(batch, -1)

    def condition(
        self, word_ids: Tensor, times: Tensor, poses: Tensor, origin: Tensor, grid: tuple[int, int], margin: int = 8
    ) -> Condition:
        """``word_ids [B, 5]``, ``times [B, T, 4]``, ``poses [B, T, 4, 4]``, ``origin [B, 2]`` first cell, ``grid``
        (h, w)."""
        words = torch.cat([e(word_ids[:, i]) for i, e in enumerate(self.words)], -1)
        seen = self.field(word_ids[:, 1], word_ids[:, 3], words, times, poses, origin, grid, margin)
        per_frame = torch.cat([words[:, None].expand(-1, times.shape[1], -1), clock(times[..., -1])], -1)
        return Condition(self.pool(per_frame), seen.flatten(2, 3))

    def forward(
        self, z: Tensor, t: Tensor, cond: Condition, chunk_lens: tuple[int, ...], memory: Memory | None = None
    ) -> tuple[Tensor, Memory]:
        """Noisy latents ``z [B, T, C, h, w]`` at levels ``t [B, T]`` -> clean latents of the same shape, and the
        memory after them."""
        b, frames, _, h, w = z.shape
        level = t[:, :, None, None, None]
        sigma = self.spread.view(-1, 1, 1)
        norm = (((1 - level) * sigma) ** 2 + level**2).rsqrt()
        x = self.embed((z * norm).flatten(3).transpose(2, 3)) + self.place(cond.field)
        c = cond.words + self.time(timestep_features(t))
        rope = hhattn.rope_3d((frames, h, w), self.config.head_dim, device=z.device)
        old = memory.layers if memory else [LayerMemory() for _ in self.blocks]
        layers = []
        for block, m in zip(self.blocks, old, strict=True):
            x, m = block(x, c, (h, w), rope, chunk_lens, m)
            layers.append(m)
        scale, shift = self.final_ada(F.silu(c)).chunk(2, -1)
        x = self.final(x.flatten(1, 2), scale, shift).view(b, frames, h * w, -1)
        out = self.head(torch.cat([x, cond.field], -1)).transpose(2, 3).view_as(z)
        # z's own share of the best linear guess, plus the network's correction in units of what is unknown
        x0 = z * (1 - level) * sigma**2 * norm**2 + out * level * sigma * norm
        return x0, self._rebase(Memory(layers, (memory.frames if memory else 0) + frames), frames, h * w)

    def _rebase(self, memory: Memory, frames: int, n: int) -> Memory:
        """Move the origin of time to the next call's first frame, so that positions never grow; ``n`` tokens a frame.
        The sink moves with the first call, and then until it stands a chunk before the origin, where training saw it:
        before the rest of the ring."""
        done = memory.frames - frames
        with_sink = min(frames, max(0, self.config.chunk - done)) if done else frames
        turn, sink_turn = self._angles(frames), self._angles(with_sink)
        for m in memory.layers:
            if m.linear is not None:
                m.linear = m.linear.rebase(*turn)
            if m.ring is not None:
                keys, values = m.ring
                m.ring = (torch.cat([_turn_back(keys[:, :n], *sink_turn), _turn_back(keys[:, n:], *turn)], 1), values)
        return memory

    def _angles(self, frames: int) -> Rope:
        """cos and sin ``[D]`` of a move by ``frames``."""
        at = (frames, 0, 0)
        cos, sin = hhattn.rope_3d((1, 1, 1), self.config.head_dim, offset=at, device=self.spread.device)
        return cos[0], sin[0]


def _turn_back(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate keys ``[B, S, H, D]`` by minus the angles of ``cos``, ``sin`` [D]."""
    a, b = k.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos[0::2], sin[0::2]
    return torch.stack([a * c + b * s, b * c - a * s], -1).flatten(-2)
