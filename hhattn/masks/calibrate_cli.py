"""``hhattn masks calibrate``: measure what each pattern keeps of the attention of a given q, k and v."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hhattn.layout import VideoLayout
from hhattn.masks.calibrate import calibrate
from hhattn.masks.cli import sizes

_TENSORS = "q, k and v, each [batch, tokens, heads, head dim]"


def command(
    file: Annotated[Path, typer.Argument(help="A .safetensors file with q, k, v: batch x tokens x heads x head dim.")],
    density: Annotated[str, typer.Option(help="Shares of the pairs to keep.")] = "0.1,0.25,0.5",
    grid: Annotated[str, typer.Option(help="Frames, rows and columns of the keys; without it only selectors.")] = "",
    tile: Annotated[str, typer.Option(help="Tile of the grid.")] = "4x4x4",
    text: Annotated[int, typer.Option(help="Text tokens beside the video.")] = 0,
    text_first: Annotated[bool, typer.Option("--text-first", help="Text stands before the video.")] = False,
    block: Annotated[str, typer.Option(help="Tokens in a block, of queries and of keys.")] = "64x64",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """What each pattern keeps of the attention mass at a density (recall), and the error of its output.

    Selectors take the blocks that q and k point to, static patterns (with --grid) a window as large as the density
    allows; "best blocks" is what a perfect guess of the blocks would keep. Several minutes for tens of thousands of
    tokens on a CPU.
    """
    table = Table(title=file.name)
    for column in ("pattern", "density", "executed", "mass kept", "worst head", "output error"):
        table.add_column(column, justify="left" if column == "pattern" else "right")
    try:
        q, k, v = _load(file)
        layout = None
        if grid:
            frames, height, width = sizes("grid", grid, 3)
            layout = VideoLayout(frames, height, width, sizes("tile", tile, 3), text, text_first)
        bq, bk = sizes("block", block, 2)
        for row in calibrate(q, k, v, _densities(density), layout=layout, block_size=(bq, bk)):
            if as_json:
                typer.echo(json.dumps(asdict(row)))
            shares = (row.density, row.executed, row.recall, row.worst, row.error)
            table.add_row(row.pattern, *(f"{x:.1%}" for x in shares))
    except (ValueError, TypeError, ImportError) as error:
        typer.echo(f"hhattn masks calibrate: {error}", err=True)
        raise typer.Exit(2) from None
    if not as_json:
        Console(width=max(Console().width, 90)).print(table)


def _densities(text: str) -> list[float]:
    try:
        return [float(x) for x in text.split(",")]
    except ValueError:
        raise ValueError(f"density={text}: accepted are numbers in (0, 1] with commas between") from None


def _load(file: Path) -> tuple[Tensor, Tensor, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        raise ImportError("reading q, k and v needs safetensors: pip install 'hhattn[video]'") from None
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"file={file}: accepted is a .safetensors file ({error})") from None
    if any(name not in tensors or tensors[name].ndim != 4 for name in "qkv"):
        found = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"file={file} has {found or 'no tensors'}: accepted are {_TENSORS}")
    return tensors["q"], tensors["k"], tensors["v"]
