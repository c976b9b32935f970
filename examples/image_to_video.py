"""Animate a still that the model never saw, and judge every few seconds what became of it:
``python examples/image_to_video.py blue ufo gliding city panning --seconds 12 --strip strip.png``"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from PIL import Image
from torch import Tensor

from hhattn.video.evaluate import STRIDE, judge, psnr
from hhattn.video.generate import Pipeline, Request
from hhattn.video.presets import SIZES
from hhattn.video.world import SLOTS, Clip, render

SIZE = "720x1280"


def shrink(picture: Tensor) -> Tensor:
    """uint8 [h, w, 3] to the size that is judged, [3, h / 2, w / 2] in [0, 1]."""
    return F.avg_pool2d(picture.permute(2, 0, 1).float() / 255, STRIDE)


def main(
    words: Annotated[list[str], typer.Argument(help=f"One of each: {', '.join(SLOTS)}.")],
    seconds: float = 12.0,
    every: Annotated[float, typer.Option(help="Seconds between the frames that are judged.")] = 3.0,
    seed: int = 1,
    strip: Annotated[Path | None, typer.Option(help="PNG of those frames side by side.")] = None,
) -> None:
    """Words are told to the world, which draws the still, and to nobody else: the model reads them off the picture."""
    asked = dict(zip(SLOTS, words, strict=True))
    still = render(Clip.draw(random.Random(seed), **asked), torch.zeros(1), *SIZES[SIZE].native)[0][0]
    request = Request("", seconds=seconds, seed=seed, size=SIZE)
    pipeline = Pipeline()
    read = pipeline.understand(request, still).words
    print("read:", " ".join(read.values()))
    shown, due, kept = 0, 0.0, []
    for chunk in pipeline.stream(request, still):
        poses = chunk.poses.flatten(0, 1)[-len(chunk.frames) :]
        for frame, pose in zip(chunk.frames, poses, strict=True):
            if shown / request.fps >= due - 1e-6:
                f = judge(shrink(frame), read, pose, shown / request.fps)
                same = f"{psnr(shrink(frame), F.avg_pool2d(still, STRIDE)):.1f} dB to the still; " if shown == 0 else ""
                print(
                    f"{shown / request.fps:4.1f} s: {same}box {f.box:.1f} dB (wrong colour {f.box_wrong_color:.1f}, no "
                    f"subject {f.box_no_subject:.1f}), background {f.background:.1f}, colour right: {f.color_right}"
                )
                kept.append(Image.fromarray(frame.numpy()).resize((320, 180), Image.Resampling.LANCZOS))
                due += every
            shown += 1
    if strip is not None:
        Image.fromarray(np.concatenate([np.asarray(picture) for picture in kept], 1)).save(strip)


if __name__ == "__main__":
    typer.run(main)
