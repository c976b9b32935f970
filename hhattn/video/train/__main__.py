"""``python -m hhattn.video.train``: every stage, resumable. Touch ``OUT/pause`` to make a run stand still, remove it
to go on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file

from hhattn._memory import keep_freed_memory

from ..codec import Codec
from ..model import VideoDiT
from ..prior import MotionPrior
from ..reader import Reader
from ..weights import FOLDER, store
from . import codec as codec_stage
from . import data as data_stage
from . import dit as dit_stage
from . import prior as prior_stage
from . import reader as reader_stage

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)
Folder = Annotated[Path, typer.Option(help="Where runs, checkpoints and rendered data live.")]
Minutes = Annotated[float, typer.Option(help="Wall time of the whole run, earlier parts counted in.")]
Threads = Annotated[int, typer.Option(help="CPU threads.")]
RUNS = Path("runs")


def begin(threads: int) -> None:
    """Be polite to whatever else runs here."""
    os.nice(10)
    keep_freed_memory()
    torch.set_num_threads(threads)


@app.command()
def data(
    out: Folder = RUNS,
    shards: int = 40,
    seed: int = 0,
    start_from: Annotated[
        Path | None,
        typer.Option(help="A codec's safetensors, whose encoder is kept: what models trained earlier understand."),
    ] = None,
    threads: Threads = 1,
) -> None:
    """Fit the encoder, render latents of random clips (about 20 s a shard of 48 clips)."""
    begin(threads)
    data_stage.make(out, shards=shards, seed=seed, start_from=start_from)


@app.command()
def codec(out: Folder = RUNS, minutes: Minutes = 60, threads: Threads = 2) -> None:
    """The decoder."""
    begin(threads)
    codec_stage.train(out, out, minutes)


@app.command()
def prior(out: Folder = RUNS, minutes: Minutes = 15, threads: Threads = 1) -> None:
    """The motion prior."""
    begin(threads)
    prior_stage.train(out, minutes)


@app.command()
def reader(out: Folder = RUNS, minutes: Minutes = 15, threads: Threads = 1) -> None:
    """The picture reader of image-to-video."""
    begin(threads)
    reader_stage.train(out, out, minutes)


@app.command()
def dit(
    out: Folder = RUNS,
    minutes: Minutes = 600,
    lr: float = 2e-3,
    start_from: Annotated[
        Path | None, typer.Option(help="A checkpoint or safetensors file to begin a new run from.")
    ] = None,
    threads: Threads = 2,
) -> None:
    """The diffusion transformer."""
    begin(threads)
    dit_stage.train(out, out, minutes, lr, start_from=start_from)


@app.command()
def export(
    out: Folder = RUNS, to: Annotated[Path | None, typer.Option(help="Default: into the package.")] = None
) -> None:
    """Write the averaged weights of every finished stage as fp16 safetensors.

    Refuses weights that were trained on the latents of another encoder than that of the codec they would lie beside.
    """
    torch.set_num_threads(1)
    models = {"codec": Codec, "dit": VideoDiT, "prior": MotionPrior, "reader": Reader}
    states = {name: torch.load(out / f"{name}.pt") for name in models if (out / f"{name}.pt").exists()}
    _check_encoder(out, to or FOLDER, states)
    for name, state in states.items():
        model = models[name]()
        model.load_state_dict(state["average"])
        kept = store(model, name, to, steps=str(state["step"]), minutes=f"{state['elapsed'] / 60:.0f}")
        print(f"{kept}: {kept.stat().st_size / 1e6:.1f} MB, step {state['step']}")


def _check_encoder(out: Path, to: Path, states: dict[str, dict[str, Any]]) -> None:
    beside = to / "codec.safetensors"
    if "codec" in states or not states.keys() & {"dit", "reader"} or not beside.exists():
        return
    ours, theirs = torch.load(out / "encoder.pt"), data_stage.encoder_of(load_file(beside))
    if not all(torch.equal(ours[k].half(), theirs[k].half()) for k in theirs):
        raise typer.BadParameter(
            f"{out} holds latents of another encoder than {beside}, whose decoder couldn't read them; train the codec "
            f"under {out} too, or render the data again with --start-from {beside}",
            param_hint="--out",
        )


if __name__ == "__main__":
    app()
