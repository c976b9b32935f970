"""A picture of a clip, one frame every few seconds: ``python examples/film_strip.py out/demo.mp4 strip.png``"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import av
import numpy as np
import typer
from PIL import Image


def film_strip(path: Path, every: float, columns: int, width: int) -> Image.Image:
    """Frames of ``path``, ``every`` seconds apart, ``columns`` a row, each ``width`` pixels wide."""
    pictures, due = [], 0.0
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if frame.time >= due - 1e-6:
                image = frame.to_image()
                pictures.append(
                    image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
                )
                due += every
    whole = len(pictures) // columns * columns
    rows = [np.concatenate([np.asarray(p) for p in pictures[i : i + columns]], 1) for i in range(0, whole, columns)]
    return Image.fromarray(np.concatenate(rows))


def main(
    clip: Path,
    picture: Path,
    every: Annotated[float, typer.Option(help="Seconds between frames.")] = 5.0,
    columns: int = 4,
    width: int = 320,
) -> None:
    """Lay out a clip's frames in one picture."""
    film_strip(clip, every, columns, width).save(picture)


if __name__ == "__main__":
    typer.run(main)
