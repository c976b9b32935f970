"""A causal video autoencoder: 32x32 pixels x 4 frames -> one latent of 64 channels.

Like Wan's and LTX's codecs it maps 1 + 4n frames to 1 + n latent frames: the first latent frame holds a single picture
(seen as four equal frames), every later one holds four frames, and nothing looks ahead.

* **Encoder**: linear. The principal components of 32x32x4 blocks, seen at quarter resolution (768 numbers -> 64),
  partially whitened. Fitted in closed form, costs next to nothing, and has no receptive field beyond its block, so
  encoding in pieces gives the very same latents.
* **Decoder**: the encoder's pseudo-inverse plus a learned residual: residual convolutions at 1/32 with a causal
  temporal mixing, then time x4 and space x2, twice x2 with convolutions, and a pixel MLP with an 8x8 shuffle. Its
  streaming state is the last two feature maps of the temporal mixing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SPACE, TIME, CHANNELS = 32, 4, 64
_SEEN = 8  # pixels of a block's side at quarter resolution
_BLOCK = _SEEN * _SEEN * TIME * 3


@dataclass
class EncoderState:
    """Frames that don't fill a latent frame yet, and whether the clip has begun."""

    pending: Tensor | None = None
    begun: bool = False


@dataclass
class DecoderState:
    """The temporal mixing's last two inputs ``[B, 2, c, h, w]``."""

    past: Tensor


def zero(layer: nn.Module) -> None:
    """Start a residual branch at nothing."""
    for p in layer.parameters():
        nn.init.zeros_(p)


class ResBlock(nn.Module):
    """x + conv(silu(conv(rms(x)))); the norm is per pixel, so no statistics cross a chunk or a tile."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.conv_1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_2 = nn.Conv2d(channels, channels, 3, padding=1)
        zero(self.conv_2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_2(F.silu(self.conv_1(pixel_norm(x) * self.scale)))


def pixel_norm(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6)


class CausalMix(nn.Module):
    """Residual 3-tap convolution over time, 1x1 in space, that sees the present and the two frames before."""

    def __init__(self, channels: int):
        super().__init__()
        self.mix = nn.Conv2d(3 * channels, channels, 1)
        zero(self.mix)

    def forward(self, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x [B, T, c, h, w]`` and the last two inputs -> the same shape, and the new past."""
        past = x[:, :1].expand(-1, 2, -1, -1, -1) if past is None else past
        padded = torch.cat([past, x], 1)
        taps = torch.cat([padded[:, :-2], padded[:, 1:-1], padded[:, 2:]], 2)
        return x + self.mix(taps.flatten(0, 1)).view_as(x), padded[:, -2:].clone()  # no view of all of padded


class Decoder(nn.Module):
    """The learned residual: latents ``[B, T, C, h, w]`` and their linear picture at quarter size
    ``[B, 4T, 3, 8h, 8w]`` -> ``[B, 4T, 3, 32h, 32w]``. The picture joins at 1/8, so that sharpening an edge needs to
    look at its neighbourhood only."""

    def __init__(self, channels: int = CHANNELS, widths: tuple[int, int, int] = (192, 80, 48)):
        super().__init__()
        wide, mid, thin = widths
        self.mid, self.thin = mid, thin
        self.stem = nn.Conv2d(channels, wide, 3, padding=1)
        self.res_1, self.time, self.res_2 = ResBlock(wide), CausalMix(wide), ResBlock(wide)
        self.up_1 = nn.Conv2d(wide, mid * TIME * 4, 1)
        self.res_3 = ResBlock(mid)
        self.up_2 = nn.Conv2d(mid, thin * 4, 1)
        self.look = nn.Conv2d(3 * 4, thin, 3, padding=1)
        self.res_4 = ResBlock(thin)
        self.pixel_1, self.pixel_2 = nn.Conv2d(thin, 96, 1), nn.Conv2d(96, 3 * 64, 1)
        zero(self.pixel_2)

    def features(self, z: Tensor) -> Tensor:
        """What the temporal mixing sees of each latent frame: ``[B, T, C, h, w]`` -> ``[B, T, c, h, w]``."""
        return self.res_1(self.stem(z.flatten(0, 1))).unflatten(0, z.shape[:2])

    def forward(self, z: Tensor, coarse: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
        b, t = z.shape[:2]
        y, past = self.time(self.features(z), past)
        x = self.up_1(self.res_2(y.flatten(0, 1)))
        x = F.pixel_shuffle(x.unflatten(1, (TIME, -1)).flatten(0, 1), 2)
        x = F.pixel_shuffle(self.up_2(self.res_3(x)), 2) + self.look(F.pixel_unshuffle(coarse.flatten(0, 1), 2))
        x = self.pixel_2(F.silu(self.pixel_1(pixel_norm(self.res_4(x)))))
        return F.pixel_shuffle(x, 8).unflatten(0, (b, TIME * t)), past


class Codec(nn.Module):
    """Encoder and decoder with streaming state. Pictures are float in [0, 1], ``[B, T, 3, H, W]``, H and W multiples
    of 32."""

    mean: Tensor
    basis: Tensor
    spread: Tensor

    def __init__(self, channels: int = CHANNELS):
        super().__init__()
        self.channels = channels
        self.decoder = Decoder(channels)
        self.register_buffer("mean", torch.zeros(_BLOCK))
        self.register_buffer("basis", torch.zeros(_BLOCK, channels))
        self.register_buffer("spread", torch.ones(channels))

    @staticmethod
    def blocks(frames: Tensor, stride: int = 4) -> Tensor:
        """``[B, 4T, 3, H, W]`` -> ``[B, T, h, w, 768]``; ``stride`` 4 for full-size pictures, 1 if already at quarter
        size."""
        seen = F.avg_pool2d(frames.flatten(0, 1), stride) if stride > 1 else frames.flatten(0, 1)
        b, t, h, w = frames.shape[0], frames.shape[1] // TIME, seen.shape[2] // _SEEN, seen.shape[3] // _SEEN
        q = F.pixel_unshuffle(seen, _SEEN) if t else seen  # of no pictures, pixel_unshuffle gets the shape wrong
        return q.reshape(b, t, _BLOCK, h, w).movedim(2, -1)

    def fit(self, blocks: Tensor, power: float = 0.6) -> None:
        """Principal components of ``blocks [n, 768]``. Channel c is divided by σ_c^power (rescaled to unit mean
        variance), so that noise of one level hides fine channels first, as it does in pixels."""
        self.mean.copy_(blocks.mean(0))
        centred = blocks - self.mean
        variance, basis = torch.linalg.eigh(centred.T @ centred / len(blocks))
        variance, basis = variance.flip(0)[: self.channels], basis.flip(1)[:, : self.channels]
        spread = variance.sqrt() ** power
        self.spread.copy_(spread * (variance / spread**2).mean().sqrt())
        self.basis.copy_(basis)

    def project(self, blocks: Tensor) -> Tensor:
        """Blocks ``[B, T, h, w, 768]`` -> latents ``[B, T, C, h, w]``."""
        return (((blocks - self.mean) @ self.basis) / self.spread).movedim(-1, 2)

    def encode(self, frames: Tensor, state: EncoderState | None = None) -> tuple[Tensor, EncoderState]:
        """Encode the next frames of a clip; what doesn't fill a latent frame waits in the state for the next call."""
        state = state or EncoderState()
        if not state.begun and frames.shape[1]:
            frames = torch.cat([frames[:, :1].expand(-1, TIME - 1, -1, -1, -1), frames], 1)
        if state.pending is not None:
            frames = torch.cat([state.pending, frames], 1)
        whole = frames.shape[1] // TIME * TIME
        z = self.project(self.blocks(frames[:, :whole]))
        # a copy: a view would keep every frame of this call alive
        return z, EncoderState(frames[:, whole:].clone(), state.begun or frames.shape[1] > 0)

    def decode_linear(self, z: Tensor) -> Tensor:
        """The encoder's pseudo-inverse at quarter size: ``[B, T, C, h, w]`` -> ``[B, 4T, 3, 8h, 8w]``."""
        q = (z.movedim(2, -1) * self.spread) @ self.basis.T + self.mean
        b, t, h, w, _ = q.shape
        q = q.movedim(-1, 2).reshape(b * t * TIME, 3 * _SEEN * _SEEN, h, w)
        return F.pixel_shuffle(q, _SEEN).unflatten(0, (b, t * TIME))

    def reconstruct(self, z: Tensor, past: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """All of the decoder: ``[B, T, C, h, w]`` -> ``[B, 4T, 3, 32h, 32w]``, and the temporal mixing's new past."""
        coarse = self.decode_linear(z)
        fine, past = self.decoder(z, coarse, past)
        smooth = F.interpolate(coarse.flatten(0, 1), scale_factor=4.0, mode="bilinear").view_as(fine)
        return smooth.add_(fine), past

    def skip(self, z: Tensor) -> DecoderState:
        """The state after decoding ``z`` (two latent frames or more), without making its pictures."""
        return DecoderState(self.decoder.features(z[:, -2:]))

    def decode(self, z: Tensor, state: DecoderState | None = None) -> tuple[Tensor, DecoderState]:
        """Decode the next latent frames. A clip's first call returns 1 + 4(T - 1) frames, later calls 4T."""
        frames, past = self.reconstruct(z, None if state is None else state.past)
        return (frames[:, TIME - 1 :] if state is None else frames), DecoderState(past)
