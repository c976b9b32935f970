"""A clip from a SANA-Video pipeline, chunk by chunk, stopped after two chunks and gone on with in another object:
``python examples/long_sana.py FOLDER``

The words change at the third chunk. What is kept of the past between chunks is printed: it does not grow.
"""

from pathlib import Path

import torch
import typer

from hhattn.integrations.diffusers.long_sana import LongRequest, LongSana


def main(folder: Path, frames: int = 61, height: int = 480, width: int = 832, chunk: int = 4) -> None:
    """FOLDER is a SanaVideoPipeline as diffusers saves it."""
    prompts = {0: "a red balloon over a meadow", 2: "the sun sets behind a red balloon"}
    request = LongRequest(prompts, frames=frames, height=height, width=width, chunk=chunk)
    first = LongSana.from_pretrained(folder)
    parts = []
    for part in first.stream(request):
        parts.append(part.frames)
        print(f"chunk {part.index}: {len(part.frames)} frames, {first.nbytes / 2**20:.2f} MB remembered")
        if part.index == 1:
            break
    torch.save(first.state(), "half.pt")

    second = LongSana.from_pretrained(folder)
    for part in second.stream(request, torch.load("half.pt")):
        parts.append(part.frames)
        print(f"chunk {part.index}: {len(part.frames)} frames, {second.nbytes / 2**20:.2f} MB remembered")
    Path("half.pt").unlink()
    print(f"{sum(map(len, parts))} frames of {tuple(parts[0].shape[1:])}")


if __name__ == "__main__":
    typer.run(main)
