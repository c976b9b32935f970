"""Latents of the world's clips, rendered once and kept on disk, so that the DiT trains without rendering."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..codec import TIME, Codec
from ..world import SLOTS, Clip, render
from .loop import save

FPS = 16
MARGIN = 8  # 720 rows are generated as 736


def frame_times(start: float, latents: int, fps: float = FPS) -> Tensor:
    """Times ``[latents, 4]`` of the frames in each latent frame of a clip that starts at ``start``: the first latent
    frame holds one picture four times."""
    k = torch.arange(TIME * latents) - (TIME - 1)
    return (start + k.clamp(min=0) / fps).view(latents, TIME)


def word_ids(clip: Clip) -> Tensor:
    return torch.tensor([SLOTS[s].index(clip.words[s]) for s in SLOTS])


def fit_codec(rng: random.Random, clips: int = 240) -> Codec:
    """Principal components from blocks of random clips, half of them blocks that the subject touches."""
    codec, inside, outside = Codec(), [], []
    g = torch.Generator().manual_seed(rng.getrandbits(32))
    for _ in range(clips):
        clip = Clip.draw(rng)
        picture, cover = render(clip, frame_times(rng.uniform(0, 60), 2)[1], margin=MARGIN, stride=4)
        blocks = codec.blocks(picture[None], 1).flatten(0, 3)
        touched = torch.nn.functional.max_pool2d(cover.amax(0)[None, None], 8).flatten() > 0.1
        inside.append(blocks[touched])
        outside.append(blocks[~touched][torch.randperm(int((~touched).sum()), generator=g)[: 2 * int(touched.sum())]])
    codec.fit(torch.cat(inside + outside))
    return codec


@torch.no_grad()
def make_clips(codec: Codec, rng: random.Random, count: int, latents: int) -> dict[str, Tensor]:
    """``count`` clips of ``latents`` latent frames: z fp16 [n,T,C,23,40], words [n,5], times [n,T,4], poses
    [n,T,4,4]."""
    out: dict[str, list[Tensor]] = {"z": [], "words": [], "times": [], "poses": []}
    for _ in range(count):
        clip = Clip.draw(rng)
        # one clip in four begins with the single picture that begins every video; the others start in the middle of one
        skip = rng.random() > 0.25
        times = frame_times(rng.uniform(0, 60), latents + skip)[int(skip) :]
        picture, _ = render(clip, times.flatten(), margin=MARGIN, stride=4)
        out["z"].append(codec.project(codec.blocks(picture[None], 1))[0].half())
        out["words"].append(word_ids(clip))
        out["times"].append(times)
        out["poses"].append(clip.path(times.flatten()).view(*times.shape, 4))
    return {k: torch.stack(v) for k, v in out.items()}


def encoder_of(codec: dict[str, Tensor]) -> dict[str, Tensor]:
    """The part of a codec's state that says what a latent means."""
    return {k: v.float() for k, v in codec.items() if not k.startswith("decoder.")}


def load_codec(folder: Path) -> Codec:
    """A codec with the fitted encoder and an untrained decoder."""
    codec = Codec()
    codec.load_state_dict(codec.state_dict() | torch.load(folder / "encoder.pt"))
    return codec


def held_out(folder: Path, codec: Codec, count: int = 48) -> None:
    """Two latent frames of clips whose seeds training never sees."""
    path = folder / "held.pt"
    if not path.exists():
        save(path, make_clips(codec, random.Random("held out"), count, 2))


def make(
    folder: Path, shards: int = 40, clips: int = 48, latents: int = 8, seed: int = 0, start_from: Path | None = None
) -> None:
    """Fit the encoder, or take that of the codec in ``start_from`` (safetensors), and render the training set; what is
    there already is kept, so a killed run goes on where it was."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = folder / "encoder.pt"
    if not encoder.exists():
        state = load_file(start_from) if start_from else fit_codec(random.Random(12345)).state_dict()
        save(encoder, encoder_of(state))
    codec = load_codec(folder)
    held_out(folder, codec)
    for i in range(shards):
        shard = folder / f"clips-{seed}-{i:03d}.pt"
        if not shard.exists():
            start = time.monotonic()
            save(shard, make_clips(codec, random.Random(1000 * seed + i), clips, latents))
            print(
                f"{shard.name}: {clips} clips of {latents} latent frames in {time.monotonic() - start:.0f} s",
                flush=True,
            )
